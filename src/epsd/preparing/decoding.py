"""The files of a split as evaluation will see them, decoded by threads, in order."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epsd.files.archives import ArchiveError
from epsd.files.digests import digest
from epsd.files.images import ImageError, decode, fit, pixels
from epsd.files.layouts import Files, Labelled, Reading, SourceError, Unreadable
from epsd.project.runtime import watched

_AHEAD = 256
"""Images read before the first of them must be decoded: bounds the memory."""

_WORTH_A_BAR = 2000


def image_shape(train: Labelled, reading: Reading) -> tuple[int, int, int]:
    """(C, H, W) of the first training image that can be read; of all, where they are brought to one size."""
    if isinstance(train.images, np.ndarray):
        _, channels, height, width = train.images.shape
        return channels, height, width
    if reading.size is not None:
        return 1 if reading.grayscale else 3, reading.size, reading.size
    for read in decoded(train.images, reading):
        if read.image is not None:
            channels, height, width = read.image.shape
            return channels, height, width
    raise SourceError(f"{train.images.tree.where}: no training image can be read.")


@dataclass(frozen=True)
class Read:
    """One file: place in the split, name, SHA-256 and CRC-32, and its pixels (C, H, W); None: unreadable."""

    position: int
    name: str
    digest: bytes
    crc: str
    image: NDArray[np.uint8] | None


def decoded(files: Files, reading: Reading) -> Iterator[Read]:
    """Every file as evaluation will see it, decoded by threads, in the order in which the tree gives them.

    Raises ImageError at the first damaged one and ArchiveError at the first that cannot be read, unless
    `reading.unreadable` is "skip".
    """
    place = {name: i for i, name in enumerate(files.names)}

    def read(name: str, content: bytes | None) -> Read:
        image, where = None, f"{files.tree.where}: {name}"
        if content is None:
            return Read(place[name], name, b"", "", None)
        try:
            image = pixels(fit(decode(content, where, grayscale=reading.grayscale), reading.size, reading.resize))
        except ImageError:
            if reading.unreadable == "error":
                raise
        return Read(place[name], name, hashlib.sha256(content).digest(), digest([content]), image)

    with ThreadPoolExecutor() as pool:
        waiting: list[Future[Read]] = []
        for name, content in _contents(files, reading.unreadable):
            waiting.append(pool.submit(read, name, content))
            if len(waiting) >= _AHEAD:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _contents(files: Files, unreadable: Unreadable) -> Iterator[tuple[str, bytes | None]]:
    """Name and bytes of every file, None for one that cannot be read and is to be skipped."""
    if unreadable == "error":
        yield from files.tree.read_many(files.names)
        return
    for name in files.names:
        try:
            content = files.tree.read(name)
        except ArchiveError:  # a link to nothing, somebody else's file, a damaged entry of a zip
            yield name, None
        else:
            yield name, content


def shown(reads: Iterable[Read], total: int, split: str) -> Iterable[Read]:
    """With a progress bar where it takes a while and somebody may be looking."""
    if not watched() or total < _WORTH_A_BAR:
        return reads
    from rich.console import Console
    from rich.progress import track

    return track(reads, description=f"reading {split}", total=total, console=Console(stderr=True), transient=True)
