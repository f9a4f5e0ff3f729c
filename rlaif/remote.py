"""A judge behind an OpenAI-compatible server that returns log-probs (OpenAI, vLLM, SGLang, llama.cpp and others).

A letter's log-prob is that of the tokens which are the letter alone, " A" and "A" added up: a server tells spellings,
not ids, and white space and the marks that tokenizers write for it are taken off. "a", "(A" and "A." are others. A
judge on this machine is asked for one token of each letter alone, " A" and " B" (rlaif/reader.py).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from bylaw.kernels.philox import request_id
from bylaw.model.chat import PLAIN_STOP_STRINGS, ChatTemplate, open_turn, plain_template
from bylaw.model.sampler import Turn, turn
from bylaw.rlaif.config import RemoteConfig
from bylaw.rlaif.reader import CENSORED, FILTERED, Question, Reading, Thought
from bylaw.rlaif.remote_http import Answer, Server

NO_LETTER = "neither letter among the server's log-probs"
NO_LOGPROBS = "the server gave no log-probs"
NO_NUMBER = "a letter's log-prob is no number, or above 0"
NOT_ASKED = "asked by another process"
ONE_LETTER = "Reply with one letter, A or B, which goes on from here:"
BEGIN = "Begin your reply from here:"
PROBE = "Which letter comes first in the alphabet, A or B?"
SPACES = " \t\r\n▁Ġ"  # with how SentencePiece and byte-level vocabularies spell a space
ROUNDED = 1e-6  # of a probability, by how servers write numbers
LEAST = -1e6  # log-prob that stands for those below, such as -infinity, which no record can hold: probability 0
STOPS = 4  # the most stop strings that OpenAI takes


@dataclass(frozen=True, kw_only=True)
class RemoteReader:
    """The judge at `url`. `prefix` is what the option letters follow; `asks` is False in a process whose readings
    nobody writes. `counts` tells requests, attempts that failed by fault, and readings with a bound.
    """

    url: str
    config: RemoteConfig
    seed: int
    prefix: str
    asks: bool = True
    counts: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def hash(self) -> str:
        config = self.config  # with what can change a label: an answer cut shorter has another bound
        return f"{self.url} {config.model} ({config.style}, {config.top_logprobs} log-probs)"

    def check(self) -> None:
        """Raise ValueError unless the server answers a plain question with a letter and its log-probs. It has two
        attempts: whoever mistyped an address is not to wait for all that a run would make.
        """
        hasty = replace(self, config=replace(self.config, retries=min(self.config.retries, 1)))  # the counts are shared
        try:
            [reading] = hasty.read([Question([turn("user", PROBE)], self.prefix)])
        except ConnectionError as error:
            raise ValueError(f"the judge cannot be asked: {error}") from None
        if reading.logprobs is None and self.asks:
            raise ValueError(f"the judge {self.config.model!r} at {self.url} {self._unread(reading.why)}")

    def _unread(self, why: str) -> str:
        """What the server did with a plain question, and what may mend it."""
        config = self.config
        if why == NO_LOGPROBS:
            return (
                "gave no log-probs; take a server and model that return top_logprobs, or lower "
                f"judge_server.top_logprobs = {config.top_logprobs} if it gives fewer"
            )
        if why == NO_LETTER:
            return (
                "began its answer to a plain question with neither letter, so that it could label nothing; take a "
                "model that does not think before it answers, or another judge_server.style than "
                f"{config.style!r}: chat asks for a letter in words, continue and completions begin the reply up to it"
            )
        return f"cannot be asked a plain question: {why}"

    def forget(self) -> None:
        """Nothing is kept between calls."""

    def read(self, asked: Sequence[Question]) -> list[Reading]:
        """As `Reader.read`. ConnectionError, naming it, for a request that is refused or fails too often."""
        if not self.asks:
            return [Reading(None, NOT_ASKED)] * len(asked)
        answers = self._ask([self._question(one) for one in asked])
        readings = [self._reading(answer) for answer in answers]
        self.counts["bounded"] += sum(reading.bounded for reading in readings)
        return readings

    def think(self, asked: Sequence[Thought]) -> list[dict[str, Any]]:
        """As `Reader.think`, without token ids: servers do not give them. Errors as in `read`."""
        if not self.asks:
            return [{"text": "", "ids": [], "finish": "length"} for _ in asked]
        return [_text_record(answer) for answer in self._ask([self._thought(one) for one in asked])]

    def _ask(self, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
        path = "/completions" if self.config.style == "completions" else "/chat/completions"
        answers = Server(self.url, self.config).ask(path, bodies)
        self.counts["requests"] += len(answers)
        self.counts.update(f"again: {fault}" for answer in answers for fault in answer.faults)
        return answers

    def _question(self, question: Question) -> dict[str, Any]:
        # At temperature 1 servers that scale log-probs by it, and those that do not, give the same.
        body = self._reply(question.messages, question.prefix, ONE_LETTER) | {"max_tokens": 1, "temperature": 1}
        wanted = self.config.top_logprobs
        if self.config.style == "completions":
            return body | {"logprobs": wanted}
        return body | {"logprobs": True, "top_logprobs": wanted}

    def _thought(self, thought: Thought) -> dict[str, Any]:
        plain = self.config.style == "completions"
        stops = [*(PLAIN_STOP_STRINGS if plain else ()), *thought.stop][:STOPS]
        body = self._reply(thought.messages, thought.prefix, BEGIN)
        body |= {"max_tokens": thought.limit, "temperature": thought.temperature}
        body["seed"] = request_id(self.seed, *thought.key) & 0x7FFFFFFF
        return body | ({"stop": stops} if stops else {})

    def _reply(self, messages: Sequence[Turn], prefix: str, ask: str) -> dict[str, Any]:
        """The part of a request that asks for a reply to `messages` that goes on from `prefix`."""
        turns = [turn(one["role"], one["content"]) for one in messages]
        body: dict[str, Any] = {"model": self.config.model}
        if self.config.style == "completions":
            plain = self._plain
            return body | {"prompt": open_turn(plain, turns, plain.render(turns, generation=True), prefix)}
        if self.config.style == "chat":
            return body | {"messages": _asked_for(turns, prefix, ask)}
        turns.append(turn("assistant", prefix))
        return body | {"messages": turns, "continue_final_message": True, "add_generation_prompt": False}

    @cached_property
    def _plain(self) -> ChatTemplate:
        """How a checkpoint without a chat template reads turns."""
        return ChatTemplate(plain_template(False), "the plain chat template", {"eos_token": ""})

    def _reading(self, answer: Answer) -> Reading:
        if answer.choice is None:
            return Reading(None, answer.why)
        # Some servers list the token that they drew beside the likeliest: no label may depend on a draw.
        listed = sorted(_listed(answer.choice), key=lambda one: -one[1])[: self.config.top_logprobs]
        if not listed and answer.choice.get("finish_reason") == CENSORED:
            return Reading(None, FILTERED)
        return letters(listed)


def letters(listed: Sequence[tuple[str, float]]) -> Reading:
    """The reading of a place in a text, from its likeliest tokens and their log-probs. Tokens may be spelled alike.

    A letter that is not listed is at most as likely as the last that is, and as all that is not: this bound stands for
    it.
    """
    if not listed:
        return Reading(None, NO_LOGPROBS)
    known = [[p for token, p in listed if _is_letter(token, letter)] for letter in "AB"]
    if any(math.isnan(p) for one in known for p in one):
        return Reading(None, NO_NUMBER)
    a, b = map(_sum, known)
    if not any(math.exp(p) for p in (a, b) if p is not None):
        return Reading(None, NO_LETTER)
    rest = max(1 - sum(math.exp(p) for _, p in listed), ROUNDED)
    bound = min(*(p for _, p in listed), math.log(rest))
    return Reading((bound if a is None else a, bound if b is None else b), bounded=a is None or b is None)


def _sum(logprobs: Sequence[float]) -> float | None:
    """The log of the summed probabilities; None for none."""
    if not logprobs:
        return None
    most = max(logprobs)
    return most + math.log(sum(math.exp(p - most) for p in logprobs))


def _is_letter(token: str, letters: str = "AB") -> bool:
    return len(bare := token.strip(SPACES)) == 1 and bare in letters


def _listed(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The tokens at the first place of a reply with their log-probs, in the form of chats or of completions; none if it
    holds none. What is no log-prob is NaN for a letter and left out for others. An exact repeat is the drawn token,
    listed twice; two that are spelled alike are two tokens.
    """
    try:
        given = choice["logprobs"]
        first = given["content"][0]["top_logprobs"] if "content" in given else given["top_logprobs"][0]
        pairs = first.items() if isinstance(first, dict) else [(one["token"], one["logprob"]) for one in first]
    except (KeyError, IndexError, TypeError):
        return []
    found = [(token, _logprob(p)) for token, p in pairs if isinstance(token, str)]
    return list(dict.fromkeys(one for one in found if _is_letter(one[0]) or not math.isnan(one[1])))


