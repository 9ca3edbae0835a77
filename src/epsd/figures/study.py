"""Figures over many runs: accuracy left at each sparsity, and what it cost. matplotlib is imported on first use.

Methods differ by marker and line style, not by colour alone; spread over seeds is one standard deviation (n − 1).
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from epsd.figures.style import end_at_one, figure_of_size
from epsd.project.runtime import counted
from epsd.types import EpsdError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p")
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Of Okabe and Ito, told apart by colour-blind eyes; 7 lines and 11 markers repeat together only after 77 series."""

LABELS = {
    "top1": "top-1 (share right)",
    "top5": "top-5 (share right)",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "nll": "NLL (nats)",
    "loss": "loss (nats)",
    "ece": "expected calibration error",
    "map50": "mAP@0.5",
    "map": "COCO mAP",
}
SPLITS = {"val": "validation", "test": "test", "train": "training", "detect": "test"}
INSIDE = 8
"""Up to so many series have their legend inside the panel."""
LINE = 0.19
"""Inches, of a line of a legend at 8 points."""
COSTS = {"seconds": "seconds, pruning and training", "image_passes": "image passes (one image, once forwards)"}
"""Column -> label of its axis."""


class FigureError(EpsdError):
    """Nothing to draw: no rows, no finite number among them, or a column that is missing."""


class Style(NamedTuple):
    """How one series is drawn."""

    line: str | tuple[int, tuple[int, ...]]
    marker: str
    colour: str


def style(number: int) -> Style:
    """Of series `number`, from 0."""
    return Style(LINES[number % len(LINES)], MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)])


def label_of(metric: str) -> str:
    """An axis label with its unit for a metric's key: `test/top1` is `test top-1 (share right)`."""
    split, _, quantity = metric.rpartition("/")
    return f"{SPLITS.get(split, split)} {LABELS.get(quantity, quantity)}".strip()


def checked(rows: "pd.DataFrame", needed: Sequence[str], values: Sequence[str]) -> "pd.DataFrame":
    """`rows` without those in which every one of `values` is NaN or infinite. Raises FigureError: see there."""
    import numpy as np

    missing = [column for column in needed if column not in rows.columns]
    if missing:
        raise FigureError(
            f"figure: no column '{missing[0]}'. There are: {', '.join(map(str, rows.columns)) or 'none'}."
        )
    numbers = rows[list(values)].astype(float)
    finite: pd.DataFrame = rows[np.isfinite(numbers.to_numpy()).any(axis=1)]
    if finite.empty:
        raise FigureError(
            f"figure: none of {len(rows)} rows has a number under {' or '.join(values)}: nothing to draw."
        )
    return finite


def accuracy_against_sparsity(rows: "pd.DataFrame", *, metric: str = "test/top1") -> "Figure":
    """One line per method: mean over seeds, with a band of ± one standard deviation and a point for each seed.

    The axis is logarithmic in the density, so that 90, 95 and 98 % lie apart; its ticks are the sparsities in `rows`.

    Parameters
    ----------
    rows : columns `method`, `sparsity` in [0, 1), `seed`, `value`; methods are drawn in the order of their first row,
        rows without a finite value are left out.
    metric : key of `value`, for the axis (`test/top1`).

    Raises
    ------
    FigureError : no row with a finite value, a column that is missing, a sparsity outside [0, 1).
    """
    rows = checked(rows, ("method", "sparsity", "seed", "value"), ("value",))
    outside = rows[~rows["sparsity"].between(0, 1, inclusive="left")]
    if len(outside):
        raise FigureError(f"figure: sparsity {outside['sparsity'].iloc[0]} is outside [0, 1).")
    figure = figure_of_size(6.5, 4.5)
    axes = figure.subplots()
    for number, (method, mine) in enumerate(_by_method(rows)):
        _band(axes, mine, str(method), style(number))
    _density_axis(axes, sorted(set(rows["sparsity"].astype(float))))
    axes.set(ylabel=label_of(metric), title=f"{label_of(metric).partition(' (')[0].capitalize()} against sparsity")
    end_at_one(axes)
    marks, names = axes.get_legend_handles_labels()
    if len(names) > INSIDE:
        _legend_below(figure, marks, names, handlelength=4)
    else:
        axes.legend(fontsize=8, handlelength=4)
    axes.grid(color="0.9")
    return figure


def _by_method(rows: "pd.DataFrame") -> Iterator[tuple[Hashable, "pd.DataFrame"]]:
    yield from rows.groupby("method", sort=False)


def _band(axes: "Axes", rows: "pd.DataFrame", method: str, look: Style) -> None:
    table = rows.groupby("sparsity")["value"].agg(["mean", "std"]).fillna(0.0)
    density = 1 - table.index.to_numpy(float)
    mean, spread = table["mean"].to_numpy(float), table["std"].to_numpy(float)
    label = f"{method} ({counted(rows['seed'].nunique(), 'seed')})"
    axes.plot(density, mean, linestyle=look.line, marker=look.marker, color=look.colour, markersize=6, label=label)
    axes.plot(
        1 - rows["sparsity"].to_numpy(float),
        rows["value"].to_numpy(float),
        linestyle="none",
        marker=look.marker,
        markerfacecolor="none",
        markeredgecolor=look.colour,
        markeredgewidth=0.6,
        markersize=3.5,
    )
    if spread.any():
        axes.fill_between(density, mean - spread, mean + spread, color=look.colour, alpha=0.13, linewidth=0)
        for edge in (mean - spread, mean + spread):  # a band in grey print is told by its edges
            axes.plot(density, edge, linestyle=look.line, color=look.colour, linewidth=0.5)


