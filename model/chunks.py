"""Record stages in chunks, which many ranks share and a killed run picks up."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from bylaw.model.engine.ranks import pull
from bylaw.model.parallel import ALONE, Parallel
from bylaw.model.records import Record, RecordWriter, encode_record, read_records, repair, write_atomic

Item = TypeVar("Item")
Work = Callable[[Sequence[Item]], list[Record]]


def write_chunks(
    path: Path, items: Sequence[Item], size: int, work: Work[Item], label: str, parallel: Parallel = ALONE
) -> int:
    """Turn `items` into records, one each and in order, `size` at a time, appended to `path`; returns their number.

    A file cut short by a kill is completed: its torn line is mended, and the chunk that it ended in is made again,
    whole, so that every batch has the same rows as in a run that was not killed. Data ranks share out the chunks, not
    the rows of one: the records are those of one process. Raises ValueError for a file that holds more records than
    there are items.
    """
    if not parallel.alone:
        _make_apart(path, items, size, work, label, parallel)
    count = _append(path, items, size, work, label, bar=parallel.alone) if parallel.first else 0
    return parallel.tell(count)


def _append(path: Path, items: Sequence[Item], size: int, work: Work[Item], label: str, bar: bool) -> int:
    """Complete the file, with the chunks that were made apart where there are such."""
    with (
        RecordWriter(path) as writer,
        tqdm(total=len(items), initial=writer.count, desc=label, unit="record", disable=not bar) as progress,
    ):
        _check_count(path, writer.count, len(items))
        for start, chunk in _chunks(items, size):
            apart = _apart(path, start)
            if start + len(chunk) > writer.count:
                fresh = read_records(apart) if apart.exists() else work(chunk)
                if len(fresh) != len(chunk):
                    raise ValueError(f"{apart} holds {len(fresh)} records of {len(chunk)}; delete it to make it anew")
                fresh = fresh[max(0, writer.count - start) :]
                writer.write(fresh)
                progress.update(len(fresh))
            apart.unlink(missing_ok=True)
        for torn in path.parent.glob(f"..{path.name}.*.tmp"):  # of a chunk that was written when its rank was killed
            torn.unlink()
        return writer.count


def _make_apart(path: Path, items: Sequence[Item], size: int, work: Work[Item], label: str, parallel: Parallel) -> None:
    """The chunks that are missing, each in a file of its own beside `path`, made by whichever data rank is free."""
    count = parallel.tell(repair(path) if parallel.first else 0)
    _check_count(path, count, len(items))
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = dict(_chunks(items, size))
    missing = parallel.tell(
        [start for start in chunks if start + len(chunks[start]) > count and not _apart(path, start).exists()]
    )
    with tqdm(total=len(items), initial=count, desc=label, unit="record", disable=not parallel.first) as progress:
        for taken in pull(len(missing), parallel):
            start, chunk = missing[taken], chunks[missing[taken]]
            fresh = work(chunk)
            if parallel.tensor_rank == 0:
                place = _apart(path, start)
                write_atomic(place, "".join(encode_record(one, str(place)).decode() for one in fresh))
            progress.update(start + len(chunk) - progress.n)  # those before are done, or in other ranks' hands
    parallel.meet()


def _chunks(items: Sequence[Item], size: int) -> Iterator[tuple[int, Sequence[Item]]]:
    return ((start, items[start : start + size]) for start in range(0, len(items), size))


def _apart(path: Path, start: int) -> Path:
    """Where a rank puts the chunk of the items from `start` on."""
    return path.with_name(f".{path.name}.{start}")


def _check_count(path: Path, count: int, items: int) -> None:
    if count > items:
        raise ValueError(f"{path} holds {count} records, but this stage makes {items}; is it another run's?")
