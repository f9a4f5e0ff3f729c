"""All six stages on a tiny random Llama: what they write, that they are skipped when done, and that a run killed again
and again ends with the files of one that was not. Each run is a process of its own, as a person starts it.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import HELPFUL, PROMPTS, process, word_tokenizer, write_run

from bylaw.benchmarks.real_prompts import contents
from bylaw.constitution import load_constitution
from bylaw.inputs import Run
from bylaw.model.checkpoint import load_model, load_reward
from bylaw.model.engine import Engine
from bylaw.model.settings import SamplingSettings
from bylaw.pipeline import run_pipeline
from bylaw.recipe import STAGES, load_recipe
from bylaw.rlaif.config import LabelConfig, PPOConfig

PAIRS = 2 * (len(PROMPTS) + len(HELPFUL))
CHECKPOINTS = ("finetune/sl-cai", "reward/reward-model", "ppo/rl-cai")
# Dies in the middle of writing the first record past `count` to the file that ends with `name`: half a line stays.
KILLED = """
import os, signal, sys
from bylaw.cli import main
from bylaw.model.records import RecordWriter, encode_record

recipe, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
write = RecordWriter.write

def write_or_die(self, records):
    if not str(self.path).endswith(name):
        return write(self, records)
    for record in list(records):
        if self.count == count:
            self._file.write(encode_record(record, "")[:-9])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, [record])

RecordWriter.write = write_or_die
main(["run", recipe])
"""


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest(out: Path, stage: str) -> dict[str, Any]:
    return json.loads((out / stage / "manifest.json").read_text())


def check_text(text: dict[str, Any], limit: int) -> None:
    """A sampled text: within its limit, its words are its ids', and it stopped for the reason given."""
    assert 1 <= len(text["ids"]) <= limit
    assert text["text"] == word_tokenizer().decode(text["ids"]).strip()
    assert text["finish"] == ("stop" if text["ids"][-1] == 1 else "length")
    assert text["finish"] == "stop" or len(text["ids"]) == limit


def test_chains_are_whole_and_in_order(finished: Path) -> None:
    chains, config = records(finished / "revise" / "chains.jsonl"), load_recipe(finished / "recipe.toml").revise
    known = {p.id: p.hash for p in load_constitution(finished.parent / "small.toml").principles}
    assert [chain["id"] for chain in chains] == [prompt["id"] for prompt in PROMPTS]
    for chain in chains:
        assert chain["prompt"][-1]["role"] == "user"
        assert [step["round"] for step in chain["rounds"]] == [1, 2]
        check_text(chain["answer"], config.max_answer_tokens)
        for step in chain["rounds"]:
            assert step["principle"]["hash"] == known[step["principle"]["id"]]
            check_text(step["critique"], config.max_critique_tokens)
            check_text(step["revision"], config.max_revision_tokens)
    assert len({chain["answer"]["text"] for chain in chains}) > 1
    assert {step["principle"]["id"] for chain in chains for step in chain["rounds"]} == {"kind", "care"}


def test_helpful_samples_are_given_or_drawn(finished: Path) -> None:
    samples = records(finished / "revise" / "helpful.jsonl")
    assert [(one["id"], one["sample"]) for one in samples] == [
        ("h-cart", 0), ("h-cart", 1), ("h-rope", 0), ("h-nail", 0), ("h-nail", 1),
    ]  # fmt: skip
    assert samples[2]["given"] == "ask them first , with care ." and "answer" not in samples[2]
    assert samples[0]["answer"] != samples[1]["answer"]


