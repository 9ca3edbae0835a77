"""Pictures with detections drawn in: right, wrong and missed differ in colour and, for black and white, in line."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from epsd.detection.average_precision import HIT, IGNORED, Detections, judge
from epsd.voc.annotations import read_picture
from epsd.voc.scenes import Floats, Scene

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

DPI = 120
SHOWN_FROM = 0.5
"""Score from which a detection is drawn."""


class Style(NamedTuple):
    """How one kind of box is drawn. Colours of Okabe and Ito, told apart by colour-blind eyes too."""

    colour: str
    line: str | tuple[int, tuple[float, ...]]
    meaning: str


RIGHT = Style("#009E73", "-", "✓ right")
WRONG = Style("#D55E00", (0, (4, 2)), "✗ wrong (class, place or double)")
MISSED = Style("#0072B2", (0, (1, 1.5)), "missed")
PASSED = Style("#7F7F7F", (0, (6, 2, 1, 2)), "difficult: not counted")
STYLES = (RIGHT, WRONG, MISSED, PASSED)
_SIGNS = {RIGHT: "✓", WRONG: "✗"}


class Mark(NamedTuple):
    """One box to draw: corners of pixels (4,), what it says, its style."""

    box: Floats
    text: str
    style: Style


def marks(found: Detections, scene: Scene, class_names: Sequence[str], shown_from: float = SHOWN_FROM) -> list[Mark]:
    """The boxes of one picture: detections of at least that score, and the objects that none of them hit."""
    strong = found.scores >= shown_from
    shown = Detections(found.boxes[strong], found.scores[strong], found.labels[strong])
    result: list[Mark] = []
    hit: set[int] = set()
    for label, name in enumerate(class_names):
        mine = np.flatnonzero(shown.labels == label)
        verdicts = judge(shown, scene, label)
        hit.update(int(target) for target in verdicts.objects)
        for position, kind in zip(mine, verdicts.kinds, strict=True):
            style = RIGHT if kind == HIT else PASSED if kind == IGNORED else WRONG
            result.append(Mark(shown.boxes[position], f"{name} {shown.scores[position]:.2f}", style))
    for number, (box, label) in enumerate(zip(scene.boxes, scene.labels, strict=True)):
        if number not in hit:
            style = PASSED if scene.difficult[number] else MISSED
            result.append(Mark(box, class_names[label], style))
    return result


def mistakes(some: Sequence[Mark]) -> int:
    """Wrong and missed among them."""
    return sum(mark.style in (WRONG, MISSED) for mark in some)


def choose_pictures(
    found: Sequence[Detections], scenes: Sequence[Scene], class_names: Sequence[str], count: int
) -> list[int]:
    """Positions of up to `count` pictures: half spread evenly over the split, half those with the most mistakes."""
    count = min(count, len(scenes))
    even = np.linspace(0, len(scenes) - 1, count - count // 2).round().astype(int).tolist() if count else []
    faults = [mistakes(marks(one, scene, class_names)) for one, scene in zip(found, scenes, strict=True)]
    worst = [position for position in np.argsort(-np.array(faults), kind="stable").tolist() if position not in even]
    return list(dict.fromkeys(even)) + worst[: count - len(set(even))]


def gallery(
    scenes: Sequence[Scene], found: Sequence[Detections], class_names: Sequence[str], channels: int, columns: int = 3
) -> "Figure":
    """Pictures side by side with their boxes, and one legend. `found[i]` belongs to `scenes[i]`."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = max(1, min(columns, len(scenes)))
    rows = -(-len(scenes) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.6 * rows + 0.5), dpi=DPI, layout="constrained")
    for place in range(rows * columns):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_axis_off()
        if place < len(scenes):
            draw(axes, read_picture(scenes[place], channels), marks(found[place], scenes[place], class_names))
            axes.set_title(scenes[place].id, fontsize=8)
    handles = [Line2D([], [], color=s.colour, linestyle=s.line, linewidth=2, label=s.meaning) for s in STYLES]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(STYLES), fontsize=8, handlelength=3.5)
    return figure


def draw(axes: "Axes", pixels: npt.NDArray[np.uint8], some: Sequence[Mark]) -> None:
    """One picture (C, H, W) with its boxes; a thin white edge keeps every line visible on dark and on light."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    grey = len(pixels) == 1
    axes.imshow(pixels[0] if grey else pixels.transpose(1, 2, 0), cmap="gray" if grey else None, vmin=0, vmax=255)
    for (left, top, right, bottom), text, style in some:
        text = text.replace("$", r"\$")  # or matplotlib would read a formula between two of them
        # imshow centres a pixel on its number; corners of pixels lie half a pixel before
        patch = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False)
        patch.set(edgecolor=style.colour, linestyle=style.line, linewidth=1.8)
        patch.set_path_effects([withStroke(linewidth=3, foreground="white")])
        axes.add_patch(patch)
        below = style in (MISSED, PASSED)
        axes.annotate(
            f"{text} {_SIGNS[style]}" if style in _SIGNS else text,
            (left - 0.5, (bottom if below else top) - 0.5),
            xytext=(0, -2 if below else 1.5),
            textcoords="offset points",
            va="top" if below else "bottom",
            color="white",
            fontsize=6.5,
            annotation_clip=False,
            bbox={"facecolor": style.colour, "edgecolor": "none", "pad": 0.6},
        )


COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of the classes in turn where nobody knows what is right: of Okabe and Ito, told apart by colour-blind eyes."""


LEAST = 400
"""Pixels of the longer side of a drawn picture: smaller ones are enlarged, or the words would hide them."""


def annotated(picture: "Image", found: Detections, class_names: Sequence[str]) -> "Image":
    """The picture in colour, a small one enlarged, with a box for each detection and its class and score at the box."""
    from PIL import Image, ImageDraw

    times = max(1, round(LEAST / max(picture.size)))
    width, height = picture.width * times, picture.height * times
    drawn = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    pen, size = ImageDraw.Draw(drawn), max(10, min(width, height) // 30)
    font = _font(size)
    for box, score, label in reversed(list(zip(found.boxes * times, found.scores, found.labels, strict=True))):
        colour, text = COLOURS[label % len(COLOURS)], f"{class_names[label]} {score:.2f}"
        left, top, right, bottom = (float(side) for side in box)
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=max(2, size // 6))
        corner = max(0, min(left, width - pen.textlength(text, font))), max(0, top - 1.25 * size)
        pen.rectangle(pen.textbbox(corner, text, font), fill=colour)
        pen.text(corner, text, "white", font)
    return drawn


def _font(size: int) -> Any:
    """DejaVu Sans, which comes with matplotlib and has letters of most languages; matplotlib itself is not imported."""
    from PIL import ImageFont

    home = Path(str(importlib.util.find_spec("matplotlib").origin)).parent  # type: ignore[union-attr]
    return ImageFont.truetype(home / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)
