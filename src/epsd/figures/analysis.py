"""Figures that compare a few prunings in depth: overlap, layers, trainability, distillation, calibration, and more.

Each raises FigureError where there is nothing to draw. Methods differ by marker and line style or have a panel each.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from epsd.evaluation.metrics import ReliabilityTable
from epsd.figures.fonts import plain
from epsd.figures.study import MARKERS, FigureError, Style, checked, style
from epsd.figures.style import figure_of_size

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.contour import QuadContourSet
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")
CLASSES_SHOWN = 20
LEVELS = 12

LAYERS = {
    "density": "density (share of its weights kept)",
    "live": "channels with a weight on a path (share)",
    "gini": "Gini of its weights over channels (0 = even)",
}
NORMS = {"grad_norm": "the run's own objective", "grad_norm_ce": "cross entropy alone"}
KL = {
    "kl_same_class": "KL between two images of a class (nats)",
    "kl_views": "KL between two views of an image (nats)",
    "kl_epochs": "KL between two epochs, one image (nats)",
}


def mask_overlap(names: Sequence[str], measured: Tensor, expected: Tensor, uniform: float) -> "Figure":
    """Heat map of Jaccard overlaps (M, M), each with its number and, in brackets, what chance gives.

    expected : (M, M), overlap of random masks with the layer densities of each pair. uniform : of random masks of the
        same density everywhere, which the colour bar marks.
    """
    if not names or measured.shape != (len(names), len(names)):
        raise FigureError(f"figure: an overlap needs a square table, found {tuple(measured.shape)} for {len(names)}.")
    side = 2.6 + 0.85 * len(names)
    figure = figure_of_size(side + 1.2, side)
    axes = figure.subplots()
    shades = axes.imshow(measured.numpy(), cmap="Greys", vmin=0, vmax=1)
    bar = figure.colorbar(shades, ax=axes, shrink=0.8, label="weights in both / weights in either (Jaccard)")
    bar.ax.axhline(uniform, color="black", linestyle="--", linewidth=1.5)
    for row in range(len(names)):
        for column in range(len(names)):
            value, chance = float(measured[row, column]), float(expected[row, column])
            text = "1" if row == column else f"{value:.3f}\n({chance:.3f})"
            colour = "white" if value > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(
        "Overlap of the masks\n(in brackets: random masks of the same layer densities;\n"
        f"dashed: random masks of one density, {uniform:.3f})",
        fontsize=9,
    )
    return figure


def layers(rows: "pd.DataFrame") -> "Figure":
    """One row per layer, input on top, a mark per method: density, share of live channels, Gini over channels.

    rows : `method`, `seed`, `layer`, and LAYERS; means over seeds. NaN (a layer without a weight) leaves a gap.
    """
    rows = checked(rows, ("method", "seed", "layer", *LAYERS), tuple(LAYERS))
    names = list(rows["layer"].unique())
    figure = figure_of_size(11, min(2.2 + 0.24 * len(names), 30))
    panels = figure.subplots(1, len(LAYERS), sharey=True)
    for axes, (column, label) in zip(panels, LAYERS.items(), strict=True):
        for number, (method, mine) in enumerate(rows.groupby("method", sort=False)):
            means, look = mine.groupby("layer")[column].mean().reindex(names), style(number)
            marks: dict[str, Any] = {"marker": look.marker, "markerfacecolor": "none", "linewidth": 0.6}
            axes.plot(means, range(len(names)), color=look.colour, linestyle=look.line, label=str(method), **marks)
        axes.set_xlabel(label, fontsize=9)
        axes.grid(color="0.9")
    if (rows["density"] > 0).any():
        panels[0].set_xscale("symlog", linthresh=1e-3)
    panels[0].set_yticks(range(len(names)), names, fontsize=7)
    panels[0].invert_yaxis()
    handles, methods = panels[0].get_legend_handles_labels()
    figure.legend(handles, methods, loc="outside lower center", ncols=min(6, len(methods)), fontsize=8, handlelength=4)
    figure.suptitle("What each layer keeps")
    return figure


def trainability(rows: "pd.DataFrame", losses: "pd.DataFrame") -> "Figure":
    """Gradient norm at initialisation, a pair of bars per method; training loss by epoch, a line per method.

    rows : `method`, `seed`, `grad_norm`, `grad_norm_ce`. losses : `method`, `seed`, `epoch`, `value`.
    """
    rows = checked(rows, ("method", "seed", *NORMS), tuple(NORMS))
    losses = checked(losses, ("method", "seed", "epoch", "value"), ("value",))
    figure = figure_of_size(10, 4)
    left, right = figure.subplots(1, 2)
    _bars(left, rows)
    for number, (method, mine) in enumerate(losses.groupby("method", sort=False)):
        _by_epoch(right, mine, "value", str(method), style(number))
    right.set(ylabel="training loss of the run's objective (nats)", yscale="log")
    _whole_epochs(right)
    right.legend(fontsize=8, handlelength=4)
    figure.suptitle("Trainability of the pruned network")
    return figure


def _bars(axes: "Axes", rows: "pd.DataFrame") -> None:
    methods = list(rows["method"].unique())
    for number, (column, label) in enumerate(NORMS.items()):
        table = rows.groupby("method", sort=False)[column].agg(["mean", "std"]).fillna(0.0)
        places = np.arange(len(methods)) + 0.4 * (number - 0.5)
        look: dict[str, Any] = {"color": ("0.75", "white")[number], "edgecolor": "black", "hatch": HATCHES[number]}
        several = rows["seed"].nunique() > 1
        axes.bar(places, table["mean"], 0.38, yerr=table["std"] if several else None, capsize=3, label=label, **look)
    axes.set_xticks(range(len(methods)), methods, rotation=20 if len(methods) > 4 else 0)
    axes.set_ylabel("gradient norm at initialisation\n(nats per unit of weight)")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="upper right")


def _whole_epochs(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")


def _by_epoch(axes: "Axes", rows: "pd.DataFrame", column: str, method: str, look: Style) -> None:
    """Mean over seeds by epoch with a band of ± one standard deviation."""
    table = rows.dropna(subset=[column]).groupby("epoch")[column].agg(["mean", "std"]).fillna(0.0)
    if table.empty:
        return
    epochs, mean, spread = (part.to_numpy(float) for part in (table.index, table["mean"], table["std"]))
    every = max(1, len(epochs) // 10)
    axes.plot(
        epochs,
        mean,
        linestyle=look.line,
        marker=look.marker,
        markevery=every,
        markersize=5,
        color=look.colour,
        label=method,
    )
    if spread.any():
        axes.fill_between(epochs, mean - spread, mean + spread, color=look.colour, alpha=0.13, linewidth=0)
    axes.grid(color="0.9")


def distillation(rows: "pd.DataFrame", distilled: str | None = None) -> "Figure":
    """A panel for each divergence, a line per method, by epoch.

    rows : `method`, `seed`, `epoch`, `kl_same_class`, `kl_views`, `kl_epochs`; NaN leaves a gap. distilled : the
        divergence that the run's own objective works on, whose panel says so.
    """
    rows = checked(rows, ("method", "seed", "epoch", *KL), tuple(KL))
    figure = figure_of_size(12, 4)
    panels = figure.subplots(1, len(KL))
    for axes, (column, label) in zip(panels, KL.items(), strict=True):
        for number, (method, mine) in enumerate(rows.groupby("method", sort=False)):
            _by_epoch(axes, mine, column, str(method), style(number))
        axes.set_ylabel(label, fontsize=9)
        _whole_epochs(axes)
        if (rows[column] > 0).any():
            axes.set_yscale("log")
        if column == distilled:
            axes.set_title("the one that this objective distils", fontsize=9)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), fontsize=8, handlelength=4)
    figure.suptitle("Distillation: divergence of predictions on validation images")
    return figure


def calibration(
    tables: Mapping[str, ReliabilityTable], figures: Mapping[str, Mapping[str, float]], split: str = "validation"
) -> "Figure":
    """Accuracy by confidence, a line per method, against the diagonal; ECE, NLL and Brier score in the legend.

    The area of a ring is the share of the images in that bin: small ones are noise.

    figures : method -> {"ece", "nll", "brier"}.
    """
    filled = {name: table for name, table in tables.items() if float(table.images.sum()) > 0}
    if not filled:
        raise FigureError("figure: no prediction to judge the calibration of.")
    figure = figure_of_size(6.5, 6)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="perfectly calibrated")
    for number, (name, table) in enumerate(filled.items()):
        look, some = style(number), table.images > 0
        numbers = ", ".join(f"{key.upper() if key != 'brier' else 'Brier'} {figures[name][key]:.3f}" for key in _SHOWN)
        axes.plot(
            table.confidence[some].numpy(),
            table.accuracy[some].numpy(),
            linestyle=look.line,
            linewidth=0.8,
            marker=look.marker,
            markersize=5,
            color=look.colour,
            label=f"{name}: {numbers}",
        )
        share = (table.images / table.images.sum())[some].numpy()
        looks: dict[str, Any] = {"facecolors": "none", "edgecolors": look.colour, "linewidths": 1.2}
        axes.scatter(table.confidence[some].numpy(), table.accuracy[some].numpy(), 40 + 1500 * share, **looks)
    axes.set(xlabel="confidence (largest probability)", ylabel="accuracy (share right)", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.set_title(f"Calibration on the {split} split \n(ring: area by share of the images; NLL in nats)")
    axes.legend(fontsize=8, loc="lower right" if len(filled) < 5 else "best", handlelength=4)
    axes.grid(color="0.9")
    return figure


_SHOWN = ("ece", "nll", "brier")


def loss_landscapes(surfaces: Mapping[str, Tensor], reach: float) -> "Figure":
    """Contours of the loss, a panel per method on one scale of levels (logarithmic where they span a factor of 5).

    surfaces : (P, P) losses in nats on [−reach, reach]², the network in the middle.
    """
    finite = [surface[surface.isfinite()] for surface in surfaces.values()]
    if not any(len(values) for values in finite):
        raise FigureError("figure: no finite loss on any slice.")
    low = max(min(float(values.min()) for values in finite if len(values)), 1e-4)
    high = max(1.01 * low, *(float(values.max()) for values in finite if len(values)))
    wide = high > 5 * low
    levels = np.geomspace(low, high * 1.0001, LEVELS) if wide else np.linspace(low, high + 1e-6, LEVELS)
    columns = min(4, len(surfaces))
    rows = -(-len(surfaces) // columns)
    figure = figure_of_size(3.4 * columns + 1, 3.5 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, (name, surface) in zip(panels, surfaces.items(), strict=False):
        shades = _contours(axes, surface.clamp(min=low).numpy(), levels, reach)
        axes.set_title(name, fontsize=10)
    for axes in panels[len(surfaces) :]:
        axes.set_visible(False)
    figure.colorbar(shades, ax=panels.tolist(), label="cross entropy on training images (nats)", format="%.3g")
    figure.supxlabel("first direction (1 = the filters' own norm)", fontsize=9)
    figure.supylabel("second direction (likewise)", fontsize=9)
    figure.suptitle("Loss around the trained weights")
    return figure


def _contours(
    axes: "Axes", values: "NDArray[np.float64]", levels: "NDArray[np.float64]", reach: float
) -> "QuadContourSet":
    """Shades up to a grey on which the black numbers of the lines can still be read."""
    import matplotlib

    places = np.linspace(-reach, reach, len(values))
    greys = matplotlib.colormaps["Greys"](np.linspace(0, 0.6, len(levels) - 1))
    shades = axes.contourf(places, places, values, levels=levels, colors=greys)
    lines = axes.contour(places, places, values, levels=levels, colors="black", linewidths=0.6)
    digits = next(n for n in range(2, 17) if n == 16 or len({f"{level:.{n}g}" for level in levels}) == len(levels))
    axes.clabel(lines, fontsize=6, fmt=f"%.{digits}g")  # so that no two neighbours are named alike
    axes.plot(0, 0, marker="P", color="white", markeredgecolor="black", markersize=9)
    axes.set_aspect("equal")
    return shades


def features(
    projections: Mapping[str, tuple["NDArray[np.float64]", Tensor, Tensor]],
    class_names: Sequence[str],
    *,
    titles: Mapping[str, str],
) -> "Figure":
    """Images as points in the plane, a panel per method: each class its own sign, the wrongly classified ringed.

    projections : method -> points (N, 2), labels (N,), right (N,) bool. titles : what stands above each panel.
        Classes beyond the first twenty are left out.
    """
    if not projections or not any(len(points) for points, _, _ in projections.values()):
        raise FigureError("figure: no image to place.")
    columns = min(4, len(projections))
    rows = -(-len(projections) // columns)
    figure = figure_of_size(3.6 * columns, 3.7 * rows + 0.7)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, (points, labels, right)) in zip(panels, projections.items(), strict=False):
        _scatter(axes, points, labels.numpy(), right.numpy(), class_names)
        axes.set_title(titles[name], fontsize=9)
    for axes in panels[len(projections) :]:
        axes.set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(11, len(names)), fontsize=8)
    figure.suptitle("Features before the classifier (the axes of the plane have no unit)")
    return figure


def _scatter(
    axes: "Axes",
    points: "NDArray[np.float64]",
    labels: "NDArray[np.int64]",
    right: "NDArray[np.bool_]",
    class_names: Sequence[str],
) -> None:
    import matplotlib

    shown = class_names[:CLASSES_SHOWN]
    colours = matplotlib.color_sequences["tab10" if len(shown) <= 10 else "tab20"]
    written = all(name.isascii() and name.isalnum() and len(name) <= 2 for name in shown)
    for number, name in enumerate(shown):
        mine = points[labels == number]
        marker = f"${name}$" if written else MARKERS[number % len(MARKERS)]
        look: dict[str, Any] = {"marker": marker, "color": colours[number], "markersize": 5, "linestyle": "none"}
        axes.plot(mine[:, 0], mine[:, 1], **look, label=plain(name))
    wrong = points[~right & (labels < len(shown))]
    ring: dict[str, Any] = {
        "markersize": 10,
        "markerfacecolor": "none",
        "markeredgecolor": "black",
        "linestyle": "none",
    }
    axes.plot(wrong[:, 0], wrong[:, 1], "o", **ring, label="wrong")
    axes.set_xticks([])
    axes.set_yticks([])
