"""Record files: what is on disk after writing, after a torn line, and after kill -9 in the middle of a write."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bylaw.model.records import RecordWriter, read_records, repair, sha256_file, write_atomic

RECORDS = [{"id": "a", "text": "two\nlines \u2028 and 日本"}, {"id": "b", "p": 0.1, "none": None}]


def test_records_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.jsonl"
    with RecordWriter(path) as writer:
        writer.write(RECORDS[:1])
        writer.write([])
        writer.write(iter(RECORDS[1:]))
        assert writer.count == 2
    assert read_records(path) == RECORDS
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == RECORDS and lines[-1] == b""
    assert "日本".encode() in lines[0]


def test_writing_again_appends(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    for record in RECORDS:
        with RecordWriter(path) as writer:
            writer.write([record])
    assert read_records(path) == RECORDS


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_torn_at_any_byte_is_cut(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "records.jsonl"
    whole, torn = b'{"id": "a"}\n', '{"é": 1}\n'.encode()
    path.write_bytes(whole + torn[:cut])
    last_is_whole = cut >= len(torn) - 1
    if not last_is_whole:
        with pytest.raises(ValueError, match=r"records\.jsonl:2: not JSON"):
            read_records(path)
    assert repair(path) == 1 + last_is_whole
    assert path.read_bytes() == whole + torn * last_is_whole
    with RecordWriter(path) as writer:
        writer.write([{"id": "c"}])
    assert read_records(path)[-1] == {"id": "c"}


def test_the_writer_cuts_a_torn_line_before_it_appends(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": "b')
    with RecordWriter(path) as writer:
        assert writer.count == 1
        writer.write([{"id": "b"}])
    assert read_records(path) == [{"id": "a"}, {"id": "b"}]


def test_a_file_that_is_missing_or_empty_holds_no_records(tmp_path: Path) -> None:
    assert repair(tmp_path / "absent.jsonl") == 0
    (tmp_path / "empty.jsonl").touch()
    assert repair(tmp_path / "empty.jsonl") == 0 and read_records(tmp_path / "empty.jsonl") == []
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        read_records(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("bad", [b"{]", b"", b"[1]", b'{"x": NaN}', b"\xff{}", b'{"x": "\\ud800"}', b"[" * 100_000])
def test_a_broken_line_inside_is_an_error_and_nothing_is_cut(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "records.jsonl"
    for content in (b'{"a": 1}\n' + bad + b'\n{"b": 2}\n', b'{"a": 1}\n' + bad + b"\n"):
        path.write_bytes(content)
        for reader in (read_records, repair):
            with pytest.raises(ValueError, match=r"records\.jsonl:2: "):
                reader(path)
        assert path.read_bytes() == content


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": float("inf")}, {"x": "\ud800"}])
def test_a_record_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, bad: dict) -> None:
    path = tmp_path / "records.jsonl"
    with RecordWriter(path) as writer:
        writer.write([{"ok": 1}])
        with pytest.raises(ValueError, match=r"records\.jsonl, record 3"):
            writer.write([{"ok": 2}, bad])
        assert writer.count == 1
    assert read_records(path) == [{"ok": 1}]


WRITE_FOR_EVER = """
import itertools, sys
from bylaw.model.records import RecordWriter
with RecordWriter(sys.argv[1]) as writer:
    for n in itertools.count(writer.count):
        writer.write([{"n": n, "text": "x" * 200_000}])
"""


def test_kill_in_mid_write_loses_and_doubles_nothing(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    for _ in range(3):
        before = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(path)])
        try:
            deadline = time.monotonic() + 60
            while (not path.exists() or path.stat().st_size <= before + 500_000) and time.monotonic() < deadline:
                time.sleep(0.001)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = repair(path)
        assert [record["n"] for record in read_records(path)] == list(range(kept))
    assert kept >= 6


def test_an_atomic_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "manifest.json"
    write_atomic(path, "old\r\n日本")
    assert path.read_bytes() == "old\r\n日本".encode()
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_bytes() == "old\r\n日本".encode()
    write_atomic(path, "new")
    assert path.read_text() == "new" and [file.name for file in path.parent.iterdir()] == ["manifest.json"]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
