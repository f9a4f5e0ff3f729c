"""Commands that read and write the formats of others."""

import json
from pathlib import Path

import pytest

from bylaw.cli import main
from bylaw.constitution.load import load_constitution
from bylaw.constitution.released_texts import read_chains
from bylaw.constitution.write import dump_constitution
from bylaw.model.records import read_records

CRITIQUES = {
    "kind0": {
        "prompt": ["\n\nCritiqueRequest: Is it kind?\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Be kind.\n\nRevision:",
    }
}
STEP = {"critique": {"sample": " No."}, "revision": {"sample": " Hi."}}
SAMPLE = {
    "rl_prompt": "\n\nHuman: Hello.\n\nAssistant:",
    "initial_response": [{"sample": " Go."}],
    "cst": [{"cst_key": "kind0", "cst_value": CRITIQUES["kind0"]} | STEP],
}


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_constitution_import_diff_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    theirs, ours, back = tmp_path / "theirs.json", tmp_path / "ours.toml", tmp_path / "back.json"
    theirs.write_text(json.dumps(CRITIQUES))
    main(["constitution", "import", str(theirs), "--out", str(ours)])
    assert "1 principles, critique and revision requests" in capsys.readouterr().out
    assert load_constitution(ours).principles[0].id == "kind0"
    main(["constitution", "export", str(ours), "--format", "anthropic-critiques", "--out", str(back)])
    assert json.loads(back.read_text()) == CRITIQUES
    assert "the form holds ids and requests: no titles" in capsys.readouterr().out
    main(["constitution", "import", str(theirs)])
    assert capsys.readouterr().out == ours.read_text(), "without --out, the text alone is on stdout"
    main(["constitution", "diff", "default", str(ours)])
    assert "added  kind0: Is it kind?\n" in capsys.readouterr().out
    assert "exists; name another file" in refused(["constitution", "import", str(theirs), "--out", str(ours)], capsys)
    assert "no principle for the stage 'comparison'" in refused(
        ["constitution", "export", str(ours), "--format", "anthropic-comparisons"], capsys
    )


def test_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    theirs = tmp_path / "few.json"
    theirs.write_text(
        json.dumps([{"prompt": "Human: Hi\n\nAssistant:", "corrects": ["Hello."], "incorrects": ["Go."]}])
    )
    main(["constitution", "examples", str(theirs), "--for", "default"])
    assert capsys.readouterr().out.startswith('[[comparison]]\nprompt = "Hi"\n')


def test_chains_and_labels_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    theirs, run = tmp_path / "X_SLMADISON.jsonl", tmp_path / "run"
    theirs.write_text(json.dumps(SAMPLE) + "\n")
    main(["import", str(theirs), "--out", str(run / "revise" / "chains.jsonl")])
    assert "X_SLMADISON.jsonl holds chains; leave it out" in refused(["import", str(theirs), "--soft", "0.9"], capsys)
    (chain,) = read_records(run / "revise" / "chains.jsonl")
    constitution = read_chains(theirs)[1].constitution
    assert chain["rounds"][0]["principle"] == {"id": "kind0", "hash": constitution.principles[0].hash}
    rows = tmp_path / "rows.jsonl"
    main(["export", str(run), "--format", "revisions", "--out", str(rows)])
    unfinished = "the stage revise has not finished here: these are the first 1 of its records"
    assert unfinished in capsys.readouterr().out
    (run / "revise" / "manifest.json").write_text("{}")
    main(["export", str(run), "--format", "revisions", "--out", str(tmp_path / "again")])
    assert "not finished" not in capsys.readouterr().out
    rows.write_text("\n" + rows.read_text())  # as some editors leave files
    assert read_records(tmp_path / "again")[0]["chosen"] == [{"role": "assistant", "content": "Hi."}]
    main(["import", str(rows), "--out", str(run / "label" / "preferences.jsonl"), "--soft", "0.75"])
    (label,) = read_records(run / "label" / "preferences.jsonl")
    assert (label["a"]["text"], label["b"]["text"], label["p_a"]) == ("Hi.", "Go.", 0.75)
    for form, columns in (("trl-preference", str), ("trl-conversational", list)):
        main(["export", str(run), "--format", form, "--out", str(tmp_path / form)])
        (row,) = read_records(tmp_path / form)
        assert isinstance(row["prompt"], columns) and isinstance(row["chosen"], columns) and row["p_chosen"] == 0.75
    main(["export", str(run), "--format", "trl-unpaired", "--out", str(tmp_path / "unpaired")])
    assert [row["label"] for row in read_records(tmp_path / "unpaired")] == [True, False]
    main(["export", str(run), "--format", "trl-prompt-completion", "--out", str(tmp_path / "completions")])
    assert read_records(tmp_path / "completions")[0]["completion"] == [{"role": "assistant", "content": "Hi."}]

    chain["by"]["constitution"] = constitution.hash
    empty = chain | {"id": "empty", "answer": {"text": ""}}
    (run / "revise" / "chains.jsonl").write_text(json.dumps(chain) + "\n" + json.dumps(empty) + "\n")
    (run / "constitutions").mkdir()
    (run / "constitutions" / f"{constitution.hash}.toml").write_text(dump_constitution(constitution))
    main(["export", str(run), "--format", "anthropic-chains", "--out", str(tmp_path / "again.jsonl")])
    assert read_records(tmp_path / "again.jsonl") == [SAMPLE]
    assert "1 chains\n1 left out: an empty answer, critique or revision\n" in capsys.readouterr().out
    bare = chain | {"rounds": [chain["rounds"][0] | {"critique": None}]}
    (run / "revise" / "chains.jsonl").write_text(json.dumps(bare) + "\n")
    args = ["export", str(run), "--format", "anthropic-chains", "--out", str(tmp_path / "bare.jsonl")]
    assert "has no critique (revise.critiques = false)" in refused(args, capsys)
    assert "`bylaw label` writes it" in refused(["export", str(tmp_path), "--out", str(tmp_path / "x")], capsys)
    assert "nix.jsonl: no such file" in refused(["import", str(tmp_path / "nix.jsonl")], capsys)
