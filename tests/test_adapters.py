"""The pipeline with [lora]: adapters learn on a trunk that stays as it is, and merge into what is saved."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import write_run

from bylaw import adapters
from bylaw.inputs import Run
from bylaw.model.checkpoint import load_model, load_reward
from bylaw.model.heads import ScalarModel
from bylaw.model.lora import merge
from bylaw.model.lora_settings import LoraSettings
from bylaw.model.packing import pack
from bylaw.model.peft_format import load_adapter
from bylaw.model.records import read_records
from bylaw.pipeline import run_pipeline
from bylaw.recipe import Recipe, dump_recipe, load_recipe

LORA = LoraSettings(rank=2, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))


def recipe_of(folder: Path, **ppo: Any) -> Recipe:
    recipe = load_recipe(write_run(folder))
    dpo = replace(recipe.dpo, heldout_fraction=0.4)  # labels of this judge often abstain
    return replace(recipe, lora=LORA, ppo=replace(recipe.ppo, **ppo), dpo=dpo)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = recipe_of(tmp_path_factory.mktemp("lora"))
    run_pipeline(recipe)
    run_pipeline(recipe, ("dpo",))
    return recipe.out


@pytest.mark.parametrize(
    ("start", "stage", "made"),
    [("../base", "finetune", "sl-cai"), ("finetune/sl-cai", "ppo", "rl-cai"), ("finetune/sl-cai", "dpo", "dpo-cai")],
)
def test_what_is_saved_is_the_start_with_its_adapter_merged(out: Path, start: str, stage: str, made: str) -> None:
    model = load_model(out / start)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    load_adapter(model, out / stage / "adapter", "x")
    merge(model, "x")
    saved = dict(load_model(out / stage / made).named_parameters())
    moved = {name for name, p in saved.items() if not torch.equal(p, before[name])}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved[name], parameter, atol=1e-6, rtol=0)
    assert moved and {name.split(".")[-2] for name in moved} <= {"qkv", "down"}, "what has no adapter stays"
    fields = json.loads((out / stage / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["task_type"]) == (2, 8.0, "CAUSAL_LM")


def test_the_reward_model_is_an_adapter_and_a_head(out: Path) -> None:
    trunk = load_model(out / "finetune" / "sl-cai")
    reward = ScalarModel(trunk)
    load_adapter(reward, out / "reward" / "adapter", "reward")
    whole, extras = load_reward(out / "reward" / "reward-model")
    torch.testing.assert_close(reward.score.weight, whole.score.weight, atol=0, rtol=0)
    merge(trunk, "reward")
    for name, parameter in whole.trunk.named_parameters():
        torch.testing.assert_close(trunk.get_parameter(name), parameter, atol=1e-6, rtol=0)
    assert extras["score_std"] > 0


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_ppo_holds_one_trunk(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    """Policy, value, reference and reward: the first KL is 0, and the second is not."""
    recipe = replace(recipe_of(tmp_path, value=value), out=tmp_path / "out")
    for name in ("finetune", "reward"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).symlink_to(out / name)
    trunks: list[Any] = []
    real = adapters._on_one_trunk

    def seen(*given: Any) -> Any:
        models = real(*given)
        parts = (models.value, models.reference, models.rewards[0].model)
        trunks.extend([models.policy, *(part.trunk for part in parts)])  # type: ignore[union-attr]
        return models

    monkeypatch.setattr(adapters, "_on_one_trunk", seen)
    run_pipeline(recipe, ("ppo",))
    assert len(trunks) == 4 and len(set(map(id, trunks))) == 1
    kl = [record["objective/kl"] for record in read_records(tmp_path / "out" / "ppo" / "metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-6) and any(abs(one) > 1e-6 for one in kl[1:])


def test_a_recipe_keeps_its_lists(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, rewards=(f"{tmp_path}/a", f"{tmp_path}/b=0.5"))
    (tmp_path / "again.toml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.toml") == replace(recipe)
    assert recipe.ppo.further_rewards == [(tmp_path / "a", 1.0), (tmp_path / "b", 0.5)]


def test_refusals(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    plain = path.read_text()
    for table, message in (
        ('[lora]\ntargets = ["q"]', r"targets = \('q',\) is not possible"),
        ('[lora]\ntargets = "q_proj"', "a list of texts"),
        ("[lora]\nrank = -1", "rank = -1"),
    ):
        path.write_text(f"{plain}\n{table}\n")
        with pytest.raises(ValueError, match=message):
            load_recipe(path)
    path.write_text(f"tensor_parallel = 2\n{plain}\n[lora]\nrank = 2\n")
    with pytest.raises(ValueError, match=r"tensor_parallel = 2 is not possible; allowed: 1 with lora.rank"):
        load_recipe(path)
    with pytest.raises(ValueError, match=r"rewards = 'x=much' is not possible; allowed: FOLDER or FOLDER=WEIGHT"):
        recipe_of(tmp_path / "other", rewards=("x=much",))


def test_a_further_reward_model_has_its_say(out: Path, tmp_path: Path) -> None:
    """A second copy of the reward model with weight 2 makes the scores three times what they are."""
    scores = {}
    for name, rewards in (("one", ()), ("two", (f"{out}/reward/reward-model=2",))):
        recipe = recipe_of(tmp_path / name, rewards=rewards, iterations=1, missing_eos_penalty=0.0)
        recipe.out.mkdir()
        for stage in ("finetune", "reward"):
            (recipe.out / stage).symlink_to(out / stage)
        run_pipeline(recipe, ("ppo",))
        scores[name] = read_records(recipe.out / "ppo" / "metrics.jsonl")[0]["objective/scores"]
    assert scores["one"] != 0 and scores["two"] == pytest.approx(3 * scores["one"], rel=1e-4)


@pytest.mark.parametrize("lora", [LoraSettings(), LORA])
def test_a_separate_value_model_begins_as_the_reward_model_in_the_units_of_scores(
    out: Path, tmp_path: Path, lora: LoraSettings
) -> None:
    run = Run(replace(recipe_of(tmp_path, value="separate"), lora=lora))
    start, scorer = out / "finetune" / "sl-cai", out / "reward" / "reward-model"
    scales = adapters.reward_scales(run, scorer)
    whole, extras = load_reward(scorer)
    assert scales == [(extras["score_mean"], extras["score_std"])]
    packed = pack([[1, 2, 3], [4, 5]])
    with adapters.ppo_models(run, start, scorer, scales, tmp_path) as (_, models), torch.no_grad():
        expected = whole(packed) / extras["score_std"]
        torch.testing.assert_close(models.value(packed), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(models.rewards[0].model(packed), whole(packed), atol=1e-5, rtol=1e-4)  # type: ignore[operator]
