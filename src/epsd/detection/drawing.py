"""Pictures with detections drawn in: right, wrong and missed differ in colour and, for black and white, in line."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from epsd.detection.average_precision import HIT, IGNORED, Detections, judge
from epsd.figures import boxes, fonts
from epsd.figures.fonts import plain
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
    """Pictures side by side with their boxes, and one legend; the larger the pictures, the larger they are drawn.

    `found[i]` belongs to `scenes[i]`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = max(1, min(columns, len(scenes)))
    rows = -(-len(scenes) // columns)
    width, height = _inches(scenes, columns)
    keys = max(1, min(len(STYLES), int(width * columns / KEY)))
    extra = 0.3 + 0.22 * -(-len(STYLES) // keys)
    figure = Figure(figsize=(width * columns, (height + 0.25) * rows + extra), dpi=DPI, layout="constrained")
    names = fonts.shown(class_names)
    for place in range(rows * columns):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_axis_off()
        if place < len(scenes):
            some = marks(found[place], scenes[place], names)
            drawn = min(width, height * scenes[place].width / scenes[place].height)
            draw(axes, read_picture(scenes[place], channels), some, drawn)
            axes.set_title(plain(scenes[place].id), fontsize=8)
    handles = [Line2D([], [], color=s.colour, linestyle=s.line, linewidth=2, label=s.meaning) for s in STYLES]
    figure.legend(handles=handles, loc="outside lower center", ncols=keys, fontsize=8, handlelength=3.5)
    return figure


KEY = 2.6
"""Inches of the longest entry of the legend."""
SMALLEST, LARGEST, PER_INCH = 3.6, 10.0, 100
"""Inches of a drawn picture: as many as it has pixels / PER_INCH, between these; of several side by side half of it."""


def _inches(scenes: Sequence[Scene], columns: int) -> tuple[float, float]:
    """Width and height of each drawn picture."""
    width = max(scene.width for scene in scenes)
    tallest = max(scene.height / scene.width for scene in scenes)
    most = LARGEST if columns == 1 else LARGEST / 2
    side = min(most, max(SMALLEST, width / PER_INCH))
    return side, side * min(2.0, max(0.3, tallest))


def draw(axes: "Axes", pixels: npt.NDArray[np.uint8], some: Sequence[Mark], inches: float) -> None:
    """One picture (C, H, W), so many inches wide, with its boxes; a thin white edge keeps every line visible."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    grey, (height, width) = len(pixels) == 1, pixels.shape[1:]
    axes.imshow(pixels[0] if grey else pixels.transpose(1, 2, 0), cmap="gray" if grey else None, vmin=0, vmax=255)
    for (left, top, right, bottom), _, style in some:
        # imshow centres a pixel on its number; corners of pixels lie half a pixel before
        patch = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False)
        patch.set(edgecolor=style.colour, linestyle=style.line, linewidth=1.8)
        patch.set_path_effects([withStroke(linewidth=3, foreground="white")])
        axes.add_patch(patch)
    point = width / (72 * inches)  # in pixels of the picture
    texts = [f"{mark.text} {_SIGNS[mark.style]}" if mark.style in _SIGNS else mark.text for mark in some]
    wanted = [
        boxes.Label(mark.box.tolist(), (0.62 * len(text) + 0.6) * LETTERS * point, 1.5 * LETTERS * point,
                    mark.style in (MISSED, PASSED))
        for mark, text in zip(some, texts, strict=True)
    ]  # fmt: skip
    for (x, y), mark, text, one in zip(boxes.placed(wanted, width, height), some, texts, wanted, strict=True):
        axes.text(
            x + 0.3 * LETTERS * point - 0.5, y + one.height / 2 - 0.5, plain(text), va="center_baseline", ha="left",
            color="white", fontsize=LETTERS, bbox={"facecolor": mark.style.colour, "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip


LETTERS = 6.5
"""Points of the letters at a box."""


def annotated(picture: "Image", found: Detections, class_names: Sequence[str]) -> "Image":
    """The picture in colour, a small one enlarged, with a box for each detection and its class and score at the box."""
    names = fonts.shown(class_names)
    texts = [f"{names[label]} {score:.2f}" for label, score in zip(found.labels, found.scores, strict=True)]
    return boxes.boxed(picture, found.boxes, found.labels.tolist(), texts)