def _logprob(value: object) -> float:
    """The log-prob, from LEAST to what rounding may leave above 0; NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= ROUNDED:
        return math.nan
    return max(value, LEAST)


def _text_record(answer: Answer) -> dict[str, Any]:
    """The text of a choice, as records have it. One longer than the context is empty, and its end "length"; one that a
    content filter refused or cut ends with CENSORED.
    """
    choice = answer.choice or {"finish_reason": CENSORED if answer.why == FILTERED else "length"}
    message = choice.get("message")
    said = message.get("content") if isinstance(message, dict) else choice.get("text")
    text = said if isinstance(said, str) else ""
    text = text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold halves of characters
    end = choice.get("finish_reason")
    return {"text": text.strip(), "ids": [], "finish": end if end in ("stop", CENSORED) else "length"}


def _asked_for(turns: Sequence[Turn], prefix: str, ask: str) -> list[Turn]:
    """A chat whose last line is `prefix`, to be gone on from. Few-shot replies that begin with it move it likewise, so
    that they show what is wanted.
    """
    chat: list[Turn] = []
    for one in [*turns, turn("assistant", prefix)]:
        if chat and one["role"] == "assistant" and one["content"].startswith(prefix):
            chat[-1] = turn(chat[-1]["role"], f"{chat[-1]['content']}\n\n{ask}\n{prefix}")
            one = turn("assistant", one["content"].removeprefix(prefix).strip())
        chat.append(one)
    return chat[:-1]
