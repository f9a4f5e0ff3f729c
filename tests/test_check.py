"""SHA256SUMS and `bylaw check`: a sound run is silent, and nothing in it can be changed, taken or added unseen."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bylaw.check import check, check_sums, report
from bylaw.cli import main
from bylaw.constitution.asked import stage_hash
from bylaw.ledger import Ledger
from bylaw.runs import Stage, output_hash, run_stage
from bylaw.sums import read_sums, write_sums

STAGES = ("revise", "finetune", "compare", "label", "reward", "ppo")
CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "longer": lambda data: data + b"\n",
    "shorter": lambda data: data[:-1],
    "other case": lambda data: data.swapcase(),
}


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run to spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_sound_run_is_silent_and_sha256sum_says_so_too(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(finished)
    assert (found.problems, found.notes) == ([], [])
    listed = {path for path in finished.rglob("[!.]*") if path.is_file() and path.name != "SHA256SUMS"}
    assert read_sums(finished).keys() == {str(path.relative_to(finished)) for path in listed}
    lines = sum(path.read_bytes().count(b"\n") for path in finished.rglob("*.jsonl"))
    assert (found.files, found.records) == (len(listed), lines)
    main(["check", str(finished)])
    assert f"{len(listed)} files and {lines} records, all as they were written" in capsys.readouterr().out
    subprocess.run(["sha256sum", "--strict", "--check", "SHA256SUMS"], cwd=finished, check=True, capture_output=True)


def test_one_changed_byte_in_any_file_is_reported(run: Path) -> None:
    files = sorted(path for path in run.rglob("*") if path.is_file())
    locks = [path for path in files if path.name in (".lock", ".SHA256SUMS.lock")]
    files = [path for path in files if path not in locks]
    assert len(files) > 40 and locks and all(path.stat().st_size == 0 for path in locks)
    for path in locks:
        path.write_text(" ")
        assert [one for one in check_sums(run) if one.startswith(f"{path.name} holds something")]
        path.write_text("")
    for path in files:
        name, whole = str(path.relative_to(run)), path.read_bytes()
        path.write_bytes(CHANGES["flipped"](whole))
        assert any(name in problem for problem in check(run).problems), name
        for how in ("longer", "shorter", "other case"):
            path.write_bytes(CHANGES[how](whole))
            assert any(name in problem for problem in check_sums(run)), (name, how)
        path.write_bytes(whole)
    assert check(run).problems == []


def test_whoever_reads_a_changed_file_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = (["trust", str(run)], ["attribution", str(run)], ["trace", str(run), "p-fence"])
    for command in commands:
        main(command)
    assert "changed" not in capsys.readouterr().err
    path = run / "label" / "preferences.jsonl"
    path.write_text(path.read_text().replace('"abstained": ""', '"abstained":  ""', 1))
    for command in commands:
        main(command)
        told = capsys.readouterr()
        assert "note: changed after they were written: label/preferences.jsonl; `bylaw check`" in told.err and told.out


def test_no_byte_of_the_sums_can_be_changed(run: Path) -> None:
    path = run / "SHA256SUMS"
    whole = path.read_bytes()
    for place in range(0, len(whole), 61):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        assert list(check_sums(run)), place
    lines = whole.splitlines(keepends=True)
    for other in (lines[1:], lines[::-1], [*lines, lines[0]], [b"\n", *lines]):
        path.write_bytes(b"".join(other))
        assert list(check_sums(run))
    path.unlink()
    assert check(run).problems[0].startswith("SHA256SUMS is gone")


def test_what_is_gone_or_nobodys_or_not_finished_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "revise" / "helpful.jsonl").unlink()
    (run / "notes \x1b[31m.txt").write_text("mine")
    (run / ".hidden").write_text("nobody's business")
    with pytest.raises(SystemExit) as end:
        main(["check", str(run)])
    said = capsys.readouterr().out
    assert end.value.code == 1 and "\x1b" not in said
    assert "wrong: revise/helpful.jsonl is gone\n" in said
    assert "wrong: notes \\x1b[31m.txt is not in SHA256SUMS" in said and "hidden" not in said
    shutil.rmtree(run / "ppo")
    (run / "ppo").mkdir()
    (run / "ppo" / "begun.json").write_text("{}")
    (run / "ppo" / "rollouts.jsonl").write_text('{"iteration"')
    write_sums(run)
    found = check(run)
    assert found.notes == ["ppo has begun and not finished: its 2 files are not checked"]
    assert not any("ppo" in problem for problem in found.problems)


def forge(run: Path) -> None:
    """Make sums and manifests true of the files as they are now."""
    made = {f"{stage}/{one}": output_hash(run / stage / one) for stage in STAGES for one in outputs(run, stage)}
    feeds = {"chains": "revise/chains.jsonl", "pairs": "compare/pairs.jsonl", "preferences": "label/preferences.jsonl"}
    for stage in STAGES:
        path = run / stage / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["outputs"] = {name: made[f"{stage}/{name}"] for name in manifest["outputs"]}
        manifest["inputs"] |= {key: made[name] for key, name in feeds.items() if key in manifest["inputs"]}
        path.write_text(json.dumps(manifest))
    (run / "SHA256SUMS").unlink()
    write_sums(run)


def outputs(run: Path, stage: str) -> list[str]:
    return list(json.loads((run / stage / "manifest.json").read_text())["outputs"])


def edit(path: Path, line: int, change: Callable[[dict[str, Any]], Any]) -> None:
    lines = path.read_text().splitlines()
    record = json.loads(lines[line])
    change(record)
    lines[line] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n")


def test_sums_that_were_forged_are_still_caught_by_the_manifests(run: Path) -> None:
    edit(run / "compare" / "pairs.jsonl", 0, lambda pair: pair["a"].update(text="other"))
    write_sums(run, "compare")
    problems = check(run).problems
    assert any(one.startswith("compare/pairs.jsonl is not what its manifest says") for one in problems)
    assert any(one.startswith("stage label was made from another compare/pairs.jsonl") for one in problems)
    (run / "constitutions" / "extra.toml").write_text((next((run / "constitutions").glob("*.toml"))).read_text())
    assert any("extra.toml: its constitution has the hash" in one for one in check(run).problems)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("compare/pairs.jsonl", lambda one: one["b"].update(text="x"), "'p-fence#0' has other texts than its pair"),
        ("compare/pairs.jsonl", lambda one: one.update(id="p#0"), "preference 'p-fence#0' is of no pair"),
        ("label/preferences.jsonl", lambda one: one["labels"][0]["principle"].update(hash="0"), "principle 'kind' (0)"),
        ("revise/chains.jsonl", lambda one: one["by"].update(constitution="beef"), "no constitutions/beef.toml"),
        ("revise/chains.jsonl", lambda one: one["prompt"][0].update(content="x"), "'p-fence' reads otherwise"),
        ("revise/chains.jsonl", lambda one: one.update(id="p"), "prompt 'p' is not in the prompt files"),
        ("revise/chains.jsonl", lambda one: one.pop("prompt"), "a record without its form (KeyError 'prompt')"),
    ],
)
def test_records_that_do_not_hold_together_are_told(
    run: Path, name: str, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    edit(run / name, 0, change)
    forge(run)
    problems = check(run).problems
    assert any(said in one for one in problems), problems
    assert not any("SHA256SUMS" in one or "manifest" in one for one in problems)


@pytest.mark.parametrize("name", ["revise/chains.jsonl", "revise/helpful.jsonl", "ppo/rollouts.jsonl"])
def test_a_record_that_stands_there_twice_is_told(run: Path, name: str) -> None:
    path = run / name
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1]]))
    forge(run)
    assert [one for one in check(run).problems if f"{name}:{len(lines) + 1}: the same record as line 2" in one]


def test_a_line_that_is_no_record_is_told_and_many_alike_are_counted(run: Path) -> None:
    path = run / "ppo" / "rollouts.jsonl"
    path.write_text("\n".join(["{", *path.read_text().splitlines()[1:-8], *["nan"] * 8]))
    forge(run)
    problems = check(run).problems
    assert len(problems) == 6 and problems[0].startswith("ppo/rollouts.jsonl:1: not JSON")
    assert problems[-1] == "ppo/rollouts.jsonl: and 5 more such"  # with the line that has no end


def test_inputs_from_outside_are_notes(run: Path, finished: Path) -> None:
    recipe = run / "recipe.toml"
    text = recipe.read_text().replace(str(finished.parent / "base"), str(run.parent / "gone"))
    recipe.write_text(text.replace("prompts.jsonl", "helpful.jsonl"))
    write_sums(run, "recipe.toml")
    found = check(run)
    assert found.problems == []
    assert {note.split(", which")[0].rsplit("/", 1)[-1] for note in found.notes} == {"gone", "helpful.jsonl"}
    assert "note: stage revise read" in report(run, found)


def test_a_run_that_was_moved_has_its_own_prompt_files_with_it(run: Path, finished: Path) -> None:
    """As the demo's, whose prompts lie in the run."""
    shutil.copy2(finished.parent / "prompts.jsonl", run / "prompts.jsonl")
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(finished.parent / "prompts.jsonl"), "/gone/prompts.jsonl"))
    write_sums(run, "recipe.toml", "prompts.jsonl")
    assert check(run).problems == check(run).notes == []
    edit(run / "revise" / "chains.jsonl", 0, lambda one: one["prompt"][0].update(content="x"))
    forge(run)
    assert any("reads otherwise in the prompt files" in one for one in check(run).problems)


