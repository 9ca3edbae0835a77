"""Figures over many runs, by what they contain: means, bands and points are those of the rows; ink is in the plot."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from epsd.figures import study as drawn
from epsd.figures.study import FigureError, accuracy_against_sparsity, cost_against_accuracy
from inks import ink


def study() -> pd.DataFrame:
    rows = [
        {"method": method, "sparsity": sparsity, "seed": seed, "value": base - sparsity / 10 + seed / 100}
        for base, method in ((0.99, "epsd"), (0.96, "prospr"), (0.9, "random"))
        for sparsity in (0.0, 0.9, 0.95, 0.98)
        for seed in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("methods", [2, 9, 48])
def test_no_legend_covers_what_it_explains(methods: int) -> None:
    """However many series: panels keep their size, and the whole legend is in the figure, beside them."""
    rows = [
        {"method": f"epsd reinitialised {number}, cross_entropy", "sparsity": sparsity, "seed": 0, "value": 0.9}
        for number in range(methods)
        for sparsity in (0.95, 0.99)
    ]
    table = pd.DataFrame(rows)
    costs = table.assign(accuracy=table.value, seconds=range(1, len(table) + 1), image_passes=5)
    for figure in (accuracy_against_sparsity(table), cost_against_accuracy(costs)):
        figure.draw_without_rendering()
        panels = [axes.get_window_extent() for axes in figure.axes]
        assert all(panel.height / figure.dpi > 2.4 and panel.width / figure.dpi > 3 for panel in panels)
        for legend in figure.legends:
            whole = legend.get_window_extent()
            assert not any(whole.overlaps(panel) for panel in panels)
            assert figure.bbox.x0 <= whole.x0 and whole.x1 <= figure.bbox.x1 and whole.y0 >= figure.bbox.y0
        inside = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        assert len(figure.legends) + len(inside) == 1 and (not inside or methods < 9)


def test_lines_are_the_means_and_bands_one_deviation() -> None:
    rows = study()
    axes = accuracy_against_sparsity(rows, metric="test/top1").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    for method in ("epsd", "prospr", "random"):
        line = lines[f"{method} (3 seeds)"]
        table = rows[rows.method == method].groupby("sparsity").value
        assert np.allclose(line.get_xdata(), [1, 0.1, 0.05, 0.02])
        assert np.allclose(line.get_ydata(), table.mean())
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    mean, spread = 0.99 - 0.098 + 0.01, np.std([0, 0.01, 0.02], ddof=1)
    assert np.isclose(band.min(), mean - spread) and np.isclose(band.max(), 0.99 + 0.01 + spread)
    points = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert sorted(y for line in points for y in line.get_ydata()) == pytest.approx(sorted(rows.value))


def test_high_sparsities_lie_apart_and_are_named() -> None:
    figure = accuracy_against_sparsity(study())
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and axes.xaxis_inverted()
    names = {label.get_text(): tick for label, tick in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)}
    assert names == pytest.approx({"0": 1, "90": 0.1, "95": 0.05, "98": 0.02})
    figure.draw_without_rendering()
    across = axes.transData.transform([[0.1, 0.9], [0.05, 0.9], [0.02, 0.9]])[:, 0] / figure.bbox.width
    assert (np.diff(across) > 0.1).all()
    assert "%" in axes.get_xlabel() and "share right" in axes.get_ylabel()


def test_sparsities_too_close_to_name_are_not_all_named() -> None:
    rows = pd.DataFrame({"method": "epsd", "sparsity": np.linspace(0, 0.98, 99), "seed": 0, "value": 0.5})
    axes = accuracy_against_sparsity(rows).axes[0]
    assert len(axes.get_xticks()) <= 17
    assert len(next(line for line in axes.lines if line.get_label()[0] != "_").get_xdata()) == 99


def test_series_differ_without_colour() -> None:
    styles = [drawn.style(number) for number in range(20)]
    assert len({(style.line, style.marker) for style in styles}) == 20


def test_the_picture_is_not_blank(tmp_path) -> None:
    full = accuracy_against_sparsity(study())
    assert ink(full, full.axes[0]) > 0.01
    bare = accuracy_against_sparsity(study())
    for artist in [*bare.axes[0].lines, *bare.axes[0].collections]:
        artist.remove()
    bare.axes[0].grid(False)
    bare.axes[0].get_legend().remove()
    assert ink(bare, bare.axes[0]) < ink(full, full.axes[0]) / 3


def test_one_seed_has_no_band_and_one_sparsity_is_drawn() -> None:
    rows = study().query("seed == 0 and sparsity == 0.95")
    axes = accuracy_against_sparsity(rows, metric="val/top1").axes[0]
    assert not axes.collections
    assert axes.get_xlim()[0] > 0.05 > axes.get_xlim()[1]
    assert axes.get_ylabel() == "validation top-1 (share right)"
    assert "epsd (1 seed)" in [line.get_label() for line in axes.lines]


def test_rows_without_a_number_are_left_out() -> None:
    rows = study()
    rows.loc[rows.method == "random", "value"] = math.nan
    labels = [text.get_text() for text in accuracy_against_sparsity(rows).axes[0].get_legend().get_texts()]
    assert labels == ["epsd (3 seeds)", "prospr (3 seeds)"]


def broken() -> Iterator[tuple[pd.DataFrame, str]]:
    yield study().iloc[:0], "nothing to draw"
    yield study().assign(value=math.nan), "nothing to draw"
    yield study().drop(columns="value"), "no column 'value'"
    yield study().assign(sparsity=1.0), "outside"


@pytest.mark.parametrize("rows,words", broken(), ids=lambda value: value if isinstance(value, str) else "")
def test_nothing_to_draw_is_an_error(rows: pd.DataFrame, words: str) -> None:
    with pytest.raises(FigureError, match=words):
        accuracy_against_sparsity(rows)


def costs() -> pd.DataFrame:
    rows = [
        {
            "method": method,
            "seed": seed,
            "accuracy": accuracy + seed / 100,
            "seconds": seconds + seed,
            "image_passes": n,
        }
        for method, accuracy, seconds, n in (("epsd", 0.95, 10.0, 1e5), ("prune, then distil", 0.96, 90.0, 9e5))
        for seed in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


def test_costs_are_the_rows_and_their_means() -> None:
    figure = cost_against_accuracy(costs())
    for axes, column in zip(figure.axes, ("seconds", "image_passes"), strict=True):
        for method, mine in costs().groupby("method"):
            cloud = next(
                line for line in axes.lines if len(line.get_xdata()) == 3 and mine[column].iloc[0] in line.get_xdata()
            )
            assert sorted(cloud.get_xdata()) == sorted(mine[column]) and sorted(cloud.get_ydata()) == sorted(
                mine.accuracy
            )
            (bars,) = [bars for bars in axes.containers if bars.get_label() == f"{method} (3 seeds)"]
            assert bars.lines[0].get_xydata().tolist() == [pytest.approx([mine[column].mean(), mine.accuracy.mean()])]
        assert axes.get_xscale() == "log" and "log" in axes.get_xlabel()
        assert ink(figure, axes) > 0.01
    assert "seconds" in figure.axes[0].get_xlabel() and "image passes" in figure.axes[1].get_xlabel()


def test_a_cost_that_is_not_known_leaves_its_panel_only() -> None:
    rows = costs()
    rows.loc[rows.method == "epsd", "seconds"] = math.nan
    seconds, passes = cost_against_accuracy(rows).axes
    assert [bars.get_label() for bars in seconds.containers] == ["prune, then distil (3 seeds)"]
    assert len(passes.containers) == 2
    assert [text.get_text() for text in seconds.figure.legends[0].get_texts()] == [
        "epsd (3 seeds)",
        "prune, then distil (3 seeds)",
    ]
    assert seconds.get_xscale() == "linear"


@pytest.mark.parametrize(
    "rows,words",
    [
        (costs().iloc[:0], "nothing to draw"),
        (costs().assign(seconds=math.nan, image_passes=math.nan), "nothing to draw"),
        (costs().assign(accuracy=math.inf), "nothing to draw"),
        (costs().drop(columns="image_passes"), "no column 'image_passes'"),
    ],
)
def test_costs_without_a_number_are_an_error(rows: pd.DataFrame, words: str) -> None:
    with pytest.raises(FigureError, match=words):
        cost_against_accuracy(rows)