def test_pairs_and_preferences(finished: Path) -> None:
    pairs, labels = records(finished / "compare" / "pairs.jsonl"), records(finished / "label" / "preferences.jsonl")
    ids = [f"{prompt['id']}#{n}" for prompt in [*PROMPTS, *HELPFUL] for n in range(2)]
    assert [pair["id"] for pair in pairs] == [label["id"] for label in labels] == ids and len(ids) == PAIRS
    least = load_recipe(finished / "recipe.toml").label.min_option_mass
    for pair, label in zip(pairs, labels, strict=True):
        assert (label["a"], label["b"]) == (pair["a"], pair["b"])
        (one,) = label["labels"]
        masses = [sum(math.exp(one[side][f"logprob_{x}"]) for x in "AB") for side in ("a_first", "b_first")]
        assert bool(label["abstained"]) == (min(masses) < least) == (label["p_a"] is None)
        assert label["abstained"] or 0 < label["p_a"] < 1
    abstained = sum(bool(label["abstained"]) for label in labels)
    counts = manifest(finished, "label")["counts"]
    assert (counts["labels"], sum(counts["abstained"].values())) == (PAIRS - abstained, abstained)
    assert 0 < abstained < PAIRS  # else this run shows too little


def test_counts_agree_from_stage_to_stage(finished: Path) -> None:
    counts = {stage: manifest(finished, stage)["counts"] for stage in STAGES}
    for stage in ("revise", "compare", "label", "ppo"):
        engine = counts[stage].pop("engine")
        assert engine["prompt_tokens"] > 0 and engine["preemptions"] == 0
        assert 0 <= engine["cache_hit_rate"] < 1 and 0 <= engine["useful_fraction"] <= 1
        assert engine["prefill_tokens_per_second"] > 0
        assert (engine["decode_tokens_per_second"] > 0) == (engine["generated_tokens"] > 0) == (stage != "label")
    marks = counts["revise"].pop("marks")
    assert counts["revise"] == {"chains": 5, "rounds": 2, "helpful": 5} and set(marks) == {"critique", "revision"}
    tuned = counts["finetune"]
    assert (
        sum(tuned[name] for name in ("revisions", "empty_revisions", "marked_revisions")) == 10
        and tuned["helpful"] + tuned["empty_helpful"] == 5
    )
    assert tuned["steps"] == 2 * math.ceil((tuned["revisions"] + tuned["helpful"]) / 4)
    reward = counts["reward"]
    assert reward["train_pairs"] + reward["heldout_pairs"] == counts["label"]["labels"]
    assert reward["abstained"] == sum(counts["label"]["abstained"].values())
    assert (counts["ppo"]["iterations"], counts["ppo"]["episodes"]) == (6, 24)
    for stage, steps in (("finetune", tuned["steps"]), ("reward", reward["steps"]), ("ppo", 6)):
        assert [line["step"] for line in records(finished / stage / "metrics.jsonl")] == list(range(steps))


def test_manifests_name_the_inputs_by_hash(finished: Path) -> None:
    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    inputs = {stage: manifest(finished, stage)["inputs"] for stage in STAGES}
    assert inputs["revise"]["prompts"] == inputs["ppo"]["prompts"] == sha256(finished.parent / "prompts.jsonl")
    assert inputs["finetune"]["chains"] == sha256(finished / "revise" / "chains.jsonl")
    assert inputs["label"]["pairs"] == sha256(finished / "compare" / "pairs.jsonl")
    assert inputs["reward"]["preferences"] == sha256(finished / "label" / "preferences.jsonl")
    assert inputs["label"]["judge"] == inputs["revise"]["base"] != inputs["compare"]["sl-cai"]
    assert inputs["ppo"]["sl-cai"] == manifest(finished, "finetune")["outputs"]["sl-cai"]


