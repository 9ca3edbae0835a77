"""What is wrong with many files, told at once: who mends a data set wants to know all of it."""

from collections.abc import Sequence
from pathlib import Path

from epsd.types import EpsdError

SHOWN = 10
"""Files of a kind that a message names."""


def few(found: Sequence[str], mark: str = ", ") -> str:
    """The first ten, and how many there are where these are not all: `a, b, ... (23 in all)`."""
    return mark.join(found[:SHOWN]) + (f"{mark}... ({len(found):,} in all)" if len(found) > SHOWN else "")


class Faults:
    """Faults of the files of one folder or archive, by the way out of them.

    where : the folder or archive, which the message names once. kind : of the error that `check` raises.
    """

    def __init__(self, where: Path, kind: type[EpsdError]) -> None:
        self._where, self._kind = where, kind
        self._found: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, fault: object, way_out: str = "") -> None:
        """A sentence that names its file, or the error that says so. `way_out`: what would go on all the same."""
        self._found.setdefault(way_out, []).append(str(fault).removeprefix(f"{self._where}: ").rstrip("."))

    def check(self) -> None:
        """Raises the error, in one line, where there is any fault."""
        if self._found:
            told = (f"{few(faults, '; ')}. {way_out}".strip() for way_out, faults in self._found.items())
            raise self._kind(f"{self._where}: {' '.join(told)}")
