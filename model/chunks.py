"""Record stages in chunks that a killed run picks up."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from bylaw.model.records import Record, RecordWriter

Item = TypeVar("Item")


def write_chunks(
    path: Path, items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], list[Record]], label: str
) -> int:
    """Turn `items` into records, one each and in order, `size` at a time, appended to `path`; returns their number.

    A file cut short by a kill is completed: its torn line is mended, and the chunk that it ended in is made again,
    whole, so that every batch has the same rows as in a run that was not killed. Raises ValueError for a file that
    holds more records than there are items.
    """
    with RecordWriter(path) as writer, tqdm(total=len(items), initial=writer.count, desc=label, unit="record") as bar:
        if writer.count > len(items):
            raise ValueError(
                f"{path} holds {writer.count} records, but this stage makes {len(items)}; is it another run's?"
            )
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            if start + len(chunk) <= writer.count:
                continue
            fresh = work(chunk)
            assert len(fresh) == len(chunk)
            fresh = fresh[max(0, writer.count - start) :]
            writer.write(fresh)
            bar.update(len(fresh))
        return writer.count
