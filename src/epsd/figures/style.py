"""Figures for reports: readable in black and white, every axis with its unit. matplotlib is imported on first use.

Each function returns a matplotlib `Figure`; `save` writes it. Lines differ by style and marker, bars by hatching.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from epsd.figures import fonts
from epsd.figures.fonts import plain
from epsd.masks import Mask
from epsd.project.artifacts import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from epsd.evaluation.metrics import ReliabilityTable

DPI = 120
NUMBERS_UP_TO = 12
NAMES_UP_TO = 40
FILTERS = 64
"""Of the first layer, drawn at most."""
BINS = 60
OUTER = 0.005
"""Share of signed scores at either end that is drawn in the outermost bin: a few are a thousand times the others."""
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
COLOURS = ("black", "#D55E00", "#0072B2", "#009E73")
"""Of lines beyond the styles; of Okabe and Ito, told apart by colour-blind eyes."""


def figure_of_size(width: float, height: float) -> "Figure":
    """An empty figure, in inches; its parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    """Write `figure` as PNG; the same figure gives the same bytes. Letters that the usual font lacks are drawn with an
    installed one, or as squares. Raises ArtifactError: cannot be written.
    """
    _with_letters(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _with_letters(figure: "Figure") -> None:
    from matplotlib.text import Text

    odd = [text for text in figure.findobj(Text) if isinstance(text, Text) and fonts.lacking(text.get_text())]
    for text in odd:
        text.set_text(fonts.drawable(text.get_text()))
        text.set_fontfamily(fonts.families([text.get_text()]))


def confusion(table: Tensor, class_names: Sequence[str]) -> "Figure":
    """`table` (K, K): rows true, columns predicted. Shades are shares of the true class; counts are written up to
    a dozen classes, names up to forty.
    """
    classes, shown = len(class_names), [plain(name) for name in fonts.shown(class_names)]
    side = min(3 + 0.4 * classes, 12)
    figure = figure_of_size(side + 1, side)
    axes = figure.subplots()
    shares = table.double() / table.sum(dim=1, keepdim=True).clamp(min=1)
    picture = axes.imshow(shares.numpy(), cmap="Greys", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title=f"Confusion, {int(table.sum()):,} test images")
    if classes <= NAMES_UP_TO and (remark := fonts.remark(class_names)):
        axes.set_xlabel(f"predicted class\n({remark})")
    if classes <= NAMES_UP_TO:
        axes.set_xticks(range(classes), shown, rotation=90 if max(map(len, class_names)) > 2 else 0)
        axes.set_yticks(range(classes), shown)
    if classes <= NUMBERS_UP_TO:
        _write_counts(axes, table, shares)
    return figure


def _write_counts(axes: "Axes", table: Tensor, shares: Tensor) -> None:
    for row, column in table.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(int(table[row, column])), ha="center", va="center", color=colour, fontsize=8)


def reliability(table: "ReliabilityTable") -> "Figure":
    """Accuracy by confidence against the diagonal of perfect calibration, and how many predictions lie where."""
    figure = figure_of_size(5, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = table.images > 0
    width, left = (table.upper - table.lower)[filled].numpy(), table.lower[filled].numpy()
    upper.bar(
        left, table.accuracy[filled].numpy(), width, align="edge", color="0.8", edgecolor="black", label="network"
    )
    upper.plot([0, 1], [0, 1], "k--", label="perfectly calibrated")
    upper.plot(table.confidence[filled].numpy(), table.accuracy[filled].numpy(), "ko", markersize=4)
    upper.set(ylabel="accuracy (share right)", ylim=(0, 1), title=f"Calibration, ECE {table.ece():.4f}")
    upper.legend(loc="upper left")
    share = (table.images / table.images.sum().clamp(min=1))[filled].numpy()
    lower.bar(left, share, width, align="edge", color="white", edgecolor="black", hatch="//")
    lower.set(xlabel="confidence (largest probability)", ylabel="share of images", xlim=(0, 1), ylim=(0, 1))
    return figure


def density_per_layer(layers: Mapping[str, float], overall: float | None = None) -> "Figure":
    """Share of each layer's prunable weights that is kept, input layer on top; `overall`: the whole network's."""
    figure = figure_of_size(7, height_of(len(layers)))
    densities(figure.subplots(), layers, overall)
    return figure


def height_of(bars: int) -> float:
    """Inches for so many bars, one below the other."""
    return min(1.5 + 0.22 * bars, 30)


def densities(axes: "Axes", layers: Mapping[str, float], overall: float | None = None) -> None:
    """`density_per_layer` on axes of a larger figure."""
    names, values = list(layers), [100 * value for value in layers.values()]
    axes.barh(range(len(names)), values, color="0.75", edgecolor="black")
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.3g}" if value else " 0: dead layer", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set(
        xlabel="density (% of the layer's weights kept)",
        xlim=(0, 1.12 * max([*values, 1e-9])),
        title="Density by layer",
    )
    if overall is not None:
        axes.axvline(100 * overall, color="black", linestyle="--", label=f"network: {100 * overall:.3g} %")
        axes.legend(loc="lower right")


def glance(mask: Mask, scores: Mapping[str, Tensor] | None) -> "Figure":
    """Three panels: density by layer; how many weights have which score, the removed and the kept ones; the kept
    weights of the first layer, a square for each filter. Without `scores` the second one is left out.
    """
    right = ["first"] if scores is None else ["scores", "first"]
    figure = figure_of_size(12, max(6, height_of(len(mask.keep))))
    axes: dict[str, Axes] = figure.subplot_mosaic([["layers", name] for name in right])
    layers = {name: float(keep.float().mean()) for name, keep in mask.keep.items()}
    densities(axes["layers"], layers, 1 - mask.sparsity)
    if scores is not None:
        ranked(axes["scores"], mask, scores)
    name = next(iter(mask.keep))
    filters(axes["first"], name, mask.keep[name])
    return figure


