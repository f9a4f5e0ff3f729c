"""SHA256SUMS of a run folder: the hash that each file had when it was written, in the form of `sha256sum`."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from bylaw.layout import AMENDMENTS, BEGUN, BEHAVIOUR, JUDGED, MANIFEST, STATE, SUMS, begun_beside
from bylaw.lock import in_turn
from bylaw.model.records import sha256_file, write_atomic
from bylaw.recipe import EVERY_STAGE

TEXTS = (".jsonl", ".json", ".toml")
_LINE = re.compile(r"(\\?)([0-9a-f]{64})  (.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # those of GNU coreutils: a line that has some begins with \


def write_sums(run: Path, *written: str, lacking: Collection[str] = ()) -> None:
    """Bring SHA256SUMS up to date. `written` names the files and folders in `run` that the caller has just written;
    `lacking` those that it vouches for, in case a kill came before their lines.

    Those are hashed, and nothing else: hashed anew, a file that was spoiled since, or that somebody put there, would
    pass for sound, and large checkpoints would be read after every stage. Lines of a folder that is gone, or begun
    anew, go with it. A run without a SHA256SUMS has all its files taken as they are. The file is left alone when it
    would not change.

    Processes that write to one run take turns. Raises ValueError for a SHA256SUMS that cannot be read.
    """
    with in_turn(run / SUMS):
        _write_sums(run, written, lacking)


def _write_sums(run: Path, written: Sequence[str], lacking: Collection[str]) -> None:
    dropped = [*written, *unfinished(run)]
    old = {name: hash for name, hash in read_sums(run).items() if not _within(name, dropped)}
    # A file that is gone from a folder that is there keeps its line, so that it is missed.
    closed = {name: hash for name, hash in old.items() if "/" not in name or (run / _folder_of(name)).exists()}
    everything = not (run / SUMS).exists()
    missing = [name for name in lacking if name not in closed]
    wanted = [name for name in files_of(run) if everything or _within(name, [*written, *missing])]
    text = render_sums(closed | {name: sha256_file(run / name) for name in wanted})
    if everything or (run / SUMS).read_bytes() != text.encode():
        write_atomic(run / SUMS, text)


def write_sums_within(run: Path, place: Path) -> None:
    """`write_sums` of a file or folder that was written, if it lies in the run and the run has sums. Without any, sums
    made now would vouch for files that nobody has checked.
    """
    whole, part = run.resolve(), place.resolve()
    if part.is_relative_to(whole) and (run / SUMS).exists():
        write_sums(run, part.relative_to(whole).as_posix())


def read_sums(run: Path) -> dict[str, str]:
    """Hash by file name, relative to `run`; empty without a SHA256SUMS. ValueError naming the line that is no sum."""
    if not (run / SUMS).exists():
        return {}
    sums = {}
    text = (run / SUMS).read_bytes().decode("utf-8", "replace")
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{run / SUMS}:{number}: {line[:100]!r} is not a sum; put the file back as it was, or delete it to "
                "take all files of the run as they are now"
            )
        sums[_unescaped(match[3]) if match[1] else match[3]] = match[2]
    return sums


def altered(run: Path) -> list[str]:
    """Files of texts and figures that are gone, or are not what their hash says, and a SHA256SUMS that cannot be read.
    Those of checkpoints are not looked at.
    """
    try:
        sums = read_sums(run)
    except ValueError:
        return [SUMS]
    still_open = unfinished(run)
    names = [name for name in sums if Path(name).suffix in TEXTS and not _within(name, still_open)]
    # A folder that is gone as a whole is one that is to be made again.
    names = [name for name in names if "/" not in name or (run / _folder_of(name)).exists()]
    return [name for name in names if not (run / name).is_file() or sha256_file(run / name) != sums[name]]


def render_sums(sums: Mapping[str, str]) -> str:
    """The text of a SHA256SUMS: one line a file, in the order of their names."""
    return "".join(_line(name, sums[name]) for name in sorted(sums))


def files_of(run: Path) -> list[str]:
    """The files that SHA256SUMS covers, as names relative to `run`: all but itself, hidden ones, and those of what has
    not finished.
    """
    still_open = unfinished(run)
    return [name for name in _all_files(run) if not _within(name, still_open)]


def unfinished(run: Path) -> list[str]:
    """The folders of stages, evaluations, judgements and amendments that have begun and not finished."""
    begun = [name for name in EVERY_STAGE if (run / name / BEGUN).exists()]
    return [name for name in begun if not (run / name / MANIFEST).exists()] + begun_beside(run)


def open_files(run: Path) -> list[str]:
    """The files of what has not finished."""
    still_open = unfinished(run)
    return [name for name in _all_files(run) if _within(name, still_open)]


def links_of(run: Path) -> list[str]:
    """Links to folders, and links that lead nowhere: what they lead to is no part of a run."""
    found = [path for folder, folders, files in _walk(run) for path in (Path(folder, one) for one in folders + files)]
    return sorted(path.relative_to(run).as_posix() for path in found if path.is_symlink() and not path.is_file())


def _all_files(run: Path) -> list[str]:
    paths = [Path(folder, name) for folder, _, files in _walk(run) for name in files]
    names = [path.relative_to(run).as_posix() for path in paths if path.is_file()]
    return sorted(name for name in names if name != SUMS)


def _walk(run: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folders with their folders and files, without what is hidden and without the training state of a stage that is
    at work.
    """
    for folder, folders, files in os.walk(run):
        skipped = {STATE} if BEGUN in files and MANIFEST not in files else set()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        yield folder, folders, [name for name in files if not name.startswith(".")]


def _folder_of(name: str) -> str:
    """What is taken out of a run as a whole: a stage, or an evaluation, a judgement or an amendment."""
    top, *rest = name.split("/")
    return f"{top}/{rest[0]}" if top in (BEHAVIOUR, JUDGED, AMENDMENTS) and len(rest) > 1 else top


def _within(name: str, places: Collection[str]) -> bool:
    return any(name == place or name.startswith(f"{place}/") for place in places)


def _line(name: str, hash: str) -> str:
    escaped = "".join(_ESCAPES.get(letter, letter) for letter in name)
    return f"{'' if escaped == name else chr(92)}{hash}  {escaped}\n"


def _unescaped(name: str) -> str:
    letters = {escaped[1]: letter for letter, escaped in _ESCAPES.items()}
    return re.sub(r"\\(.)", lambda found: letters.get(found[1], found[0]), name)
