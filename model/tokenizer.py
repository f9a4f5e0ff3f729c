"""Text to token ids and back, with the chat template that belongs to the ids. Hugging Face folders in and out."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from bylaw.model.chat import (
    PLAIN_STOP_STRINGS,
    ChatTemplate,
    Messages,
    Span,
    assistant_spans,
    is_plain,
    open_turn,
    plain_template,
    sampled_places,
    stand_in,
)
from bylaw.model.records import write_atomic
from bylaw.model.tokenizer_files import (
    TOKEN_NAMES,
    as_ids,
    check_tokens,
    plain_for,
    read_backend,
    read_json,
    read_template,
    special_tokens,
)

# Stand-ins for special tokens spelled out in a message, from a private-use plane that no text carries.
_FIRST_MARK = 0xF0000
_KEPT = 32  # encodings: more than a dialogue with its examples has turns


class Tokenizer:
    """A `tokenizers` tokenizer, its special tokens and its chat template.

    `vocab_size` is the highest id plus one; `bos_id`, `eos_id` and `pad_id` are -1 where there is no such token.
    `stop_ids` end an answer: eos, the ids of generation_config.json, and the special token that the chat template
    writes after an assistant turn. `stop_strings` end it as text (the plain template's next human turn). `hash` is
    over everything that decides ids and text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        tokens: Mapping[str, str],
        template: ChatTemplate,
        generation: dict[str, Any],
    ) -> None:
        self.backend = tokenizers.Tokenizer.from_str(backend.to_str())
        # A tokenizer.json may ask for truncation and padding, which would cut training texts without a word.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.tokens, self.template, self.generation = dict(tokens), template, generation
        self._kept: dict[tuple[str, bool], tokenizers.Encoding] = {}
        self._add_special_tokens()
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id, self.pad_id = (self._token_id(name) for name in TOKEN_NAMES[:3])
        self.stop_ids = self._find_stop_ids()
        self.stop_strings = PLAIN_STOP_STRINGS if is_plain(template.text) else ()

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder: tokenizer.json, and where present tokenizer_config.json,
        chat_template.jinja, special_tokens_map.json and generation_config.json.

        Raises FileNotFoundError without a tokenizer.json, and ValueError naming the file for one that cannot be read,
        for an eos token that is missing or unknown, and for a chat template that fails or tries to escape.
        """
        folder = Path(folder)
        backend = read_backend(folder / "tokenizer.json")
        config = read_json(folder / "tokenizer_config.json")
        generation = read_json(folder / "generation_config.json")
        tokens = special_tokens(read_json(folder / "special_tokens_map.json")) | special_tokens(config)
        stops = as_ids(generation.get("eos_token_id"), folder / "generation_config.json")
        if "eos_token" not in tokens and stops and (eos := backend.id_to_token(stops[0])):
            tokens["eos_token"] = eos
        check_tokens(backend, tokens, folder / "tokenizer_config.json")
        text, source = read_template(folder, config)
        return cls(backend, tokens, ChatTemplate(text or plain_for(backend, tokens), source, tokens), generation)

    @classmethod
    def from_parts(
        cls,
        backend: tokenizers.Tokenizer,
        *,
        eos_token: str,
        bos_token: str = "",
        pad_token: str = "",
        chat_template: str = "",
    ) -> "Tokenizer":
        """A tokenizer made here. Without a chat template it gets the plain one, which begins with `bos_token` if given.

        Raises ValueError for a token that is not in the vocabulary and for a chat template that fails.
        """
        given = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        tokens = {name: token for name, token in given.items() if token}
        unknown = getattr(backend.model, "unk_token", None)
        if isinstance(unknown, str) and backend.token_to_id(unknown) is not None:
            tokens["unk_token"] = unknown
        check_tokens(backend, tokens, "from_parts")
        template = ChatTemplate(chat_template or plain_template(bool(bos_token)), "chat_template", tokens)
        return cls(backend, tokens, template, {})

    def save(self, folder: str | Path) -> None:
        """Write the folder's tokenizer files, so that `load` and Transformers read the same tokenizer back."""
        folder = Path(folder)
        # transformers 4.57 hands token_type_ids to generate() without model_input_names, and readers differ in which
        # of the two places they look for the chat template.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **self.tokens,
            "chat_template": self.template.text,
        }
        ids = {"bos_token_id": self.bos_id, "pad_token_id": self.pad_id}
        generation = self.generation | {name: id for name, id in ids.items() if id >= 0}
        generation["eos_token_id"] = list(self.stop_ids)
        write_atomic(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
        write_atomic(folder / "chat_template.jinja", self.template.text)
        write_atomic(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos or eos added. Special tokens written in the text become themselves."""
        return self._encoding(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens and stop tokens are left out."""
        return self.backend.decode([id for id in ids if id not in self.stop_ids], skip_special_tokens=True)

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of one id. Raises ValueError for an id that it does not hold."""
        token = self.backend.id_to_token(id) if id >= 0 else None
        if token is None:
            raise ValueError(f"token id {id} is not in the vocabulary of {self.vocab_size} tokens")
        return token

    def prompt_ids(self, messages: Messages, prefix: str = "") -> list[int]:
        """The ids of a dialogue that ends with the user, and of the template's prompt for an answer.

        `prefix` begins the answer: it follows as the template would write it there, the turn left open.

        An assistant turn that brings its sampled `ids` stands there with these: the result begins with the prompt that
        it was sampled from and the ids, whatever its text would be tokenised to, so that their keys and values can be
        used again. Only a last stop token that the template would not write there is left out. Raises ValueError for a
        template that does not write such a turn right after its prompt.
        """
        opened, sampled = stand_in(messages)
        shielded, marks = self._shield(opened)
        text = self.template.render(shielded, generation=True)
        ids = self._splice(text, shielded, sampled, marks)
        if not prefix:
            return ids
        return self._extend(ids, open_turn(self.template, shielded, text, prefix), len(text), marks)

    def training_ids(self, messages: Messages, last_only: bool = False) -> tuple[list[int], list[bool]]:
        """The ids of a dialogue that ends with the assistant, and which of them training learns.

        Learned are the tokens of every assistant turn (`last_only`: of the last), up to and including its first stop
        token. The ids before a turn are the very ones that `prompt_ids` gives. A template that writes no stop token
        after the last turn gets eos there.

        Raises ValueError for a dialogue that does not end with the assistant, and for a template that writes a learned
        turn otherwise once the dialogue goes on: what it would teach is not what sampling meets.
        """
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("a training text must end with an assistant turn")
        for number, message in enumerate(messages, 1):
            if "ids" in message:
                raise ValueError(
                    f"message {number} brings ids, but a training text is read from its words; leave them out"
                )
        shielded, marks = self._shield(messages)
        text = self.template.render(shielded, generation=False)
        ids, turns = self._encode_turns(text, assistant_spans(self.template, shielded, text), marks)
        mask = [False] * len(ids)
        for number, turn in list(enumerate(turns, 1))[-1 if last_only else 0 :]:
            if turn is None:
                raise self._unstable(number)
            start, end = turn
            end = next((n + 1 for n in range(start, end) if ids[n] in self.stop_ids), end)
            mask[start:end] = [True] * (end - start)
        if not any(learned and id in self.stop_ids for id, learned in zip(ids[start:], mask[start:], strict=True)):
            return [*ids, self.eos_id], [*mask, True]
        return ids, mask

    def unknown(self, text: str) -> list[str]:
        """The pieces of a text that the vocabulary has no token for, each once; none for most tokenizers, which can
        spell everything.
        """
        read, unknown = self._encoding(text), self._token_id("unk_token")
        pieces = zip(read.ids, read.offsets, strict=True)
        return list(dict.fromkeys(text[at:end] for id, (at, end) in pieces if id == unknown))

    def option_ids(self, options: Sequence[str], after: str = "") -> list[int]:
        """The one token of each option, such as " A" and " B", as it follows the text `after`.

        Raises ValueError for an option that is not one token, that the vocabulary does not hold, or that shares its
        token with another.
        """
        start = self.encode(after)
        found = [self._extend(start, after + option, len(after), {})[len(start) :] for option in options]
        unknown = self._token_id("unk_token")
        for option, ids in zip(options, found, strict=True):
            if len(ids) != 1 or ids[0] == unknown:
                pieces = [self.token(id) for id in ids]
                raise ValueError(f"option {option!r} is {len(ids)} tokens {pieces}; allowed: one known token")
        if len({ids[0] for ids in found}) != len(found):
            raise ValueError(
                f"two of the options {list(options)} have the same token; allowed: one of its own for each"
            )
        return [ids[0] for ids in found]

    @cached_property
    def hash(self) -> str:
        """SHA-256 in hex over everything that decides ids, text and where an answer stops."""
        parts = [self.backend.to_str(), self.tokens, self.template.text, self.stop_ids]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _encode_turns(
        self, text: str, spans: Sequence[Span | None], marks: Mapping[str, str], done: int = 0
    ) -> tuple[list[int], list[Span | None]]:
        """The ids of a rendered dialogue, cut where assistant turns begin and end, and each turn's range of ids.

        The cuts make a prompt's ids the same whatever follows it; there is one after the first `done` characters, too.
        """
        ids = self.encode(text[:done]) if done else []
        turns: list[Span | None] = []
        for span in spans:
            if span is None:
                turns.append(None)
                continue
            ids = self._extend(ids, text[: span[0]], done, marks)
            start, done = len(ids), span[1]
            ids = self._extend(ids, text[:done], span[0], marks)
            turns.append((start, len(ids)))
        return self._extend(ids, text, done, marks), turns

    def _splice(
        self, text: str, messages: Messages, sampled: Mapping[str, list[int]], marks: Mapping[str, str]
    ) -> list[int]:
        """The ids of a rendered dialogue, where the ids of each sampled turn take the place of its stand-in."""
        spans = [span for span in assistant_spans(self.template, messages, text, skip=sampled) if span]
        places = sampled_places(self.template, messages, text, sampled)
        starts, ends = [0, *(place.end for place in places)], [*(place.start for place in places), len(text)]
        pieces = [self._encode_piece(text, *part, spans, marks) for part in zip(starts, ends, strict=True)]
        ids = pieces[0]
        for turn, place, following in zip(sampled.values(), places, pieces[1:], strict=True):
            ids = ids + self._closed(turn, place.closing, following)
        return ids

    def _encode_piece(
        self, text: str, start: int, end: int, spans: Sequence[Span], marks: Mapping[str, str]
    ) -> list[int]:
        """The ids of text[start:end], which begins the text or follows sampled ids; as in `_encode_inside`, a newline
        in front stands for what is not there.
        """
        lead = "\n" if start else ""
        shift = len(lead) - start
        inside = [(first + shift, last + shift) for first, last in spans if start <= first and last <= end]
        ids, _ = self._encode_turns(lead + text[start:end], inside, marks, done=len(lead))
        return ids[len(self.encode(lead)) :] if lead else ids

    def _closed(self, turn: list[int], closing: str, following: list[int]) -> list[int]:
        """A sampled turn and the ids that follow it, which begin with what closes a turn. One that ended by a stop
        token has closed itself, if it is the template's; another in its place is left out.
        """
        stop = turn[-1] if turn and turn[-1] in self.stop_ids else None
        if stop is None:
            return turn + following
        if stop in self.encode(closing) and stop in following:
            return turn + following[following.index(stop) + 1 :]
        return turn[:-1] + following

    def _unstable(self, number: int) -> ValueError:
        return ValueError(
            f"{self.template.source}: the chat template is not prefix-stable: it writes assistant turn {number} "
            "otherwise once the dialogue goes on; train on the last turn only, or use a template that writes all alike"
        )

    def _extend(self, ids: list[int], text: str, start: int, marks: Mapping[str, str]) -> list[int]:
        """`ids`, those of text[:start], followed by the ids of text[start:].

        The text is encoded as one where that leaves `ids` as they are, because that is how Transformers and the
        model's own training wrote it; else text[start:] is encoded on its own.
        """
        if not any(mark in text for mark in marks):
            whole, count = self._encoding(text), len(ids)
            # The offset tells an unknown word that grew, and so kept its id, from one that stayed.
            if whole.ids[:count] == ids and (not count or whole.offsets[count - 1][1] <= start):
                return whole.ids
        new = list(ids)
        for piece in re.split(f"([{''.join(marks)}])", text[start:]) if marks else [text[start:]]:
            if piece in marks:
                new += self._spelled(marks[piece])
            else:
                new += self._encode_inside(piece) if new else self.encode(piece)
        return new

    def _encode_inside(self, piece: str) -> list[int]:
        """The ids of a piece from the middle of a text: encoded after a newline, so that a tokenizer which puts a space
        in front of a text does not put it here, unless the newline becomes one token with what follows.
        """
        newline, both = self.encode("\n"), self.encode("\n" + piece)
        return both[len(newline) :] if both[: len(newline)] == newline else self.encode(piece)

    def _shield(self, messages: Messages) -> tuple[Messages, dict[str, str]]:
        """The messages with every special token that a content spells out replaced by one private character, and what
        each character stands for. It is encoded as the letters it is written with: no text can end a turn or pose as
        another speaker by naming a special token.
        """
        present = [token for token in self._special if any(token in message["content"] for message in messages)]
        marks = {chr(_FIRST_MARK + n): token for n, token in enumerate(sorted(present, key=len, reverse=True))}
        if not marks:
            return messages, marks
        contents = [message["content"] for message in messages]
        if any(mark in content for mark in marks for content in contents):
            raise ValueError(
                f"a message holds both {present[0]!r} and a private-use character from U+F0000 on; remove one"
            )
        for mark, token in marks.items():
            contents = [content.replace(token, mark) for content in contents]
        return [{"role": m["role"], "content": c} for m, c in zip(messages, contents, strict=True)], marks

    def _spelled(self, token: str) -> list[int]:
        self.backend.encode_special_tokens = True
        try:
            ids = self.encode(token)
        finally:
            self.backend.encode_special_tokens = False
        if self.backend.token_to_id(token) in ids:
            raise ValueError(f"a message holds the special token {token!r}, which this tokenizer cannot spell as text")
        return ids

    def _encoding(self, text: str) -> tokenizers.Encoding:
        """The encoding; the last few are kept, as dialogues that begin alike are encoded turn by turn, one by one."""
        key = (text, self.backend.encode_special_tokens)
        try:
            found = self._kept.pop(key, None) or self.backend.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception (a word-level vocabulary without [UNK])
            raise ValueError(f"the tokenizer cannot encode {text!r:.80}: {error}") from error
        self._kept[key] = found  # now the newest
        if len(self._kept) > _KEPT:
            self._kept.pop(next(iter(self._kept)), None)
        return found

    def _token_id(self, name: str) -> int:
        found = self.backend.token_to_id(self.tokens[name]) if name in self.tokens else None
        return -1 if found is None else found

    def _add_special_tokens(self) -> None:
        """Mark bos, eos, pad and unk as special, as Transformers does on loading: then they are cut out of any text
        before it is split, and decoding leaves them out.
        """
        special = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        self.backend.add_special_tokens([token for token in self.tokens.values() if token not in special])
        self._special = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]

    def _find_stop_ids(self) -> tuple[int, ...]:
        """eos, those of generation_config.json, and the first special token after an answer in the template."""
        source = self.template.source
        probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        _, found, tail = self.template.render(probe, generation=False).rpartition("answer")
        if not found:
            raise ValueError(f"{source}: the chat template does not write the assistant's turn")
        special = {self.backend.token_to_id(token) for token in self._special}
        ends = [id for id in self.encode(tail) if id in special][:1]
        listed = as_ids(self.generation.get("eos_token_id"), "generation_config.json")
        return tuple(dict.fromkeys([self.eos_id, *listed, *ends]))
