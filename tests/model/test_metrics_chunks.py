"""Files that a killed stage leaves: metrics go on as one curve, records are completed to the bytes of an uncut run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bylaw.model.chunks import write_chunks
from bylaw.model.metrics import Metrics
from bylaw.model.records import Record, read_records


def log(path: Path, steps: range, first_step: int = 0, run: str = "a") -> None:
    with Metrics(path, "stage", 10, first_step) as metrics:
        for step in steps:
            metrics.log(step, {"loss": 1 / (step + 1), "run": ord(run)}, {"loss": 1 / (step + 1)})


def curve(path: Path) -> list[tuple[int, str]]:
    return [(record["step"], chr(record["run"])) for record in read_records(path)]


def test_a_step_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(tmp_path / "metrics.jsonl", range(3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "loss": 1.0, "run": 97}, {"step": 1, "loss": 0.5, "run": 97}, {"step": 2, "loss": 1 / 3, "run": 97}
    ]  # fmt: skip
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in shown[::2]] == [
        ["stage", "1/10", "loss", "1"], ["stage", "3/10", "loss", "0.3333"]
    ]  # fmt: skip
    assert all(line.endswith("0:00 left") for line in shown)


@pytest.mark.parametrize("torn", ["", '{"step": 7, "lo', '{"step": 7, "loss": 0.1, "run": 97}'])
def test_the_curve_goes_on_where_the_state_was_saved(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, range(7))
    with path.open("a") as file:
        file.write(torn)
    log(path, range(4, 10), first_step=4, run="b")
    assert curve(path) == [(n, "a") for n in range(4)] + [(n, "b") for n in range(4, 10)]


def test_a_stage_begun_anew_begins_a_new_curve(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, range(7))
    log(path, range(2), run="b")
    assert curve(path) == [(0, "b"), (1, "b")]


def test_a_broken_line_in_the_middle_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        Metrics(path, "stage", 10, 2)
    assert path.read_text() == '{"step": 0}\n{"st\n{"step": 2}\n'


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with Metrics(tmp_path / "metrics.jsonl", "stage", 10) as metrics, pytest.raises(ValueError, match="strict JSON"):
        metrics.log(0, {"loss": float("nan")}, {})
    assert read_records(tmp_path / "metrics.jsonl") == []


ITEMS = ["mend", "é", "a\nb", "日", "", "x", "last"]


class Work:
    """Records that say what their batch began with."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, items: Sequence[str]) -> list[Record]:
        self.batches.append(list(items))
        return [{"text": item, "of": items[0]} for item in items]


def chunks(path: Path, items: Sequence[str] = ITEMS, size: int = 3) -> list[list[str]]:
    work = Work()
    assert write_chunks(path, items, size, work, "records") == len(items)
    return work.batches


def test_items_become_records_in_order(tmp_path: Path) -> None:
    batches = [ITEMS[:3], ITEMS[3:6], ITEMS[6:]]
    assert chunks(tmp_path / "records.jsonl") == batches
    records = read_records(tmp_path / "records.jsonl")
    assert [record["text"] for record in records] == ITEMS
    assert chunks(tmp_path / "records.jsonl") == [], "a whole file is left alone"
    assert read_records(tmp_path / "records.jsonl") == records


def test_a_file_cut_at_any_byte_is_completed_to_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    chunks(path)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        batches = chunks(path)
        assert path.read_bytes() == whole, f"cut at byte {cut}"
        assert batches == [ITEMS[:3], ITEMS[3:6], ITEMS[6:]][3 - len(batches) :]


@pytest.mark.parametrize("torn", [False, True])
def test_the_chunk_that_a_file_ends_in_is_made_again_whole(tmp_path: Path, torn: bool) -> None:
    path = tmp_path / "records.jsonl"
    chunks(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + (lines[4][:10] if torn else b""))
    assert chunks(path) == [ITEMS[3:6], ITEMS[6:]]
    assert path.read_bytes() == whole


def test_a_kill_between_chunks_loses_no_chunk(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    made: list[list[str]] = []

    def work(items: Sequence[str]) -> list[Record]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(list(items))
        return Work()(items)

    with pytest.raises(KeyboardInterrupt):
        write_chunks(path, ITEMS, 3, work, "records")
    assert [record["text"] for record in read_records(path)] == ITEMS[:6]
    assert chunks(path) == [ITEMS[6:]]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_any_size_of_chunk(tmp_path: Path, size: int) -> None:
    assert [len(batch) for batch in chunks(tmp_path / "records.jsonl", size=size)] == {
        1: [1] * 7, 2: [2, 2, 2, 1], 7: [7], 100: [7]
    }[size]  # fmt: skip


def test_more_records_than_items_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    chunks(path)
    whole, work = path.read_bytes(), Work()
    with pytest.raises(ValueError, match=r"records\.jsonl holds 7 records, but this stage makes 6"):
        write_chunks(path, ITEMS[:6], 3, work, "records")
    assert path.read_bytes() == whole and not work.batches


def test_no_items(tmp_path: Path) -> None:
    empty: list[Any] = []
    assert chunks(tmp_path / "records.jsonl", empty) == []
    assert read_records(tmp_path / "records.jsonl") == []


def test_chunks_that_ranks_left_apart_are_taken_over(tmp_path: Path) -> None:
    """Of a run on many ranks that was killed: the second chunk is there, the first is not, and one is half written."""
    path = tmp_path / "records.jsonl"
    chunks(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / ".records.jsonl.3").write_bytes(b"".join(lines[3:6]))
    (tmp_path / "..records.jsonl.6.tmp").write_bytes(lines[6][:5])
    for kept in (0, 2, 4, 6):  # records in the file; those of a chunk that stands apart too are not doubled
        path.write_bytes(b"".join(lines[:kept]))
        (tmp_path / ".records.jsonl.3").write_bytes(b"".join(lines[3:6]))
        assert chunks(path) == ([ITEMS[:3], ITEMS[6:]] if kept < 3 else [ITEMS[6:]])
        assert path.read_bytes() == whole
        assert [left.name for left in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_chunk_apart_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    apart = tmp_path / ".records.jsonl.0"
    apart.write_text('{"text": "mend"}\n')
    with pytest.raises(ValueError, match=r"\.records\.jsonl\.0 holds 1 records of 3; delete it"):
        write_chunks(tmp_path / "records.jsonl", ITEMS, 3, Work(), "records")
