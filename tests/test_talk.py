"""`bylaw chat`: which checkpoint answers, what the model is shown, and lines that are piped in."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_run import CONTEXT, tiny_llama, word_tokenizer

from bylaw.cli import main
from bylaw.model.checkpoint import save_model, save_reward
from bylaw.model.heads import scalar_model
from bylaw.model.sampler import Sampler
from bylaw.model.settings import SamplingSettings
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

    def turns(sampler: Sampler, asked: Sequence[Dialogue], keys: Any, limit: int) -> list[dict[str, str]]:
        dialogues.extend(list(dialogue) for dialogue in asked)
        return [{"text": f"no {len(dialogues)}"}]

    monkeypatch.setattr(Sampler, "turns", turns)
    return dialogues


def contents(dialogue: Dialogue) -> list[str]:
    return [message["content"] for message in dialogue]


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
    with pytest.raises(FileNotFoundError, match=r"run: neither a checkpoint .* ppo/rl-cai, finetune/sl-cai"):
        find_checkpoint(tmp_path / "run")


def test_reward_model_does_not_talk(tmp_path: Path) -> None:
    save_reward(scalar_model(tiny_llama(), 0), tmp_path / "reward-model", word_tokenizer())
    with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
        chat(tmp_path / "reward-model", ChatConfig(), [])


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"seed": -1}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        ChatConfig(**wrong)