def test_ppo_that_a_judge_scored_is_sound(run: Path) -> None:
    path, label = run / "ppo" / "manifest.json", json.loads((run / "label" / "manifest.json").read_text())
    manifest = json.loads(path.read_text())
    del manifest["inputs"]["reward-model"]
    judged = {"judge": label["inputs"]["judge"], "judging": "all 4 0.006"}
    asked = stage_hash(Ledger(run).constitution, "comparison", ("rating", "rating_prefix"))
    for constitution, count in ((asked, 0), ("0" * 16, 1)):
        manifest["inputs"] |= judged | {"constitution": constitution}
        path.write_text(json.dumps(manifest))
        write_sums(run, "ppo")
        found = check(run)
        assert (len(found.problems), found.notes) == (count, [])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no such folder|not a run folder"):
            check(folder)


def work(folder: Path) -> dict[str, Any]:
    (folder / "texts.jsonl").write_text('{"id": "1"}\n')
    return {}


def stage(run: Path, name: str) -> Stage:
    return Stage(name=name, folder=run / name, inputs={}, config={}, seed=1, device="cpu")


def test_sums_are_written_with_each_stage_and_mended_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("seed = 1\n")
    run_stage(stage(tmp_path, "first"), work)
    whole = (tmp_path / "SHA256SUMS").read_text()
    name = "first/texts.jsonl"
    assert f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" in whole
    assert [line.split("  ")[1] for line in whole.splitlines()] == [
        "first/begun.json", "first/manifest.json", "first/texts.jsonl", "recipe.toml",
    ]  # fmt: skip
    (tmp_path / "SHA256SUMS").write_text(whole.splitlines(keepends=True)[-1])  # killed before the sums
    run_stage(stage(tmp_path, "first"), work)
    assert (tmp_path / "SHA256SUMS").read_text() == whole


