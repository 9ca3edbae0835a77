"""Files that are in two splits, byte for byte: what was learnt is tested again."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Marks = NDArray[np.uint64]
"""(N,) one number per file: two are equal where the files are, but by a chance of 1 in 2^64."""


def mark(sha256: bytes) -> int:
    """Of a file with this SHA-256."""
    return int.from_bytes(sha256[:8], "big")


def marks(contents: Iterable[bytes | memoryview]) -> Marks:
    """(N,) of the contents."""
    return np.array([mark(hashlib.sha256(content).digest()) for content in contents], dtype=np.uint64)


def duplicates(found: Mapping[str, Marks], names: Mapping[str, Sequence[object]]) -> list[str]:
    """A few words on each pair of splits that share files, with one of them by name."""
    told = []
    for first, other in itertools.combinations(found, 2):
        again = np.flatnonzero(np.isin(found[other], found[first]))
        if len(again):
            at = int(again[0])
            twin = int(np.flatnonzero(found[first] == found[other][at])[0])
            pair = f"{names[other][at]}" + (
                f" as {names[first][twin]}" if names[first][twin] != names[other][at] else ""
            )
            told.append(f"{len(again):,} of {other} also in {first}, byte for byte ({pair})")
    return told
