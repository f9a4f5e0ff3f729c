"""One process at a time in a folder: two that append to the same records would double them."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
_UNKNOWN = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)
"""What file systems say that have no such locks."""


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made where there is none, alone. ValueError where another process holds it, or for what
    is no folder.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is a file, or a link that leads nowhere; allowed: a folder, or a name not taken")
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB):
        yield


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Wait until no other process changes `file`, and hold it meanwhile."""
    with _held(file.with_name(f".{file.name}.lock"), fcntl.LOCK_EX):
        yield


@contextmanager
def _held(path: Path, how: int) -> Iterator[None]:
    """Hold the operating system's lock of an empty hidden file, which stays. The lock goes with the process, however
    that ends. A folder's own would be refused by NFS, where only a file opened for writing is locked.
    """
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(held, how)
        except BlockingIOError:
            raise ValueError(
                f"another bylaw is at work in {path.parent}; wait for its end, or stop it, and give the same command "
                "again"
            ) from None
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
            print(f"{path.parent}: its file system has no locks; let no other bylaw work there", file=sys.stderr)
        yield
        fcntl.flock(held, fcntl.LOCK_UN)  # a child that was forked meanwhile would go on holding it
    finally:
        os.close(held)
