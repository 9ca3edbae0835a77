"""Boxes with words drawn into pictures, such that the words do not hide each other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from epsd.figures import fonts

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = npt.NDArray[np.float64]
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Of the classes in turn: of Okabe and Ito, told apart by colour-blind eyes; those after LIGHT take black letters."""
LIGHT = 3
LEAST = 400
"""Pixels of the longer side of a drawn picture: smaller ones are enlarged, or the words would hide them."""
ROWS = 40
"""Lines above and below a box where its words are tried."""


class Label(NamedTuple):
    """Words to place: corners of their box, width and height of the words; `below`: rather under the box than above."""

    box: Sequence[float]
    width: float
    height: float
    below: bool = False


def placed(labels: Sequence[Label], width: float, height: float) -> list[tuple[float, float]]:
    """Left upper corner of each label in a picture of that size: at its box, where it hides none of those before.

    Where there is no such place at the box, the nearest line above or below; in a picture that is full, where it hides
    least.
    """
    taken = np.zeros((0, 4))
    corners = []
    for label in labels:
        some = np.array([_inside(place, label, width, height) for place in _places(label)])
        ends = some + np.array([label.width, label.height])
        shared = np.clip(
            np.minimum(ends[:, None], taken[None, :, 2:]) - np.maximum(some[:, None], taken[None, :, :2]), 0, None
        )
        hidden = shared.prod(2).sum(1)
        best = int(hidden.argmin())
        taken = np.concatenate([taken, [[*some[best], *ends[best]]]])
        corners.append((float(some[best, 0]), float(some[best, 1])))
    return corners


def _places(label: Label) -> list[tuple[float, float]]:
    left, top, right, bottom = label.box
    above, under = (left, top - label.height), (left, bottom)
    near = [under, above] if label.below else [above, under]
    near += [(right - label.width, top - label.height), (right - label.width, bottom), (left, top)]
    near += [(right, top), (left - label.width, top), (left, bottom - label.height)]
    steps = [sign * row * label.height for row in range(1, ROWS) for sign in (-1, 1)]
    return near + [(left, top + step) for step in steps] + [(right, top + step) for step in steps]


def _inside(place: tuple[float, float], label: Label, width: float, height: float) -> tuple[float, float]:
    x, y = place
    return max(0.0, min(x, width - label.width)), max(0.0, min(y, height - label.height))


def boxed(picture: "Image", boxes: Floats, labels: Sequence[int], texts: Sequence[str], least: int = LEAST) -> "Image":
    """The picture in colour, enlarged until its longer side has about `least` pixels, with each box (n, 4) in the
    colour of its label, and its text at the box. The first ones are drawn on top.
    """
    from PIL import Image, ImageDraw, ImageFont

    times = max(1, round(least / max(picture.size)))
    width, height = picture.width * times, picture.height * times
    drawn = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    pen, size = ImageDraw.Draw(drawn), max(10, min(width, height) // 30)
    words = [fonts.drawable(text) for text in texts]
    faces = [ImageFont.truetype(fonts.file_of(text), size) for text in words]
    wanted = [
        Label(box, pen.textlength(text, face) + 2, 1.25 * size)
        for box, text, face in zip((boxes * times).tolist(), words, faces, strict=True)
    ]
    corners = placed(wanted, width, height)
    every = list(zip(wanted, labels, words, faces, corners, strict=True))
    for one, label, *_ in reversed(every):
        left, top, right, bottom = one.box
        around = (left, top, max(left, right - 1), max(top, bottom - 1))
        pen.rectangle(around, outline=COLOURS[label % len(COLOURS)], width=max(2, size // 6))
    for one, label, text, face, (x, y) in reversed(every):
        number = label % len(COLOURS)
        pen.rectangle((x, y, x + one.width - 1, y + one.height - 1), fill=COLOURS[number])
        pen.text((x + 1, y), text, "white" if number < LIGHT else "black", face)
    return drawn
