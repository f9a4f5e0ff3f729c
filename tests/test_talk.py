"""`bylaw chat`: which checkpoint answers, what the model is shown, lines that are piped in, and text as it comes."""

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from small_run import CONTEXT, tiny_llama, word_tokenizer
from tokenizers import decoders, models, pre_tokenizers

from bylaw.cli import main
from bylaw.model.checkpoint import save_model, save_reward
from bylaw.model.engine import Completion
from bylaw.model.engine.stops import before_stop
from bylaw.model.heads import scalar_model
from bylaw.model.sampler import Sampler, text_record
from bylaw.model.settings import SamplingSettings
from bylaw.model.tokenizer import Tokenizer
from bylaw.stream import Stream, settled
from bylaw.talk import ChatConfig, chat, find_checkpoint

Dialogue = list[dict[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk") / "model"
    save_model(tiny_llama(), folder, word_tokenizer())
    return folder


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Dialogue]:
    """The dialogues that a model is shown, which answers each with its number."""
    dialogues: list[Dialogue] = []

    def turns(sampler: Sampler, asked: Sequence[Dialogue], keys: Any, limit: int, **more: Any) -> list[dict[str, str]]:
        dialogues.extend(list(dialogue) for dialogue in asked)
        return [{"text": f"no {len(dialogues)}"}]

    monkeypatch.setattr(Sampler, "turns", turns)
    return dialogues


def contents(dialogue: Dialogue) -> list[str]:
    return [message["content"] for message in dialogue]


def test_words_that_the_vocabulary_lacks_are_told(
    folder: Path, shown: list[Dialogue], capsys: pytest.CaptureFixture[str]
) -> None:
    chat(folder, ChatConfig(), ["how to mend the zeppelin , or a \x1b[2J zeppelin ?\n", "how ?\n"])
    told = [line for line in capsys.readouterr().out.splitlines() if "vocabulary" in line]
    assert len(told) == 1 and "zeppelin" in told[0] and "mend" not in told[0] and "\x1b" not in told[0]


def test_talk_goes_on_and_begins_anew_at_an_empty_line(folder: Path, shown: list[Dialogue]) -> None:
    chat(folder, ChatConfig(system="care"), ["how ? \n", "to mend ?\n", " \n", "which ?\n"])
    assert [contents(dialogue) for dialogue in shown] == [
        ["care", "how ?"],
        ["care", "how ?", "no 1", "to mend ?"],
        ["care", "which ?"],
    ]
    assert [message["role"] for message in shown[1]] == ["system", "user", "assistant", "user"]


def test_talk_past_the_context_begins_anew_and_says_so(
    folder: Path, shown: list[Dialogue], capsys: pytest.CaptureFixture[str]
) -> None:
    line = "mend " * (CONTEXT // 2)
    chat(folder, ChatConfig(), [line, line])
    assert [len(dialogue) for dialogue in shown] == [1, 1]
    assert f"outgrown the model's context of {CONTEXT} tokens" in capsys.readouterr().out


def test_line_longer_than_the_context(folder: Path) -> None:
    with pytest.raises(ValueError, match=f"no room in the context of {CONTEXT}"):
        chat(folder, ChatConfig(), ["mend " * CONTEXT])


def test_piped_lines_are_answered_by_the_seed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(seed: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("how do i mend a fence ?\nand a gate ?\nand a well ?\n"))
        main(["chat", str(folder), "--seed", seed, "--max-tokens", "6"])
        return capsys.readouterr().out.splitlines()

    first = answers("1")
    assert str(folder) in first[0] and len(first) == 4  # a line for each, an empty one too
    assert answers("1") == first != answers("2")
    assert all(len(answer.split()) <= 6 for answer in first[1:])


def test_answer_that_ends_at_once_leaves_the_talk_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may say nothing; the next turn must still render."""
    said = iter(["", "yes"])
    monkeypatch.setattr("bylaw.model.sampler.text_record", lambda completion, tokenizer: {"text": next(said)})
    chat(folder, ChatConfig(max_tokens=2), ["how ?", "which ?"])
    assert not list(said)


def test_sampling_settings_reach_the_sampler(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(seed: int) -> str:
        greedy = ChatConfig(seed=seed, max_tokens=6, sampling=SamplingSettings(temperature=0))
        chat(folder, greedy, ["how do i mend a fence ?"])
        return capsys.readouterr().out

    assert answer(1) == answer(2)


def test_answer_is_shown_as_it_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word by word, and in the end just what is recorded."""
    pieces: list[str] = []
    recorded: list[str] = []
    right = Sampler.turns

    def turns(*args: Any, **more: Any) -> list[dict[str, Any]]:
        records = right(*args, **more)
        recorded.extend(record["text"] for record in records)
        return records

    monkeypatch.setattr(Sampler, "turns", turns)
    monkeypatch.setattr("bylaw.talk._show", pieces.append)
    chat(folder, ChatConfig(max_tokens=12), ["how do i mend a fence ?", "and a gate ?"])
    assert "".join(pieces) == "".join(f"{text}\n" for text in recorded)
    assert len([piece for piece in pieces if piece.strip()]) > len(recorded)


PIECES = ("b\n\nHu", "\n\nH", "man", ":")
# GPT-2's spelling of bytes: the printable ones as they are, the others from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
SPELLED = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(OTHERS)}


def spelled(text: str) -> str:
    return "".join(SPELLED[byte] for byte in text.encode())


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """A token for each byte, by its own number, and some longer ones, which cut a stop string here and there."""
    tokens = [*(SPELLED[byte] for byte in range(256)), *(spelled(piece) for piece in PIECES if len(piece) > 1), "<eos>"]
    backend = tokenizers.Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    tokenizer = Tokenizer.from_parts(backend, eos_token="<eos>")
    assert tokenizer.stop_strings == ("\n\nHuman:",)
    return tokenizer


def test_half_a_character_and_the_beginning_of_a_stop_string_wait(byte_tokenizer: Tokenizer) -> None:
    raw = "né 語 🙂".encode()
    for count in range(len(raw) + 1):
        assert settled(list(raw[:count]), byte_tokenizer) == raw[:count].decode(errors="ignore")
    for text, sure in (("a\n", "a"), ("a\n\nHum", "a"), ("a\n\nHumbug", "a\n\nHumbug"), ("a\n\nHuman:b", "a")):
        assert settled(list(text.encode()), byte_tokenizer) == sure, text


def test_token_that_runs_into_a_stop_string_waits_whole(byte_tokenizer: Tokenizer) -> None:
    """The engine cuts it off with the stop string, with what it holds before that."""
    runs_in = byte_tokenizer.backend.token_to_id(spelled("b\n\nHu"))
    assert runs_in is not None
    assert settled([ord("a"), runs_in], byte_tokenizer) == "a"
    assert settled([ord("a"), runs_in, ord("g")], byte_tokenizer) == "ab\n\nHug"


def test_any_text_adds_up_to_its_record(byte_tokenizer: Tokenizer) -> None:
    """Random tokens of which many begin a stop string, heard one after the other and ended as the engine does."""
    source, endings = random.Random(0), 0
    likely = [*(byte_tokenizer.backend.token_to_id(spelled(piece)) for piece in PIECES), *b"\n a", 0xC3, 0xA9]
    for _ in range(4000):
        pieces: list[str] = []
        stream, ids, keep = Stream(byte_tokenizer, pieces.append), [], None
        while keep is None and len(ids) < 12:
            ids.append(source.choice(likely))
            stream.hear(0, ids)
            keep = before_stop(ids, byte_tokenizer.stop_strings, byte_tokenizer)
        record = text_record(Completion(ids=ids[:keep], logprobs=[], finish="stop"), byte_tokenizer)
        stream.end(record["text"])
        assert "".join(pieces) == record["text"] + "\n", ids
        endings += keep is not None
    assert endings > 20


def test_decoder_that_writes_its_beginning_anew(byte_tokenizer: Tokenizer) -> None:
    """What stands there cannot be taken back; the whole text is told again."""
    pieces: list[str] = []
    stream = Stream(byte_tokenizer, pieces.append)
    stream.hear(0, list(b"ab"))
    stream.hear(0, list(b"xyz"))
    stream.end("xyz!")
    assert "".join(pieces) == "ab\nxyz!\n"


def test_newest_checkpoint_of_a_run(tmp_path: Path) -> None:
    for name in ("finetune/sl-cai", "ppo/rl-cai"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        assert find_checkpoint(tmp_path) == tmp_path / name
    assert find_checkpoint(tmp_path / "finetune" / "sl-cai") == tmp_path / "finetune" / "sl-cai"


@pytest.mark.parametrize("make", [False, True])
def test_folder_without_a_checkpoint(tmp_path: Path, make: bool) -> None:
    if make:
        (tmp_path / "run").mkdir()
    told = r"neither a checkpoint .* ppo/rl-cai, dpo/dpo-cai, fine" if make else "no such folder"
    with pytest.raises(FileNotFoundError, match=f"run: {told}"):
        find_checkpoint(tmp_path / "run")


def test_reward_model_does_not_talk(tmp_path: Path) -> None:
    save_reward(scalar_model(tiny_llama(), 0), tmp_path / "reward-model", word_tokenizer())
    with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
        chat(tmp_path / "reward-model", ChatConfig(), [])


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"seed": -1}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        ChatConfig(**wrong)