def test_checkpoints_load_and_have_learned(finished: Path) -> None:
    base, tuned, final = (
        load_model(folder) for folder in (finished.parent / "base", *(finished / name for name in CHECKPOINTS[::2]))
    )
    weights = [model.get_parameter("blocks.0.down.weight") for model in (base, tuned, final)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    _, extras = load_reward(finished / "reward" / "reward-model")
    counts = manifest(finished, "reward")["counts"]
    assert extras == {name: counts[name] for name in ("score_mean", "score_std")}
    assert not list(finished.rglob("state"))


def test_recipe_in_the_folder_makes_the_run_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage finds its terms unchanged, so none works."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "recipe.toml"}
    run_pipeline(load_recipe(finished / "recipe.toml"))
    said = capsys.readouterr().out
    assert all(f"{stage}: done before" in said for stage in STAGES)
    assert {path: path.stat().st_mtime_ns for path in before if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_killed_run_ends_as_one_that_was_not(finished: Path, tmp_path: Path) -> None:
    recipe = write_run(tmp_path)
    for name, count in (("revise/chains.jsonl", 3), ("finetune/samples.jsonl", 3), ("ppo/metrics.jsonl", 5)):
        killed = process("-c", KILLED, recipe, name, str(count))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        torn = (tmp_path / "out" / name).read_bytes()
        assert torn.count(b"\n") == count and not torn.endswith(b"\n")
    assert (tmp_path / "out" / "ppo" / "state" / "latest.json").exists()  # or nothing would be picked up
    done = process("-m", "bylaw", "run", recipe)
    assert done.returncode == 0, done.stderr
    expected, found = contents(finished), contents(tmp_path / "out")
    assert found.keys() == expected.keys() >= {f"{name}/model.safetensors" for name in CHECKPOINTS}
    for name, content in expected.items():
        assert found[name] == content, name
    assert [manifest(tmp_path / "out", stage)["resumed"] for stage in STAGES] == [
        True, True, False, False, False, True,
    ]  # fmt: skip


def test_prompts_left_out_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_run(tmp_path)
    recipe.write_text(recipe.read_text().replace("seed = 3", "seed = 3\nmax_prompt_tokens = 15\nprompt_limit = 4"))
    counts = run_pipeline(load_recipe(recipe), ("revise",))["revise"]["counts"]
    assert counts["chains"] == 3
    assert "1 of 4 prompts left out: over 15 tokens" in capsys.readouterr().out


def test_scores_that_are_all_alike_are_refused(finished: Path, tmp_path: Path) -> None:
    recipe = write_run(tmp_path)
    for name in CHECKPOINTS[:2]:
        shutil.copytree(finished / name, tmp_path / "out" / name)
    config = tmp_path / "out" / "reward" / "reward-model" / "config.json"
    fields = json.loads(config.read_text())
    fields["bylaw"]["score_std"] = 0.0
    config.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r'score_std = 0\.0.*ppo\.score_stats = "running"'):
        run_pipeline(load_recipe(recipe), ("ppo",))


def test_a_run_that_must_not_go_on_is_refused_before_any_work(finished: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_run(tmp_path))
    shutil.copytree(finished / "revise", recipe.out / "revise")
    anew = dataclasses.replace(recipe, resume=False)
    with pytest.raises(ValueError, match=r"resume = false, but .*out/revise was begun; .* resume = true"):
        run_pipeline(anew)
    assert not (recipe.out / "recipe.toml").exists()
    with pytest.raises(FileNotFoundError, match="run `bylaw finetune`"):  # a stage that was not begun is not refused
        run_pipeline(anew, ("compare",))


def pages_of(engine: Engine) -> int:
    return engine.memory.store.pages


def test_the_cache_that_a_recipe_sets_is_the_engines(tmp_path: Path) -> None:
    run = Run(load_recipe(write_run(tmp_path)))
    model = run.model(run.recipe.base)
    small, chosen = run.engine(model, 0.001), run.engine(model, 0.0)
    assert pages_of(small) < pages_of(chosen) == pages_of(Engine(model))
    sampler = run.sampler(model, run.recipe.base, SamplingSettings(cache_gib=0.001))
    assert pages_of(sampler.engine) == pages_of(small)
    for settings in (SamplingSettings, LabelConfig, PPOConfig):
        for value in (-1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"cache_gib = {value} is not possible"):
                settings(cache_gib=value)
