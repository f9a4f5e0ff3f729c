"""The reward model on dialogues, in small: what its record says, and what it refuses."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bylaw.benchmarks.real_reward import Config, main, read_dialogues

ROOT = Path(__file__).parents[2]


def line(n: int, chosen: str = "", rejected: str = "") -> dict[str, str]:
    begin = f"\n\nHuman: how do i mend gate {n} ?\n\nAssistant:"
    chosen, rejected = chosen or f" with wood and {n} nails .", rejected or f" no . {'never ' * (n % 7)}"
    return {"chosen": begin + chosen, "rejected": begin + rejected}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(one) + "\n" for one in lines)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    return path


def test_program(tmp_path: Path) -> None:
    """As a person runs it. The record has the data's name, not where it lies."""
    data = write(tmp_path / "dialogues.jsonl.gz", [line(n) for n in range(40)])
    flags = ["--data", data, "--quick", "--batch-size", "4", "--micro-batch-tokens", "90", "--vocabulary", "300"]
    program = [sys.executable, "benchmarks/real_reward.py", *flags, "--out", "out.jsonl"]
    program[-1] = str(tmp_path / "out.jsonl")
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (text,) = (tmp_path / "out.jsonl").read_text().splitlines()
    record = json.loads(text)
    assert record["steps"] == 4 and record["train_pairs"] == 16 and record["lines"] == record["pairs"] == 40
    assert 0.5 < record["packing_efficiency"] <= 1 and 0 < record["saved_by_shared_prompts"] < 0.5
    assert record["budget_filled"] <= record["budget_filled_at_once"] <= 1
    assert record["tokens_per_second"] > record["pairs_per_second"] > 0 and record["micro_batches"] >= 8
    assert 0 <= record["heldout_accuracy"] <= 1 and record["heldout_reliability"]
    assert {"versions", "commit", "date", "load", "device"} <= record.keys()
    assert "--data dialogues.jsonl.gz" in record["command"]


def test_lines_that_make_no_pair_are_counted(tmp_path: Path) -> None:
    lines = [line(1), line(2, rejected=" "), line(3, chosen=" "), {"chosen": "no turn", "rejected": "none"}, line(5)]
    pairs, counts = read_dialogues(write(tmp_path / "d.jsonl", lines))
    assert counts == {"lines": 5, "pairs": 2}
    assert list(pairs.values()) == [tuple(line(n).values()) for n in (1, 5)]


def test_too_few_pairs_and_other_files_are_refused(tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", [line(n) for n in range(9)])
    with pytest.raises(ValueError, match=r"at least steps x batch_size = 40, and one"):
        main(Config(data=few, quick=True, vocabulary=300))
    other = write(tmp_path / "other.jsonl", [{"prompt": "x"}])
    with pytest.raises(ValueError, match=r"chosen and rejected, as in hh-rlhf"):
        main(Config(data=other, quick=True))