def test_a_file_that_was_spoiled_does_not_pass_for_sound_later(tmp_path: Path) -> None:
    run_stage(stage(tmp_path, "first"), work)
    (tmp_path / "first" / "begun.json").write_text("{}")
    (tmp_path / "first" / "texts.jsonl").unlink()
    run_stage(stage(tmp_path, "second"), work)
    said = list(check_sums(tmp_path))
    assert said[0].startswith("first/begun.json was changed") and said[1:] == ["first/texts.jsonl is gone"]
    shutil.rmtree(tmp_path / "first")  # to make the stage again
    run_stage(stage(tmp_path, "first"), work)
    assert list(check_sums(tmp_path)) == []


def test_sums_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  recipe.toml\nnonsense\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS:2: 'nonsense' is not a sum; .* delete it"):
        write_sums(tmp_path)


def test_odd_names_are_written_as_sha256sum_reads_them(tmp_path: Path) -> None:
    for name in ("back\\slash", "two\nlines", "sp ace  s", "né\u2028e"):
        (tmp_path / name).write_text("x")
    write_sums(tmp_path)
    assert list(check_sums(tmp_path)) == []
    subprocess.run(["sha256sum", "--strict", "--check", "SHA256SUMS"], cwd=tmp_path, check=True, capture_output=True)
