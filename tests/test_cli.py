"""The command line: help that is quick and complete, flags over the file, and hostile input met before any work."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import CONTEXT, PROMPTS, tiny_llama, word_tokenizer, write_lines, write_run

from bylaw.cli import COMMANDS, main
from bylaw.model.checkpoint import save_model
from bylaw.recipe import STAGES, load_recipe

Spoil = Callable[[Path], object]


def run_main(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = 0
    try:
        main(args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def one_space(text: str) -> str:
    """Text without the boxes and line breaks of a help page."""
    return re.sub(r"[\s│╭╰╮╯─]+", " ", text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder that lacks nothing. Tests that spoil something make their own."""
    folder = tmp_path_factory.mktemp("whole")
    write_run(folder)
    return folder


def test_help_needs_no_torch() -> None:
    """In a fresh process: this one has torch already."""
    program = """
import sys, contextlib, io
from bylaw.cli import main
for command in ([], ["--help"], ["--version"], *([name, "--help"] for name in sys.argv[1:])):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        main(command)
    assert said.getvalue().strip(), command
    assert "torch" not in sys.modules, command
"""
    names = list(COMMANDS)
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_main([name, "--help"], capsys)
    assert code == 0 and f"bylaw {name}" in out
    first_line = (COMMANDS[name].__doc__ or "").splitlines()[0]
    assert first_line in one_space(out)
    assert first_line in one_space(run_main([], capsys)[1])


