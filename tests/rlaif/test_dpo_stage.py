"""The `dpo` stage: from preferences and the SL-CAI checkpoint to another, with its card, measures and manifest."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_run import HELPFUL, PROMPTS, WORDS, tiny_llama, word_tokenizer, write_lines, write_run

import bylaw.model.fit as fit_module
from bylaw.learned import preferred
from bylaw.ledger import Ledger
from bylaw.model.checkpoint import load_model, save_model
from bylaw.model.packing import pack
from bylaw.model.records import sha256_file
from bylaw.pipeline import run_pipeline
from bylaw.recipe import load_recipe
from bylaw.talk import find_checkpoint

DPO = "\n[dpo]\nlearning_rate = 0.01\nbatch_size = 4\nheldout_fraction = 0.4\nepochs = 3\nsave_every = 1\n"


def preferences() -> list[dict[str, Any]]:
    """Two for each prompt of the run, one of them unlabelled: who says "kind" is better."""
    draw, tokenizer = random.Random(0), word_tokenizer()
    made = []
    for prompt in [*PROMPTS, *HELPFUL]:
        for n in range(2):
            texts = [" ".join([*draw.choices(WORDS[8:], k=draw.randint(1, 5)), word]) for word in ("kind", "rude")]
            a, b = ({"text": text, "ids": [*tokenizer.encode(text), 1], "finish": "stop"} for text in texts)
            said = prompt.get("messages") or [{"role": "user", "content": prompt.get("prompt", "break a well ?")}]
            made.append({"id": f"{prompt['id']}#{n}", "prompt_id": prompt["id"], "prompt": said, "a": a, "b": b,
                         "p_a": 0.9, "abstained": "", "labels": [], "by": {}})  # fmt: skip
    made[3] |= {"p_a": None, "abstained": "unclear"}
    return made


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A run that stands before its last stage."""
    path = write_run(tmp_path)
    path.write_text(path.read_text() + DPO)
    save_model(tiny_llama(), tmp_path / "out/finetune/sl-cai", word_tokenizer())
    (tmp_path / "out/label").mkdir()
    write_lines(tmp_path / "out/label/preferences.jsonl", preferences())
    return path


def test_stage(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(recipe_file)
    manifest = run_pipeline(recipe, ("dpo",))["dpo"]
    counts = manifest["counts"]
    assert counts["train_pairs"] + counts["heldout_pairs"] == 15 and counts["abstained"] == 1
    assert counts["steps"] == -(-3 * counts["train_pairs"] // 4)
    assert counts["heldout_margin"] > 0 and 0 < counts["heldout_loss"] < 0.6931
    assert set(manifest["inputs"]) == {"preferences", "sl-cai"} and manifest["config"]["beta"] == 0.1
    folder = recipe.out / "dpo"
    assert set(manifest["outputs"]) == {"dpo-cai", "metrics.jsonl"} and not (folder / "state").exists()
    assert "DPO" in (folder / "dpo-cai" / "README.md").read_text() and find_checkpoint(recipe.out) == folder / "dpo-cai"
    moved, start = load_model(folder / "dpo-cai"), load_model(recipe.out / "finetune/sl-cai")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "dpo-cai")
    ids = [5, 6, 7, 8]
    with torch.no_grad():
        ours = moved.logits(moved(pack([ids])))
        torch.testing.assert_close(theirs(input_ids=torch.tensor([ids])).logits[0], ours, atol=1e-4, rtol=0)
        assert (ours - start.logits(start(pack([ids])))).abs().max() > 1e-2
    capsys.readouterr()
    assert run_pipeline(recipe, ("dpo",))["dpo"] == manifest  # done before
    assert "dpo: done before" in capsys.readouterr().out


def test_other_preferences_are_another_run(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    run_pipeline(recipe, ("dpo",))
    write_lines(recipe.out / "label/preferences.jsonl", preferences()[:-1])
    with pytest.raises(ValueError, match=r"begun by another recipe: .*preferences"):
        run_pipeline(recipe, ("dpo",))


def test_mistakes_are_found_before_work(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("[dpo]\n", "[dpo]\nbeta = 0.5\n"))
    changed = recipe_file.read_text().replace("heldout_fraction = 0.4\nepochs = 3", "heldout_fraction = 0.0001")
    recipe_file.write_text(changed)
    with pytest.raises(ValueError, match=r"stage dpo: dpo.heldout_fraction = 0.0001 keeps 0 of 8 prompts"):
        run_pipeline(load_recipe(recipe_file), ("dpo",))
    (recipe_file.parent / "out/label/preferences.jsonl").unlink()
    recipe_file.write_text(changed.replace("0.0001", "0.4"))
    with pytest.raises(FileNotFoundError, match="run `bylaw label`"):
        run_pipeline(load_recipe(recipe_file), ("dpo",))


def test_helpfulness_preferences_are_mixed_in_behind_the_runs_own(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = [one | {"id": f"m{n}", "p_a": 0.123} for n, one in enumerate(preferences()) if n != 3]
    write_lines(recipe_file.parent / "mixed.jsonl", mixed)
    own: list[dict[str, Any]] = [
        one | ({"p_a": 0.6 + n / 100} if one["p_a"] else {}) for n, one in enumerate(preferences())
    ]
    write_lines(recipe_file.parent / "out/label/preferences.jsonl", own)
    text = recipe_file.read_text().replace("[dpo]\n", "[dpo]\nhelpful_ratio = 0.4\n")
    recipe_file.write_text(text)
    with pytest.raises(
        ValueError, match=r"stage dpo: dpo.helpful_ratio = 0.4 is not possible; allowed: 0 without help"
    ):
        run_pipeline(load_recipe(recipe_file), ("dpo",))
    recipe_file.write_text('helpful_preferences = "mixed.jsonl"\n' + text)
    batches: list[list[Any]] = []
    accumulate = fit_module.accumulate

    def spied(objective: Any, batch: Any, *rest: Any) -> Any:
        batches.append([item.pair.p_a for item in batch])
        return accumulate(objective, batch, *rest)

    monkeypatch.setattr(fit_module, "accumulate", spied)
    recipe = load_recipe(recipe_file)
    manifest = run_pipeline(recipe, ("dpo",))["dpo"]
    counts = manifest["counts"]
    assert counts["helpful_pairs"] == round(0.4 * counts["train_pairs"]) > 0 == counts["helpful_pairs_missing"]
    assert counts["train_pairs"] - counts["helpful_pairs"] + counts["heldout_pairs"] == 15
    assert sum(p == 0.123 for batch in batches for p in batch) == 3 * counts["helpful_pairs"]
    assert manifest["inputs"]["helpful_preferences"] == sha256_file(recipe_file.parent / "mixed.jsonl")
    # What is told of the run's own preferences is what was done with them.
    fates = preferred(Ledger(recipe.out), "dpo")
    told: list[list[float]] = [[] for _ in batches]
    for one in own:
        for visit in fates[one["id"]].get("steps", ()):
            told[visit["step"]].append(one["p_a"])
    assert [sorted(p for p in batch if p != 0.123) for batch in batches] == [sorted(labels) for labels in told]
