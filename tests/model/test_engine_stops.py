"""Where a text ends: stop ids, stop strings, lengths. The model says what the test has it say."""

from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models
from torch import Tensor

from bylaw.model.config import ModelConfig
from bylaw.model.engine import Engine, Request
from bylaw.model.tokenizer import Tokenizer
from bylaw.model.transformer import Stream, Transformer

CONTEXT, VOCAB = 64, 53


def tokenizer(*pieces: str, decoder: Any = None) -> Tokenizer:
    """`pieces` are ids 2, 3, ... in the spelling of a byte-level vocabulary; id 0 is unknown, 1 is eos."""
    vocabulary = {piece: id for id, piece in enumerate(["<unk>", "</s>", *pieces])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoder or decoders.ByteLevel()
    return Tokenizer.from_parts(backend, eos_token="</s>")


class Scripted(Transformer):
    """Says `script`, whatever it is asked; position p decides the token at p + 1."""

    def __init__(self, script: Sequence[int]) -> None:
        config = ModelConfig(
            family="llama", vocab_size=VOCAB, hidden_size=2, intermediate_size=1, num_layers=1, num_heads=1,
            num_kv_heads=1, head_dim=2, max_position_embeddings=CONTEXT,
        )  # fmt: skip
        super().__init__(config)
        self.script = torch.tensor(script)

    def forward(self, stream: Stream) -> Tensor:
        return stream.positions[:, None].float()

    def logits(self, hidden: Tensor) -> Tensor:
        tokens = self.script[hidden[:, 0].long().clamp(max=len(self.script) - 1)]
        return 50 * torch.nn.functional.one_hot(tokens, VOCAB).float()


def say(pieces: Sequence[str], *stops: str, max_tokens: int = 40, decoder: Any = None) -> tuple[list[str], str, str]:
    """Have the pieces said, then 'Ġon' for ever. Gives the pieces kept, the text that they are, and the finish."""
    vocabulary = list(dict.fromkeys([*pieces, "Ġon"]))
    ids = [2 + vocabulary.index(piece) for piece in [*pieces, "Ġon"]]
    words = tokenizer(*vocabulary, decoder=decoder)
    request = Request(prompt=[0], max_tokens=max_tokens, seed=0, request=0, temperature=0, stop_strings=stops)
    done = Engine(Scripted(ids), words).generate([request])[0]
    assert len(done.ids) == len(done.logprobs)
    return [words.token(id) for id in done.ids], words.decode(done.ids), done.finish


HUMAN = "\n\nHuman:"  # Ċ is the byte-level spelling of a newline, Ġ of a space


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        (["ok", "ĊĊHuman:"], 1),
        (["ok", "Ċ", "Ċ", "H", "u", "m", "an", ":"], 1),
        (["ok", "Ċ", "Ċ", "Ċ", "Human", ":"], 2),  # only two of the newlines belong to the stop
        (["ok", "Ċ", "ĊHuman", ":Ġhi"], 1),  # the last token runs beyond it
        (["ok", "ay", ".Ċ", "ĊHuman:"], 2),  # a token that runs into it goes whole
        (["ĊĊHuman:"], 0),
        (["caf", "Ã", "©", "Ċ", "ĊHuman:"], 3),  # é in two pieces
        (["æĹ", "¥", "æľ", "¬", "Ċ", "ĊHuman:"], 4),  # 日本
        (["Human", ":", "Ċ", "Human", ":", "Ċ", "Ċ", "Hum", "an:"], 5),  # near misses before it
        (["Ġa"] * 25 + ["ĊĊHuman:"], 25),  # far from the start
    ],
)
def test_a_stop_string_is_cut_off_at_the_right_token(pieces: list[str], kept: int) -> None:
    assert say(pieces, HUMAN) == (pieces[:kept], decoders.ByteLevel().decode(pieces[:kept]), "stop")


def test_the_first_of_several_stop_strings_counts() -> None:
    assert say(["a", "b", "c", "d"], "d", "bc", "cd")[0] == ["a"]
    assert say(["a", "xyz"], "z", "y")[0] == ["a"]
    assert say(["xa", "by", "z"], "yz", "ab")[0] == []


def test_a_stop_string_that_does_not_come() -> None:
    pieces, text, finish = say(["ok", "Ċ", "Ċ", "Human"], HUMAN, max_tokens=9)
    assert (len(pieces), text, finish) == (9, "ok\n\nHuman on on on on on", "length")


def test_a_stop_string_at_the_last_token_allowed() -> None:
    assert say(["ok", "ĊĊHuman:"], HUMAN, max_tokens=2) == (["ok"], "ok", "stop")


def byte_pieces(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode()]


FALLBACK = decoders.Sequence([decoders.Replace("Ġ", " "), decoders.ByteFallback(), decoders.Fuse()])


@pytest.mark.parametrize("before", ["日", "日本語日本語", "a日本語日本語", "aa日本語日本語", "😀😀😀😀", "a😀😀😀😀"])
def test_a_stop_string_after_characters_in_bytes(before: str) -> None:
    """A byte-fallback decoder reads a run of bytes as one: begun inside a character, none of it is read."""
    pieces = [*byte_pieces(before), *byte_pieces("\n\n"), "Hum", "an", ":"]
    kept, text, finish = say(pieces, HUMAN, max_tokens=len(pieces), decoder=FALLBACK)
    assert (kept, text, finish) == (byte_pieces(before), before, "stop")


@pytest.mark.parametrize("before", [["<0xE6>"], ["<0xE6>"] * 3, [*["<0xE6>"] * 30, "a"]])
def test_a_stop_string_after_bytes_that_are_no_text(before: list[str]) -> None:
    """None of it is left over, also where the whole text reads as broken and shows no stop string."""
    assert say([*before, *byte_pieces("\n\n"), "Human", ":"], HUMAN, decoder=FALLBACK)[::2] == (before, "stop")


def test_a_stop_id_is_kept() -> None:
    ids = tokenizer("a", "b")
    model = Scripted([2, 3, 1, 2])
    request = Request(
        prompt=[0], max_tokens=9, seed=0, request=0, temperature=0, stop_ids=(1,), stop_strings=("never",)
    )
    done = Engine(model, ids).generate([request])[0]
    assert (done.ids, done.finish) == ([2, 3, 1], "stop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "it has 0 and 5"),
        ({"max_tokens": 0}, "it has 1 and 0"),
        ({"prompt": [3] * CONTEXT}, f"{CONTEXT} tokens leaves no room in the context of {CONTEXT}"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"stop_strings": ("a", "")}, "an empty one is in every text"),
    ],
)
def test_a_request_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"prompt": [3], "max_tokens": 5, "seed": 0, "request": 0}
    with pytest.raises(ValueError, match=message):
        Engine(Scripted([3]), tokenizer()).generate([Request(**good), Request(**(good | options))])


@pytest.mark.parametrize("max_rows", [0, -1])
def test_an_engine_without_rows_is_refused(max_rows: int) -> None:
    with pytest.raises(ValueError, match=f"max_rows = {max_rows} .*1 or more"):
        Engine(Scripted([3]), tokenizer(), max_rows)


def test_a_stop_string_with_tokens_between_that_have_no_text() -> None:
    words = tokenizer("x", "a", "b", "Ġon")
    script = [2, 3, *[words.eos_id] * 15, 4, 5]  # x a </s> ... b: special tokens are not in the text
    request = Request(prompt=[0], max_tokens=30, seed=0, request=0, temperature=0, stop_strings=("ab",))
    (done,) = Engine(Scripted(script), words).generate([request])
    assert (done.ids, done.finish) == ([2], "stop")
