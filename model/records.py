"""Record files: append-only JSONL that survives `kill -9`, files that appear whole or not at all, and hashes."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

Record = dict[str, Any]


class RecordWriter:
    """Appends records to a JSONL file, one JSON object per line, UTF-8.

    Entering first mends the file (`repair`), so that a new record never continues a torn line; `count` is the number
    of records that stand in the file, before and after each `write`.

    Raises ValueError (on entering) for a broken line that is not the last, naming file and line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.count = 0

    def __enter__(self) -> "RecordWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.count = repair(self.path)
        self._file = self.path.open("ab")
        _sync_folder(self.path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, records: Iterable[Record]) -> None:
        """Append whole lines and return once they are on disk (one flush and fsync per call).

        Raises ValueError or TypeError, with nothing written, for a record that strict JSON cannot hold (NaN, infinity,
        a lone surrogate, a tensor).
        """
        lines = [encode_record(record, f"{self.path}, record {self.count + n}") for n, record in enumerate(records, 1)]
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.count += len(lines)


def encode_record(record: Record, where: str) -> bytes:
    """One JSON line with its newline. Raises ValueError naming `where` for NaN, infinity and lone surrogates."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except ValueError as error:
        raise ValueError(
            f"{where}: cannot be written as strict JSON ({error}); allowed: finite numbers and text"
        ) from error


def decode_record(line: bytes, where: str) -> Record:
    """The JSON object in a line (or a whole small file).

    Raises ValueError naming `where` for anything else, and for what `encode_record` refuses.
    """
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\ud" in line.lower():  # an escape can spell half a character, which no file or tokenizer takes
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        start = line[:60].decode("utf-8", "replace").rstrip()
        raise ValueError(f"{where}: not JSON ({error}); it begins {start!r}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON {type(record).__name__}; allowed: one JSON object {{...}}")
    return record


def read_records(path: str | Path) -> list[Record]:
    """All records of a finished file.

    Raises FileNotFoundError, or ValueError naming file and line for a broken one. A torn last line is broken too: its
    writer was killed, and the stage that writes the file completes it when run again.
    """
    return [decode_record(line, f"{path}:{number}") for number, line in numbered_lines(path)]


def read_object(path: Path) -> Record:
    """The JSON object in a small file, as config.json is. Raises ValueError naming the file for anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: a JSON {type(fields).__name__}; allowed: one object")
    return fields


def repair(path: str | Path) -> int:
    """Cut the torn last line that a killed writer left, and return how many whole records stand in the file.

    A line is torn when it lacks its newline and is not whole JSON; one that lacks only the newline gets it. A missing
    file holds 0 records. Raises ValueError naming file and line for a broken line that does end in a newline: no
    killed writer leaves one, so it is not cut.
    """
    path = Path(path)
    if not path.exists():
        return 0
    count, keep, last = 0, 0, b""
    for number, last in numbered_lines(path):
        try:
            decode_record(last, f"{path}:{number}")
        except ValueError:
            if last.endswith(b"\n"):
                raise
            break
        count, keep = number, keep + len(last)
    whole = keep == path.stat().st_size
    if not whole or (last and not last.endswith(b"\n")):
        _mend_end(path, keep, newline=whole)
    return count


def numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The file's lines with their numbers from 1, split at \\n alone (str.splitlines would cut at U+2028 in a text)."""
    with Path(path).open("rb") as file:
        yield from enumerate(file, 1)


def written_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """`numbered_lines` without blank ones: of files that people write, which often end with one."""
    return ((number, line) for number, line in numbered_lines(path) if line.strip())


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text file, UTF-8, that is seen either as it was or whole: written beside its place, synced, renamed.
    Raises IsADirectoryError for a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; allowed: the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as file:
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    _sync_folder(path.parent)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mend_end(path: Path, keep: int, newline: bool) -> None:
    with path.open("r+b") as file:
        file.truncate(keep)
        if newline:
            file.seek(keep)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Sync a folder: a new name is on disk only then. Some network file systems have no such call, and need none."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
