"""One process at a time in a folder: two that append to the same records would double them."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNKNOWN = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EBADF)
"""What file systems say that have no such locks: there, two have to be kept apart by hand."""


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made where there is none. The lock is the operating system's, on the folder itself: it
    leaves no file, and goes with the process however that ends. ValueError where another process holds it, or for a
    file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; allowed: a folder, or a name that is not taken")
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another bylaw is at work in {folder}; wait for its end, or stop it, and give the same command again"
            ) from None
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
        yield
    finally:
        os.close(held)
