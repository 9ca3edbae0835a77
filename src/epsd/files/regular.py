"""Regular files only: a FIFO would be waited for, and a device read, for ever."""

import contextlib
import errno
import stat
from collections.abc import Iterator
from pathlib import Path

from epsd.types import EpsdError

LARGEST = 1 << 31
"""Bytes of one file or archive entry that is read as a whole. No image, list or pickle of a data set comes near."""


def check_regular(path: Path) -> Path:
    """`path` itself. Raises OSError where it, or what its links lead to, is missing or anything but a regular file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "no regular file")
    return path


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises OSError: missing, unreadable, no regular file, too large."""
    if (size := check_regular(path).stat().st_size) > LARGEST:
        raise OSError(errno.EFBIG, too_large(size))
    return path.read_bytes()


@contextlib.contextmanager
def refused(kind: type[EpsdError], path: object, what: str = "written") -> Iterator[None]:
    """What the file system refuses, as an error of this kind: `PATH: cannot be written (why).`"""
    try:
        yield
    except OSError as error:
        raise kind(f"{path}: cannot be {what} ({error.strerror or error}).") from None


def too_large(size: int) -> str:
    """What is wrong with `size` bytes."""
    return f"{size / 2**30:.1f} GiB; at most {LARGEST / 2**30:g} are read"
