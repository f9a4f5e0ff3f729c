"""Recipes: what a TOML file sets, what is refused and how it is said, and the round trip through a saved recipe."""

import dataclasses
import math
import tomllib
from pathlib import Path

import pytest

from bylaw.recipe import EVERY_STAGE, STAGES, Recipe, dump_recipe, load_recipe
from bylaw.rlaif.config import PPOConfig

LEAST = 'out = "o"\nbase = "b"\nprompts = "p.jsonl"\n'


def read(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def test_file_sets_values_and_defaults_fill_the_rest(tmp_path: Path) -> None:
    recipe = read(tmp_path, LEAST + 'judge = "sl-cai"\n[ppo]\niterations = 7\nkl_coef = 1\n')
    assert (recipe.judge, recipe.ppo.iterations) == ("sl-cai", 7)
    assert type(recipe.ppo.kl_coef) is float  # written as a whole number
    assert recipe.ppo == dataclasses.replace(PPOConfig(), iterations=7, kl_coef=1.0)
    assert (recipe.constitution, recipe.seed, recipe.helpful, recipe.max_prompt_tokens) == ("default", 0, "", 0)


def test_stages_are_tables_of_the_recipe() -> None:
    names = [field.name for field in dataclasses.fields(Recipe)]
    assert tuple(names[-len(EVERY_STAGE) :]) == EVERY_STAGE


def test_a_run_ends_with_ppo_or_with_dpo(tmp_path: Path) -> None:
    assert read(tmp_path, LEAST).stages == STAGES
    recipe = read(tmp_path, LEAST + 'last = "dpo"\n[dpo]\nbeta = 0.2\n')
    assert recipe.stages == ("revise", "finetune", "compare", "label", "dpo") and recipe.dpo.beta == 0.2
    with pytest.raises(ValueError, match="beta = 0"):
        read(tmp_path, LEAST + "[dpo]\nbeta = 0\n")


def test_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "sub").mkdir()
    elsewhere.mkdir()
    text = 'out = "o"\nbase = "../b"\nprompts = "/abs/p.jsonl"\nhelpful = "h.jsonl"\nconstitution = "laws/mine.toml"\n'
    (tmp_path / "sub" / "r.toml").write_text(text)
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(Path("../sub/r.toml"))
    folder = elsewhere / "../sub"
    assert (recipe.out, recipe.base, recipe.prompts) == (folder / "o", folder / "../b", Path("/abs/p.jsonl"))
    assert (recipe.helpful, recipe.constitution) == (str(folder / "h.jsonl"), str(folder / "laws/mine.toml"))


def test_constitution_that_ships_is_a_name_and_not_a_path(tmp_path: Path) -> None:
    assert read(tmp_path, LEAST + 'constitution = "village"').constitution == "village"


def test_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufeff" + LEAST).out == tmp_path / "o"


def test_dump_reads_back_as_the_same_recipe_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = LEAST + 'helpful = "a \\"quoted\\" é\\u007f\\\\.jsonl"\nconstitution = "c.toml"\nseed = 9\n[finetune]\n'
    recipe = read(tmp_path, text + "learning_rate = 3e-6\nmax_grad_norm = inf\n[label]\nprinciples = 'all'\n")
    saved = tmp_path / "run" / "recipe.toml"
    saved.parent.mkdir()
    saved.write_text(dump_recipe(recipe), encoding="utf-8")
    monkeypatch.chdir(saved.parent)
    assert load_recipe(Path("recipe.toml")) == recipe
    assert recipe.finetune.max_grad_norm == math.inf


def test_dump_makes_relative_paths_of_flags_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(out=Path("o"), base=Path("b"), prompts=Path("p"), helpful="h.jsonl", constitution="c.toml")
    table = tomllib.loads(dump_recipe(recipe))
    named = {key: table[key] for key in ("out", "base", "prompts", "helpful", "constitution")}
    expected = {"out": "o", "base": "b", "prompts": "p", "helpful": "h.jsonl", "constitution": "c.toml"}
    assert named == {key: str(tmp_path / name) for key, name in expected.items()}


def test_dump_spells_out_every_setting() -> None:
    table = tomllib.loads(dump_recipe(Recipe(out=Path("o"), base=Path("b"), prompts=Path("p"))))
    assert list(table) == [field.name for field in dataclasses.fields(Recipe)]
    assert set(table["ppo"]) == {field.name for field in dataclasses.fields(PPOConfig)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LEAST + 'constituton = "x"', ["'constituton'", "did you mean 'constitution'?", "max_prompt_tokens"]),
        (LEAST + "[ppo]\niteration = 5", ["ppo: unknown key 'iteration'", "did you mean 'iterations'?", "kl_coef"]),
        (LEAST + "zzz = 5", ["unknown key 'zzz'. Allowed: out, base"]),
        (LEAST + 'seed = "5"', ["seed = '5'", "int"]),
        (LEAST + "seed = true", ["seed = True", "int"]),
        (LEAST + "[ppo]\nkl_coef = false", ["ppo: kl_coef = False", "float"]),
        (LEAST + "[ppo]\niterations = 2.0", ["ppo: iterations = 2.0", "int"]),
        (LEAST + "[ppo]\nwhiten_rewards = 1", ["ppo: whiten_rewards = 1", "bool"]),
        (LEAST + 'judge = ""', ["judge = ''", "base, sl-cai, a folder or a URL"]),
        (LEAST + "judge = []", ["judge = []", "of type str"]),
        (LEAST + 'judge = "http://h/v1"', ["judge_server.model = ''", "the model's name"]),
        (LEAST + '[judge_server]\nstyle = "x"', ["judge_server: style = 'x'", "'completions'"]),
        (LEAST + "ppo = 5", ["ppo = 5", "[ppo]"]),
        (LEAST + "[ppo]\niterations = 0", ["ppo: iterations = 0", "1 or more"]),
        (LEAST + "[ppo]\nlearning_rate = nan", ["ppo: learning_rate = nan", "0 or more"]),
        (LEAST + "[ppo]\nminibatches = 99", ["ppo: minibatches = 99", "at most rollouts = 64"]),
        (LEAST + "[revise]\ntop_p = 0", ["revise: top_p = 0.0", "above 0 and at most 1"]),
        (LEAST + "[revise]\nmin_p = 1.5", ["revise: min_p = 1.5", "0 (keep all) to 1"]),
        (LEAST + "[reward]\nheldout_fraction = 1.0", ["reward: heldout_fraction = 1.0", "below 1"]),
        (LEAST + "seed = -1", ["seed = -1", "0 to 2^63"]),
        (LEAST + "prompt_limit = -1", ["prompt_limit = -1", "0 (all)"]),
        ('out = "o"', ["missing base, prompts"]),
        (LEAST + "seed = = 4", ["not TOML", "line 4"]),
        (LEAST + "out = 1\n", ["not TOML", "Cannot overwrite", "line 4"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_file_and_key(tmp_path: Path, text: str, said: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        read(tmp_path, text)
    message = str(refusal.value)
    assert message.startswith(str(tmp_path / "recipe.toml")) and "\n" not in message
    for part in said:
        assert part in message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"out = '\xff'")
    with pytest.raises(ValueError, match=r"r\.toml: not TOML"):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("name", ["none.toml", "."])
def test_no_such_recipe(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        load_recipe(tmp_path / name)
