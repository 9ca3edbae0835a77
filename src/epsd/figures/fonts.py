"""Which font has the letters of a text: DejaVu Sans, which comes with matplotlib, else one that is installed.

matplotlib is asked for installed fonts only where DejaVu Sans lacks a letter, and imported for nothing else.
"""

import contextlib
import functools
import importlib.util
import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

FAMILY = "DejaVu Sans"
FONTS_ASKED = 300
"""Installed fonts that are looked into, at most."""
BOXES_ONLY = "Last Resort"
"""A font that comes with matplotlib: it has every letter, as a box that tells its script."""
LACKING = "□"
"""Stands for a letter that no font here has."""
LONGEST = 24
"""Letters of a name, at most (wide ones count twice); what is left out is marked."""


_REGULAR = (400, "normal", "regular", "book")


@functools.cache
def own() -> Path:
    """The file of DejaVu Sans."""
    home = Path(str(importlib.util.find_spec("matplotlib").origin)).parent  # type: ignore[union-attr]
    return home / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def letters(path: Path) -> frozenset[int]:
    """The code points that a font has; none where it cannot be read."""
    from fontTools.ttLib import TTFont

    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            return frozenset(font.getBestCmap() or {})
    except Exception:  # fontTools raises nearly any type on a font that it does not know
        return frozenset()


def lacking(text: str) -> str:
    """The letters of `text` that DejaVu Sans has not."""
    return "".join(dict.fromkeys(letter for letter in text if ord(letter) not in letters(own()) and letter != "\n"))


@functools.cache
def installed() -> list[tuple[Path, str]]:
    """Files and families, regular ones first. matplotlib's list is from when it was first used: fonts that came later
    are added.
    """
    from matplotlib.font_manager import findSystemFonts, fontManager

    for path in sorted({*findSystemFonts()} - {entry.fname for entry in fontManager.ttflist}):
        with contextlib.suppress(Exception):  # FreeType raises several types on a font that it does not know
            fontManager.addfont(path)
    plainest: dict[tuple[bool, Path], str] = {}  # of a file with several families the first
    for entry in fontManager.ttflist:
        if BOXES_ONLY not in entry.name:
            other = entry.weight not in _REGULAR or entry.style != "normal"
            plainest.setdefault((other, Path(entry.fname)), entry.name)
    return [(path, family) for (_, path), family in sorted(plainest.items())[:FONTS_ASKED]]


@functools.cache
def other(lacked: str) -> tuple[Path, str] | None:
    """File and family of an installed font that has these letters."""
    for path, family in installed():
        if all(ord(letter) in letters(path) for letter in lacked):
            return path, family
    return None


def is_drawable(text: str) -> bool:
    """Whether some font here has all of its letters."""
    lacked = lacking(text)
    return not lacked or other(lacked) is not None


def file_of(text: str) -> Path:
    """The font to draw `text` with."""
    lacked = lacking(text)
    found = other(lacked) if lacked else None
    return own() if found is None else found[0]


def families(texts: Iterable[str]) -> list[str]:
    """Of the fonts that these texts take, the usual one first."""
    others = [other(lacked) for text in texts if (lacked := lacking(text))]
    return list(dict.fromkeys([FAMILY, *(found[1] for found in others if found)]))


def drawable(text: str) -> str:
    """`text`, a square for each letter that no font here has."""
    if is_drawable(text):
        return text
    return "".join(letter if is_drawable(letter) else LACKING for letter in text)


def shown(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Names of classes as they can be drawn: cut in the middle where they are long, and `#3` (counted from 0) where no
    font here has their letters.
    """
    return [_cut(name, longest) if is_drawable(name) else f"#{number}" for number, name in enumerate(names)]


def _cut(name: str, longest: int) -> str:
    """So many letters at most, of which the wide ones of East Asia count twice."""
    if sum(map(_width, name)) <= longest:
        return name
    head, tail = longest - longest // 2 - 1, longest // 2
    begins = sum(reached <= head for reached in itertools.accumulate(map(_width, name)))
    ends = sum(reached <= tail for reached in itertools.accumulate(map(_width, reversed(name))))
    return f"{name[:begins]}…{name[len(name) - ends :]}"


def _width(letter: str) -> int:
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def remark(names: Sequence[str]) -> str:
    """What to say of numbers among the names; empty where there are none."""
    return (
        "" if all(map(is_drawable, names)) else "#: number of the class, where no font here has the letters of its name"
    )


def plain(text: str) -> str:
    """`text` as it stands: between two dollars matplotlib would read a formula."""
    return text.replace("$", r"\$")
