"""What `prepare` read, on one page each: some pictures of every class, how many there are, how large they are.

No function reads a file; pictures come as arrays (C, H, W) of bytes, grey or RGB.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from epsd.figures import fonts
from epsd.figures.boxes import boxed
from epsd.figures.fonts import plain
from epsd.figures.style import figure_of_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

CLASSES = 40
"""Classes with pictures and a bar of their own, at most."""
EACH = 8
"""Pictures of a class."""
SIDE = 64
"""Pixels of a drawn picture of a class."""
BOXED = 12
"""Pictures with boxes, at most."""
CELL = 320
"""Pixels of one of these."""
SHADES = {"train": ("0.35", ""), "validation": ("0.7", "///"), "test": ("white", "")}
"""Fill and hatching of the splits."""
LINES = {"train": "-", "validation": ":", "test": "--"}
"""Where there are too many classes for bars."""


class Boxed(NamedTuple):
    """A picture with boxes (n, 4) in corners of its pixels, and their labels (n,)."""

    picture: Pixels
    boxes: Floats
    labels: npt.NDArray[np.int64]


def per_class(labels: npt.NDArray[np.int64], classes: int, each: int = EACH) -> list[list[int]]:
    """Positions of up to `each` images of each class (of CLASSES at most), spread evenly over those that there are."""
    found = []
    for label in range(min(classes, CLASSES)):
        mine = np.flatnonzero(labels == label)
        found.append(mine[np.unique(np.linspace(0, len(mine) - 1, min(each, len(mine))).astype(int))].tolist())
    return found


def images(
    rows: Sequence[Sequence[Pixels]], names: Sequence[str], counts: Mapping[str, Sequence[int]], told: Sequence[str]
) -> "Figure":
    """A row of pictures for each class, and how many it has in each split. `told`: what stands above, line by line."""
    figure = figure_of_size(10, max(3.0, 1.3 + (0.55 if len(rows) <= CLASSES / 2 else 0.32) * len(rows)))
    left, right = figure.subplots(1, 2)
    left.imshow(_sheet(rows), interpolation="nearest")
    shown = [plain(name) for name in fonts.shown(names)[: len(rows)]]
    left.set_yticks([(row + 0.5) * (SIDE + 2) for row in range(len(rows))], shown, fontsize=8)
    left.set_xticks([])
    left.set_frame_on(False)
    left.set_title("training images, some of each class", fontsize=9)
    bars(right, names, counts, "images")
    figure.suptitle(_above(told, names), fontsize=10)
    return figure


def scenes(
    some: Sequence[Boxed],
    names: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    sides: Floats,
    sizes: Floats,
    told: Sequence[str],
) -> "Figure":
    """Pictures with their boxes; objects of each class by split; sides of the boxes; sizes of the pictures.

    sides : (n,) of the training boxes, root of the area, in pixels.  sizes : (m, 2) widths and heights of pictures.
    """
    shown = fonts.shown(names)
    columns = min(4, max(1, len(some)))
    rows = max(1, math.ceil(len(some) / columns))
    height = max(1.6 + 0.17 * min(len(names), CLASSES), 3.0)
    figure = figure_of_size(11, 2.7 * rows + height + 0.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.7 * rows, height))  # type: ignore[misc]
    sheet = upper.subplots()
    sheet.imshow(_tiled([_drawn(one, shown) for one in some], columns), interpolation="antialiased")
    sheet.set_axis_off()
    left, middle, right = lower.subplots(1, 3, width_ratios=(2, 1, 1))
    bars(left, names, counts, "objects")
    histogram(middle, sides)
    pictures(right, sizes)
    figure.suptitle(_above(told, names), fontsize=10)
    return figure


def _above(told: Sequence[str], names: Sequence[str]) -> str:
    lines = [*told, fonts.remark(names)]
    if len(names) > CLASSES:
        lines.append(f"the first {CLASSES} of {len(names):,} classes")
    return plain("\n".join(filter(None, lines)))


def bars(axes: "Axes", names: Sequence[str], counts: Mapping[str, Sequence[int]], what: str) -> None:
    """How many of each class there are, the splits one behind the other; a line where there are too many classes."""
    places = np.arange(len(names))
    before = np.zeros(len(names))
    for split, (shade, hatch) in SHADES.items():
        mine = np.array(counts.get(split, [0] * len(names)), dtype=float)
        if not mine.any():
            continue
        look: dict[str, Any] = {"facecolor": shade, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
        label = f"{split}: {int(mine.sum()):,}"
        if len(names) <= CLASSES:
            axes.barh(places, mine, left=before, label=label, **look)
        else:
            order = np.argsort(-np.array(counts["train"]), kind="stable")
            axes.step(places, mine[order], color="black", linestyle=LINES[split], label=label)
        before += mine
    if len(names) <= CLASSES:
        axes.set_yticks(places, [plain(name) for name in fonts.shown(names)], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(what)
        for place, total in enumerate(before.tolist()):
            axes.text(total, place, f" {int(total):,}", va="center", fontsize=7)
        axes.margins(x=0.12)
    else:
        axes.set(xlabel=f"{len(names):,} classes, by training {what}", ylabel=what, yscale="symlog")
    if before.any():
        axes.legend(
            fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(SHADES), frameon=False,
            title=f"{what} by class and split",
        )  # fmt: skip


def histogram(axes: "Axes", sides: Floats) -> None:
    """Of the sides of boxes, on a logarithmic scale."""
    if len(sides):
        low, high = max(1.0, float(sides.min())), float(sides.max())
        edges = np.geomspace(low, max(high, low * 1.1) * 1.001, 25)
        axes.hist(sides.clip(low), edges.tolist(), color="0.7", edgecolor="black", linewidth=0.6)
        axes.set_xscale("log")
        _whole_numbers(axes, low, high)
    axes.set_xlabel("side in pixels (root of the area, log scale)", fontsize=8)
    axes.set_title("boxes of train", fontsize=9)


def _whole_numbers(axes: "Axes", low: float, high: float) -> None:
    from matplotlib.ticker import NullFormatter

    ticks = sorted({round(value) for value in np.geomspace(low, high, 5)})
    axes.set_xticks(ticks, [f"{value:,}" for value in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def pictures(axes: "Axes", sizes: Floats) -> None:
    """Widths and heights of pictures, a mark for each size, larger where there are more of it."""
    each, count = np.unique(sizes, axis=0, return_counts=True)
    axes.scatter(each[:, 0], each[:, 1], 12 + 200 * count / max(1, count.max()), facecolors="none", edgecolors="black")
    axes.set_xlabel("width in pixels", fontsize=8)
    axes.set_ylabel("height in pixels", fontsize=8)
    axes.set_xlim(0, 1.15 * each[:, 0].max())
    axes.set_ylim(0, 1.15 * each[:, 1].max())
    axes.set_title(f"{len(sizes):,} pictures, {len(each):,} size{'s' if len(each) > 1 else ''}", fontsize=9)


# --- mosaics --------------------------------------------------------------------------------------------------------


def _sheet(rows: Sequence[Sequence[Pixels]]) -> Pixels:
    """A row for each class, white where it has no more pictures."""
    step = SIDE + 2
    sheet = np.full((max(1, len(rows)) * step, EACH * step, 3), 255, dtype=np.uint8)
    for row, some in enumerate(rows):
        for column, pixels in enumerate(some):
            cell = _fitted(pixels, SIDE)
            top, left = row * step + (step - len(cell)) // 2, column * step + (step - cell.shape[1]) // 2
            sheet[top : top + len(cell), left : left + cell.shape[1]] = cell
    return sheet


def _fitted(pixels: Pixels, side: int) -> Pixels:
    """(C, H, W) in colour, (h, w, 3), its longer side of so many pixels."""
    image = _image(pixels)
    factor = side / max(image.size)
    width, height = (max(1, round(length * factor)) for length in image.size)
    return np.asarray(image.resize((width, height), 0 if factor > 1 else 2).convert("RGB"))


def _image(pixels: Pixels) -> "Image":
    from PIL.Image import fromarray

    return fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _drawn(one: Boxed, names: Sequence[str]) -> Pixels:
    image = _image(one.picture)
    factor = min(1.0, CELL / max(image.size))
    if factor < 1:
        image = image.resize((round(image.width * factor), round(image.height * factor)), 2)
    texts = [names[label] for label in one.labels]
    return np.asarray(boxed(image, one.boxes * factor, one.labels.tolist(), texts, least=CELL))


def _tiled(cells: Sequence[Pixels], columns: int) -> Pixels:
    """Pictures (h, w, 3) side by side on white, each in the middle of its place."""
    high = max((len(cell) for cell in cells), default=1) + 8
    wide = max((cell.shape[1] for cell in cells), default=1) + 8
    sheet = np.full((max(1, math.ceil(len(cells) / columns)) * high, columns * wide, 3), 255, dtype=np.uint8)
    for number, cell in enumerate(cells):
        top = number // columns * high + (high - len(cell)) // 2
        left = number % columns * wide + (wide - cell.shape[1]) // 2
        sheet[top : top + len(cell), left : left + cell.shape[1]] = cell
    return sheet
