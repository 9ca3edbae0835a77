"""Files that are there twice, byte for byte. In two splits: what was learnt is tested again."""

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
    """A few words on each pair of splits that share files, and on each split that has some twice, with one by name."""
    told = []
    for first, other in itertools.combinations(found, 2):
        again = np.flatnonzero(np.isin(found[other], found[first]))
        if len(again):
            twin = int(np.flatnonzero(found[first] == found[other][again[0]])[0])
            pair = _pair(names[other][again[0]], names[first][twin])
            told.append(f"{len(again):,} of {other} also in {first}, byte for byte ({pair})")
    for split, every in found.items():
        once = np.unique(every, return_index=True)[1]
        if extra := len(every) - len(once):
            second = int(np.setdiff1d(np.arange(len(every)), once)[0])
            pair = _pair(names[split][second], names[split][int(np.flatnonzero(every == every[second])[0])])
            told.append(f"{extra:,} of {split} there twice, byte for byte ({pair})")
    return told


def _pair(name: object, twin: object) -> str:
    return f"{name}" if name == twin else f"{name} as {twin}"