@pytest.mark.parametrize("name", ["run", *STAGES])
def test_help_shows_defaults_and_what_each_setting_means(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = one_space(run_main([name, "--help"], capsys)[1])
    for said in (
        "--ppo.iterations INT Rollout batches, each followed by updates. (default: 100)",
        "--ppo.adam-epsilon FLOAT Added to AdamW's denominator (arXiv 2403.17031). (default: 1e-05)",
        "--finetune.save-every INT Optimiser steps between training checkpoints",
        "--label.principles {one,some,all}",
        "--base PATH Base checkpoint: a Hugging Face folder. (required)",
        "--constitution STR `default`, `village`, or a TOML file. (default: default)",
    ):
        assert said in text


def test_help_with_a_recipe_shows_its_values(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = one_space(run_main(["ppo", str(whole / "recipe.toml"), "--help"], capsys)[1])
    assert "--ppo.iterations INT Rollout batches, each followed by updates. (default: 6)" in text


def test_flags_go_over_the_file(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("bylaw.pipeline.run_pipeline", lambda recipe, stages: asked.append((recipe, stages)) or {})
    flags = ["--ppo.iterations", "5", "--label.principles", "all", "--no-resume"]
    main(["run", str(whole / "recipe.toml"), *flags])
    recipe, stages = asked.pop()
    in_file = load_recipe(whole / "recipe.toml")
    assert stages == STAGES and recipe.ppo.iterations == 5 and in_file.ppo.iterations == 6
    assert (recipe.label.principles, recipe.resume) == ("all", False) and in_file.resume
    assert (recipe.revise, recipe.base, recipe.ppo.rollouts) == (in_file.revise, in_file.base, in_file.ppo.rollouts)


def test_flags_alone_make_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("bylaw.pipeline.run_pipeline", lambda recipe, stages: asked.append((recipe, stages)) or {})
    main(["label", "--out", "o", "--base", "b", "--prompts", "p.jsonl", "--judge", "sl-cai"])
    recipe, stages = asked.pop()
    assert stages == ("label",) and (recipe.out, recipe.judge) == (Path("o"), "sl-cai")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ppo.iterations", "0"], "iterations = 0 is not possible; allowed: 1 or more"),
        (["--ppo.iteration", "5"], "--ppo.iterations"),
        (["--seed", "x"], "--seed"),
        (["--judge", "me"], "me': no such folder; allowed: 'base', 'sl-cai', a checkpoint's folder, or a URL"),
    ],
)  # fmt: skip
def test_wrong_flags(flags: list[str], said: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_main(["run", str(whole / "recipe.toml"), *flags], capsys)
    assert code == 2 and said in one_space(err)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["rnu"], "bylaw rnu: no such command; did you mean 'run'? Allowed: demo, run"),
        (["zzz"], "bylaw zzz: no such command. Allowed: demo, run"),
        (["run", "none.toml"], "none.toml: no such recipe"),
        (["chat"], "bylaw chat FOLDER"),
        (["chat", "none"], "none: no such folder"),
        (["chat", "."], ".: neither a checkpoint"),
        (["trust", "--json", "none"], "none: no such folder"),
        (["report", "none"], "none: no such folder"),
        (["evaluate", "--limit", "3", "run"], "a folder is wanted first, before any flag"),
        (["judge", "."], "a file of questions or of pairs is wanted after ."),
        (["run"], "a recipe is wanted first, before any flag: bylaw run RECIPE.toml"),
        (["run", "--ppo.iterations", "3", "recipe.toml"], "a recipe is wanted first, before any flag"),
        (["experiment"], "experiment '' is not known; allowed, in front of the flags: revisions"),
        (["experiment", "--runs", "x"], "allowed, in front of the flags: revisions"),
        (["constitution", "shwo", "default"], "allowed: show FILE, check FILE"),
        (["constitution", "check", "vilage"], "did you mean 'village'?"),
    ],
)  # fmt: skip
def test_mistakes_in_a_command_are_one_line(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run_main(args, capsys)
    assert code == 2 and said in err and err.count("\n") == 1


def test_a_flag_may_end_in_the_name_of_a_constitution(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_main(["run", "--constitution", "mine.toml"], capsys)
    assert code == 2 and "Required options" in err and "wanted first" not in err


def test_constitution_show_and_check(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "never hurts" in run_main(["constitution", "show", str(whole / "small.toml")], capsys)[1]
    said = run_main(["constitution", "check", str(whole / "small.toml")], capsys)[1]
    assert "2 principles, all in order" in said and "none is for" not in said


def test_a_stage_that_a_constitution_has_nothing_for_is_told(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (whole / "small.toml").read_text()
    (tmp_path / "c.toml").write_text(text.replace("sources", 'stages = ["critique"]\nsources'))
    said = run_main(["constitution", "check", str(tmp_path / "c.toml")], capsys)[1]
    assert "none is for the stage 'comparison': answers cannot be compared by it" in said and "'critique'" not in said


def cut_weights(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_in_place(folder: Path) -> None:
    (folder / "base" / "model.safetensors").write_bytes(pickle.dumps({"model.norm.weight": [1.0]}))


def pickle_beside(folder: Path) -> None:
    (folder / "base" / "model.safetensors").unlink()
    (folder / "base" / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": [1.0]}))


def change_config(**changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def write(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text)


def replace(name: str, old: str, new: str) -> Spoil:
    def spoil(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return spoil


def prompts(*records: dict[str, Any], before: list[dict[str, Any]] = PROMPTS) -> Spoil:
    return lambda folder: write_lines(folder / "prompts.jsonl", [*before, *records])


def other_recipe(stage: str) -> Spoil:
    """A folder in which a run with another seed has begun `stage`."""

    def spoil(folder: Path) -> None:
        place = folder / "out" / stage
        place.mkdir(parents=True)
        settings = load_recipe(folder / "recipe.toml")
        config = vars(getattr(settings, stage)) | {"save_every": 99}
        terms = {"stage": stage, "inputs": {}, "config": config, "seed": 77}
        (place / "begun.json").write_text(json.dumps(terms))
        (place / "metrics.jsonl").write_text("")

    return spoil


def big_tokenizer(folder: Path) -> None:
    save_model(tiny_llama(vocab_size=9), folder / "base")
    word_tokenizer().save(folder / "base")


ESCAPE = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
LONG: dict[str, Any] = {"id": "p-long", "prompt": "break " * (CONTEXT - 30)}
HOSTILE: dict[str, tuple[Spoil, list[str]]] = {
    "missing weights": (lambda f: (f / "base" / "model.safetensors").unlink(), ["base: no weights"]),
    "truncated weights": (cut_weights, ["model.safetensors: not a whole safetensors file", "cut short at"]),
    "pickle in place of weights": (pickle_in_place, ["model.safetensors", "but a pickle"]),
    "pickle beside": (pickle_beside, ["pytorch_model.bin is a pickle"]),
    "architecture": (
        change_config(architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        ["config.json: architectures = ['GPT2LMHeadModel']", "Qwen2ForCausalLM"],
    ),
    "no base": (replace("recipe.toml", '"base"', '"nobase"'), ["nobase: no such folder"]),
    "weights of another shape": (change_config(intermediate_size=99), ["down_proj", "config.json asks for (16, 99)"]),
    "more tokens than the model": (big_tokenizer, ["base: the tokenizer has", "the model only 9"]),
    "template that escapes": (
        write("base/chat_template.jinja", ESCAPE),
        ["jinja: the chat template tries to leave its sandbox", "__class__"],
    ),
    "template that is broken": (write("base/chat_template.jinja", "{% for %}"), ["chat_template.jinja"]),
    "malformed line": (
        lambda f: (f / "prompts.jsonl").write_text('{"prompt": "a ?"}\n{"prompt": "b ?"\n'),
        ["prompts.jsonl:2: not JSON"],
    ),
    "empty prompt": (prompts({"prompt": " "}), [f"prompts.jsonl:{len(PROMPTS) + 1}", "prompt = ' '"]),
    "no prompts": (prompts(before=[]), ["prompts.jsonl: no prompts"]),
    "prompts are a folder": (
        replace("recipe.toml", '"prompts.jsonl"', '"base"'),
        ["prompts = '", "base': is a folder; allowed: a file"],
    ),
    "no helpful prompts there": (
        replace("recipe.toml", '"helpful.jsonl"', '"nowhere.jsonl"'),
        ["helpful = '", "nowhere.jsonl': no such file; allowed: a file"],
    ),
    "preferences that nothing is trained on": (
        replace("recipe.toml", 'out = "out"', 'out = "out"\nhelpful_preferences = "prompts.jsonl"'),
        ["no share of the pairs is to be taken from it; give reward.helpful_ratio, above 0, or leave it out"],
    ),
    "prompt over the context": (
        prompts(LONG),
        ["stage revise: prompt 'p-long' has", f"context of {CONTEXT}", "max_prompt_tokens"],
    ),
    "helpful prompt over the context": (
        lambda f: write_lines(f / "helpful.jsonl", [LONG | {"prompt": "mend " * (CONTEXT - 7)}]),
        ["stage revise: prompt 'p-long' has", f"context of {CONTEXT}"],
    ),
    "pair over the context": (
        replace("recipe.toml", "[compare]\nmax_tokens = 5", "[compare]\nmax_tokens = 90"),
        ["stage compare: prompt 'p-"],
    ),
    "episode over the context": (
        replace("recipe.toml", "rollouts = 4\nmax_tokens = 5", "rollouts = 4\nmax_tokens = 90"),
        ["stage ppo: prompt 'p-"],
    ),
    "no id twice": (prompts(PROMPTS[0]), [f"prompts.jsonl:{len(PROMPTS) + 1}: id 'p-fence' is taken by line 1"]),
    "id in both files": (
        lambda f: write_lines(f / "helpful.jsonl", PROMPTS),
        ["'p-fence' is in both", "helpful.jsonl"],
    ),
    "constitution with an id twice": (
        replace("small.toml", 'id = "care"', 'id = "kind"'),
        ["small.toml:14: ", "principle 1 at line 8"],
    ),
    "no such constitution": (replace("recipe.toml", '"small.toml"', '"defualt"'), ["did you mean 'default'?"]),
    "no principle for the judge": (
        replace("small.toml", "sources", 'stages = ["critique"]\nsources'),
        ["stage label", "'comparison'"],
    ),
    "option that is no token": (
        lambda f: replace("base/tokenizer.json", '"A"', '"Z"')(f),
        ["stage label: option ' A'"],
    ),
    "nothing held out": (
        replace("recipe.toml", "heldout_fraction = 0.4", "heldout_fraction = 1e-9"),
        ["stage reward: reward.heldout_fraction = 1e-09 keeps 0 of 8 prompts"],
    ),
    "misspelt key": (
        replace("recipe.toml", "kl_target", "kl_taget"),
        ["recipe.toml: ppo", "did you mean 'kl_target'?"],
    ),
    "misspelt table": (replace("recipe.toml", "[reward]", "[rewards]"), ["'rewards'; did you mean 'reward'?"]),
    "out of another recipe": (other_recipe("revise"), ["out/revise", "seed is 77 there and 3 here"]),
    "out of another recipe, later": (
        other_recipe("ppo"),
        ["out/ppo", "ppo.save_every is 99 there and 2 here", "seed is 77 there and 3 here"],
    ),
    "out is a file": (write("out", ""), ["out"]),
    "device that is not there": (
        replace("recipe.toml", '"cpu"', '"cuda:63"'),
        ["device = 'cuda:63'", "'auto' or 'cpu'"],
    ),
    "device that is none": (replace("recipe.toml", '"cpu"', '"gpu"'), ["device = 'gpu'", "'cpu'"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_one_line_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, parts = HOSTILE[name]
    recipe = write_run(tmp_path)
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run_main(["run", str(recipe)], capsys)
    assert code == 2 and err.startswith("bylaw run: ") and err.count("\n") == 1 and "Traceback" not in err
    for part in parts:
        assert part in err
    assert sorted(tmp_path.rglob("*")) == before  # not even the recipe of a run that is refused


def test_missing_stage_is_named(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--out", str(whole / "fresh")]
    code, _, err = run_main(["label", str(whole / "recipe.toml"), *flags], capsys)
    assert code == 2 and "run `bylaw compare` with this recipe first" in err


def test_refusal_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As a person meets it: exit code 2 and one line on stderr, from `python -m bylaw`."""
    recipe = write_run(tmp_path)
    cut_weights(tmp_path)
    done = subprocess.run([sys.executable, "-m", "bylaw", "run", recipe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "model.safetensors: not a whole safetensors file" in done.stderr
