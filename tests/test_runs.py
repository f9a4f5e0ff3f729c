"""Run folders: the manifest, what is skipped, what is refused, and what a kill may leave behind."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from small_run import tiny_llama, word_tokenizer

from bylaw.model.checkpoint import save_model
from bylaw.recipe import as_table
from bylaw.rlaif.config import PPOConfig
from bylaw.runs import Stage, check_terms, run_stage


def stage(folder: Path, inputs: dict[str, str] | None = None, seed: int = 1, **settings: Any) -> Stage:
    inputs = {"prompts": "abc"} if inputs is None else inputs
    config = as_table(PPOConfig(**settings))
    return Stage(name="ppo", folder=folder / "ppo", inputs=inputs, config=config, seed=seed, device="cpu")


def write_text(folder: Path) -> dict[str, Any]:
    """Work that writes two files, and a training state on the way."""
    (folder / "state").mkdir(exist_ok=True)
    (folder / "state" / "moments").write_text("half")
    (folder / "metrics.jsonl").write_text("1\n")
    (folder / "texts.jsonl").write_text("2\n")
    return {"texts": 1}


def no_work(folder: Path) -> dict[str, Any]:
    raise AssertionError("this stage must not work")


def test_manifest_tells_what_was_made_of_what(tmp_path: Path) -> None:
    manifest = run_stage(stage(tmp_path, iterations=7), write_text)
    assert json.loads((tmp_path / "ppo" / "manifest.json").read_text()) == manifest
    assert (manifest["stage"], manifest["inputs"], manifest["seed"]) == ("ppo", {"prompts": "abc"}, 1)
    assert manifest["config"] == json.loads(json.dumps(dataclasses.asdict(PPOConfig(iterations=7))))
    assert manifest["counts"] == {"texts": 1}
    hashes = {"metrics.jsonl": hashlib.sha256(b"1\n"), "texts.jsonl": hashlib.sha256(b"2\n")}
    assert manifest["outputs"] == {name: digest.hexdigest() for name, digest in hashes.items()}
    assert manifest["seconds"] >= 0 and manifest["resumed"] is False
    assert {"python", "bylaw", "torch", "safetensors"} <= manifest["versions"].keys()
    assert not (tmp_path / "ppo" / "state").exists()


def test_finished_stage_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_stage(stage(tmp_path), write_text)
    assert run_stage(stage(tmp_path), no_work) == first
    assert "done before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"iterations": 9}, "ppo.iterations is 100 there and 9 here"),
        ({"seed": 2}, "seed is 1 there and 2 here"),
        ({"inputs": {"prompts": "xyz"}}, "inputs.prompts is 'abc' there and 'xyz' here"),
        ({"inputs": {"prompts": "abc", "helpful": "h"}}, "inputs.helpful is None there and 'h' here"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("finished", [True, False])
def test_other_terms_are_refused(tmp_path: Path, other: dict[str, Any], said: str, finished: bool) -> None:
    run_stage(stage(tmp_path), write_text)
    if not finished:
        (tmp_path / "ppo" / "manifest.json").unlink()
    with pytest.raises(ValueError) as refusal:
        run_stage(stage(tmp_path, **other), no_work)
    assert said in str(refusal.value) and str(tmp_path / "ppo") in str(refusal.value)
    assert str(refusal.value).count(" there and ") == 1


def test_terms_can_be_checked_before_the_inputs_are_known(tmp_path: Path) -> None:
    run_stage(stage(tmp_path), write_text)
    check_terms(stage(tmp_path, inputs={}), ("config", "seed"))
    with pytest.raises(ValueError, match=r"ppo\.iterations"):
        check_terms(stage(tmp_path, inputs={}, iterations=9), ("config", "seed"))


def test_stage_refused_before_it_wrote_anything_may_change(tmp_path: Path) -> None:
    def refuse(folder: Path) -> dict[str, Any]:
        raise ValueError("too few pairs")

    with pytest.raises(ValueError, match="too few pairs"):
        run_stage(stage(tmp_path, iterations=9), refuse)
    assert run_stage(stage(tmp_path), write_text)["resumed"] is False


@pytest.mark.parametrize(("change", "said"), [("unlink", "texts.jsonl is gone"), ("write", "texts.jsonl was changed")])
def test_outputs_that_are_not_as_they_were_are_refused(tmp_path: Path, change: str, said: str) -> None:
    run_stage(stage(tmp_path), write_text)
    output = tmp_path / "ppo" / "texts.jsonl"
    output.unlink() if change == "unlink" else output.write_text("3\n")
    with pytest.raises(ValueError, match=said):
        run_stage(stage(tmp_path), no_work)


def test_checkpoint_is_an_output_and_its_card_is_not(tmp_path: Path) -> None:
    def save(folder: Path) -> dict[str, Any]:
        save_model(tiny_llama(), folder / "rl-cai", word_tokenizer(), "card")
        return {}

    run_stage(stage(tmp_path), save)
    (tmp_path / "ppo" / "rl-cai" / "README.md").write_text("my own words")
    run_stage(stage(tmp_path), no_work)
    weights = tmp_path / "ppo" / "rl-cai" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="rl-cai was changed"):
        run_stage(stage(tmp_path), no_work)


def test_files_and_folders_of_others_do_not_matter(tmp_path: Path) -> None:
    run_stage(stage(tmp_path), write_text)
    (tmp_path / "ppo" / "plots").mkdir()
    (tmp_path / "ppo" / "notes.txt").write_text("mine")
    run_stage(stage(tmp_path), no_work)


def test_killed_stage_goes_on_and_says_so(tmp_path: Path) -> None:
    def killed(folder: Path) -> dict[str, Any]:
        write_text(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(stage(tmp_path), killed)
    assert run_stage(stage(tmp_path), write_text)["resumed"] is True


def test_kill_while_the_manifest_is_written_leaves_no_output(tmp_path: Path) -> None:
    def work(folder: Path) -> dict[str, Any]:
        (folder / ".manifest.json.tmp").write_text('{"stage"')  # what an earlier, killed attempt left
        return write_text(folder)

    assert set(run_stage(stage(tmp_path), work)["outputs"]) == {"metrics.jsonl", "texts.jsonl"}
    run_stage(stage(tmp_path), no_work)


def test_state_outlives_its_stage_until_the_manifest_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bylaw.runs.shutil.rmtree", killed)
        run_stage(stage(tmp_path), write_text)
    assert (tmp_path / "ppo" / "manifest.json").exists()
    assert (tmp_path / "ppo" / "state" / "moments").exists()
    run_stage(stage(tmp_path), no_work)
    assert not (tmp_path / "ppo" / "state").exists()