def ranked(axes: "Axes", mask: Mask, scores: Mapping[str, Tensor]) -> None:
    """Histogram of the scores, removed beside kept; the threshold where one parts them."""
    known = [name for name in mask.keep if name in scores]
    keep = torch.cat([mask.keep[name].flatten().cpu() for name in known])
    found = torch.cat([scores[name].detach().flatten().float().cpu() for name in known])
    zeros, signed = int((found == 0).sum()), bool((found < 0).any())
    if signed:
        low, high = (float(found.kthvalue(_place(share, len(found))).values) for share in (OUTER, 1 - OUTER))
        shown, label = found.clamp(low, high), f"score (the outer {OUTER:.1%} in the last bins)"
    else:
        keep, found = keep[found > 0], found[found > 0]
        shown, label = found.log10(), "score (log10)"
    if not len(shown):
        axes.set(title="Every score is 0")
        return
    edges = torch.linspace(float(shown.min()), float(shown.max()) + 1e-6, BINS + 1)
    for chosen, colour, hatch, which in ((~keep, "0.85", "", "removed"), (keep, "white", "////", "kept")):
        counts = torch.histogram(shown[chosen], edges).hist
        axes.stairs(
            counts.numpy(), edges.numpy(), fill=True, facecolor=colour, edgecolor="black", hatch=hatch, alpha=0.8,
            label=f"{int(chosen.sum()):,} {which}",
        )  # fmt: skip
    if keep.any() and not keep.all() and found[keep].min() >= found[~keep].max():
        axes.axvline(float(shown[keep].min()), color="black", linestyle="--", label="threshold")
    axes.set(xlabel=label, ylabel="weights (log)", yscale="log", title="Scores of the weights")
    axes.legend(fontsize=8, title=f"{zeros:,} scores of 0 are not drawn" if zeros and not signed else None)


def _place(share: float, count: int) -> int:
    return min(count, max(1, math.ceil(share * count)))


def filters(axes: "Axes", name: str, keep: Tensor) -> None:
    """The kept weights of one layer: of a convolution a square for each filter, dark where more input channels keep
    that place; of a linear layer a row for each output.
    """
    shown = keep[:FILTERS].float().cpu()
    more = "" if len(keep) <= FILTERS else f", the first {FILTERS} of {len(keep)} outputs"
    shares = shown.mean(1) if keep.dim() > 2 else shown.unsqueeze(1)
    squares = _tiled(shares.reshape(len(shares), -1, shares.shape[-1]))
    axes.imshow(squares, cmap="Greys", vmin=0, vmax=1, aspect="equal" if keep.dim() > 2 else "auto")
    axes.set(xticks=[], yticks=[], title=f"First layer, {name}: {int(keep.sum()):,} of {keep.numel():,} weights{more}")
    axes.set_xlabel("a square for each filter; darker: kept for more input channels" if keep.dim() > 2 else "inputs")
    axes.set_facecolor("#B0C4DE")


def _tiled(squares: Tensor) -> Tensor:
    """(n, h, w) -> one picture, NaN between the squares."""
    count, height, width = squares.shape
    columns = math.ceil(math.sqrt(count)) if height > 1 else 1
    rows = math.ceil(count / columns)
    gap = int(height > 1)
    picture = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap), math.nan)
    for number, square in enumerate(squares):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        picture[top : top + height, left : left + width] = square
    return picture


def curves(panels: Mapping[str, Mapping[str, Sequence[float | None]]], title: str = "Training") -> "Figure":
    """One panel for each quantity (its key labels the axis, unit included), one line for each series, by epoch.

    Epochs count from 1; None and NaN leave a gap.
    """
    figure = figure_of_size(6.5, 2.6 * len(panels) + 0.4)
    for axes, (label, series) in zip(
        figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        _lines(axes, series)
        axes.set_ylabel(label)
        end_at_one(axes)
    axes.set_xlabel("epoch")
    figure.suptitle(title)
    return figure


def end_at_one(axes: "Axes") -> None:
    """Let an upright axis of shares end where shares do, whatever margin or spread lies around the points."""
    if "(share" in axes.get_ylabel():
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))


def _lines(axes: "Axes", series: Mapping[str, Sequence[float | None]]) -> None:
    for number, (name, values) in enumerate(series.items()):
        line, marker = STYLES[number % len(STYLES)]
        points = [float("nan") if value is None else value for value in values]
        step = max(1, len(points) // 10)
        axes.plot(
            range(1, len(points) + 1),
            points,
            line,
            marker=marker,
            markevery=step,
            color=COLOURS[number // len(STYLES) % len(COLOURS)],
            label=name,
            markersize=4,
        )
    axes.legend(fontsize=8)
    axes.grid(color="0.9")


def history_panels(history: Mapping[str, Sequence[float | None]]) -> dict[str, dict[str, Sequence[float | None]]]:
    """Columns of history.csv (`train/loss`, `val/top1`) as panels of `curves`; those without a unit are dropped."""
    labels = {
        "loss": "loss (nats)",
        "nll": "loss (nats)",
        "cross_entropy": "terms of the objective (nats)",
        "distillation": "terms of the objective (nats)",
        "top1": "top-1 (share right)",
        "grad_norm": "gradient norm\n(nats per unit of weight)",
        "lr": "learning rate",
    }
    panels: dict[str, dict[str, Sequence[float | None]]] = {}
    for column, values in history.items():
        quantity = column.rsplit("/", 1)[-1]
        if quantity in labels:
            panels.setdefault(labels[quantity], {})[column] = values
    return panels