def _density_axis(axes: "Axes", sparsities: Sequence[float]) -> None:
    """Density on a logarithmic scale, falling to the right; ticks named by sparsity, thinned where they would touch."""
    from matplotlib.ticker import NullLocator

    shown: list[float] = []
    span = math.log(1 - sparsities[0]) - math.log(1 - sparsities[-1])
    for value in reversed(sparsities):
        if not shown or math.log(1 - value) - math.log(1 - shown[-1]) > span / 16:
            shown.append(value)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([1 - value for value in shown], [f"{100 * value:.4g}" for value in shown])
    edge = 1.12 if span < 1 else math.exp(span / 20)
    axes.set_xlim((1 - sparsities[0]) * edge, (1 - sparsities[-1]) / edge)
    axes.set_xlabel("sparsity (% of prunable weights removed; log scale of the share kept)")


def cost_against_accuracy(
    rows: "pd.DataFrame",
    *,
    metric: str = "test/top1",
    costs: Mapping[str, str] = COSTS,
    against: str = "its cost",
    looks: Mapping[str, Style] = MappingProxyType({}),
) -> "Figure":
    """Accuracy over each cost, side by side: a point per seed, a large one per method's mean.

    Means carry error bars of ± one standard deviation in both directions. An axis that spans more than a factor of
    five is logarithmic.

    Parameters
    ----------
    rows : columns `method`, `seed`, `accuracy` and those of `costs`. A cost that is NaN is left out of its panel.
    metric : key of `accuracy`, for the axis.  costs : column -> label of its axis.  against : what these are, in words.
    looks : of methods that are not to be drawn in the order of their first rows.

    Raises
    ------
    FigureError : no row with a finite accuracy and cost, or a column that is missing.
    """
    rows = checked(rows, ("method", "seed", "accuracy", *costs), ("accuracy",))
    rows = checked(rows, (), tuple(costs))
    figure = figure_of_size(9.5 if len(costs) < 3 else 11, 4.4)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, (column, label) in zip(panels, costs.items(), strict=True):
        for number, (method, mine) in enumerate(_by_method(rows)):
            _cloud(axes, mine.dropna(subset=[column]), column, str(method), looks.get(str(method), style(number)))
        _cost_axis(axes, rows[column].dropna().tolist(), label)
    panels[0].set_ylabel(label_of(metric))
    end_at_one(panels[0])
    legend = {name: mark for axes in panels for mark, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [str(method) for method in rows["method"].unique()]
    names = sorted(legend, key=lambda name: order.index(name.rpartition(" (")[0]))
    _legend_below(figure, [legend[name] for name in names], names, spare=3)
    figure.suptitle(f"{label_of(metric).partition(' (')[0].capitalize()} against {against}")
    return figure


def _legend_below(
    figure: "Figure",
    marks: Sequence["Artist"],
    names: Sequence[str],
    *,
    spare: int = 0,
    handlelength: float | None = None,
) -> None:
    """A legend under the panels, for whose lines, but for `spare` of them, the figure grows: none covers a panel."""
    width, height = figure.get_size_inches()
    letters = round(16.5 * width)  # at 8 points, those for the mark included
    columns = max(1, min(4, len(names), letters // (8 + max(map(len, names), default=1))))
    figure.set_size_inches(width, height + LINE * max(0, math.ceil(len(names) / columns) - spare))
    figure.legend(marks, names, loc="outside lower center", ncols=columns, fontsize=8, handlelength=handlelength)


def _cloud(axes: "Axes", rows: "pd.DataFrame", column: str, method: str, look: Style) -> None:
    if rows.empty:
        return
    cost, value = rows[column].to_numpy(float), rows["accuracy"].to_numpy(float)
    axes.plot(cost, value, look.marker, markersize=4, markerfacecolor="none", markeredgecolor=look.colour)
    spread = {"xerr": cost.std(ddof=1), "yerr": value.std(ddof=1)} if len(rows) > 1 else {}
    label = f"{method} ({counted(rows['seed'].nunique(), 'seed')})"
    axes.errorbar(
        cost.mean(), value.mean(), **spread, fmt=look.marker, color=look.colour, markersize=9, capsize=3, label=label
    )


def _cost_axis(axes: "Axes", costs: Sequence[float], label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [cost for cost in costs if cost > 0]
    if positive and len(positive) == len(costs) and max(costs) > 5 * min(costs):
        axes.set_xscale("log")
        # ticks at 1, 2 and 5 times a power of ten, named in full: the default's labels run into one another
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e5 else f"{value:.0e}")
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
        label += "\n(log scale)"
    axes.margins(x=0.15)
    axes.set_xlabel(label)
    axes.grid(color="0.9")
