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
from epsd.files.layouts import Files, Labelled, Reading, SourceError
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
    fault = ""
    for read in decoded(train.images, reading):
        if read.image is not None:
            channels, height, width = read.image.shape
            return channels, height, width
        fault = fault or read.fault
    raise SourceError(f"{train.images.tree.where}: no training image can be read ({fault.rstrip('.')}).")


@dataclass(frozen=True)
class Read:
    """One file: place in the split, name, SHA-256 and CRC-32, and its pixels (C, H, W); None: `fault` says why not."""

    position: int
    name: str
    digest: bytes
    crc: str
    image: NDArray[np.uint8] | None
    fault: str = ""


def decoded(files: Files, reading: Reading) -> Iterator[Read]:
    """Every file as evaluation will see it, decoded by threads, in order; what is wrong with those that are damaged."""
    place = {name: i for i, name in enumerate(files.names)}

    def read(name: str, content: bytes | str) -> Read:
        where = f"{files.tree.where}: {name}"
        if isinstance(content, str):
            return Read(place[name], name, b"", "", None, content)
        try:
            image = pixels(fit(decode(content, where, grayscale=reading.grayscale), reading.size, reading.resize))
        except ImageError as error:
            return Read(place[name], name, b"", "", None, str(error))
        return Read(place[name], name, hashlib.sha256(content).digest(), digest([content]), image)

    with ThreadPoolExecutor() as pool:
        waiting: list[Future[Read]] = []
        for name, content in _contents(files):
            waiting.append(pool.submit(read, name, content))
            if len(waiting) >= _AHEAD:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _contents(files: Files) -> Iterator[tuple[str, bytes | str]]:
    """Name and bytes of every file; what is wrong with one that cannot be read."""
    for name in files.names:
        try:
            yield name, files.tree.read(name)
        except ArchiveError as error:  # a link to nothing, somebody else's file, a damaged entry of a zip
            yield name, str(error)


def shown(reads: Iterable[Read], total: int, split: str) -> Iterable[Read]:
    """With a progress bar where it takes a while and somebody may be looking."""
    if not watched() or total < _WORTH_A_BAR:
        return reads
    from rich.console import Console
    from rich.progress import track

    return track(reads, description=f"reading {split}", total=total, console=Console(stderr=True), transient=True)
