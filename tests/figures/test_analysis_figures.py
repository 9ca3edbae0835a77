"""Figures of the analysis by what they contain: the numbers drawn are those given, and there is ink in every panel."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from epsd.evaluation import metrics
from epsd.figures import analysis
from epsd.figures.study import FigureError
from inks import grey, ink

METHODS = ("epsd", "prospr", "random")


def rows(columns: tuple[str, ...], epochs: int = 0) -> pd.DataFrame:
    """Numbers that differ by method, seed, epoch and column."""
    return pd.DataFrame(
        {"method": method, "seed": seed, "epoch": epoch}
        | {column: 1 + number + seed / 10 + place / (1 + epoch) for place, column in enumerate(columns)}
        for number, method in enumerate(METHODS)
        for seed in (0, 1)
        for epoch in range(1, 1 + max(1, epochs))
    )


# --- overlap --------------------------------------------------------------------------------------------------------


def test_overlap_is_shaded_and_written_with_what_chance_gives() -> None:
    measured = torch.tensor([[1, 0.6, 0.2], [0.6, 1, 0.3], [0.2, 0.3, 1]], dtype=torch.float64)
    expected = measured / 10
    figure = analysis.mask_overlap(METHODS, measured, expected, 0.026)
    axes, bar = figure.axes
    assert axes.images[0].get_array().tolist() == measured.tolist()
    texts = {tuple(reversed(text.get_position())): text.get_text() for text in axes.texts}
    assert texts[0, 1] == "0.600\n(0.060)" and texts[2, 1] == "0.300\n(0.030)" and texts[1, 1] == "1"
    assert [label.get_text() for label in axes.get_yticklabels()] == list(METHODS)
    assert any(line.get_ydata()[0] == 0.026 for line in bar.lines)
    shades = grey(figure, axes)
    third = [np.median(part) for part in np.array_split(np.array_split(shades, 3)[0], 3, axis=1)]
    assert third[0] < third[1] < third[2], "more overlap is darker"


def test_overlap_of_nothing_is_an_error() -> None:
    for names, table in (((), torch.zeros(0, 0)), (METHODS, torch.zeros(2, 2))):
        with pytest.raises(FigureError, match="square"):
            analysis.mask_overlap(names, table, table, 0.1)


# --- trainability and distillation ----------------------------------------------------------------------------------


def test_trainability_draws_norms_and_losses() -> None:
    norms = rows(("grad_norm", "grad_norm_ce"))
    losses = rows(("value",), epochs=12)
    figure = analysis.trainability(norms, losses)
    left, right = figure.axes
    heights = [bar.get_height() for bar in left.patches if bar.get_height()]
    assert heights == pytest.approx(
        [*norms.groupby("method").grad_norm.mean(), *norms.groupby("method").grad_norm_ce.mean()]
    )
    assert len({bar.get_hatch() for bar in left.patches}) == 2
    for line, (_, mine) in zip(right.lines, losses.groupby("method"), strict=True):
        assert line.get_ydata().tolist() == pytest.approx(mine.groupby("epoch").value.mean().tolist())
    assert len({(line.get_linestyle(), line.get_marker()) for line in right.lines}) == 3
    assert len(right.collections) == 3, "a band for each"
    assert "nats" in left.get_ylabel() and "nats" in right.get_ylabel() and right.get_xlabel() == "epoch"
    assert ink(figure, left) > 0.05 and ink(figure, right) > 0.01


def test_distillation_has_a_panel_for_each_divergence_and_marks_the_objectives_own() -> None:
    names = tuple(analysis.KL)
    table = rows(names, epochs=4)
    table.loc[table.epoch == 1, "kl_epochs"] = math.nan
    figure = analysis.distillation(table, "kl_views")
    for axes, column in zip(figure.axes, names, strict=True):
        assert len(axes.lines) == 3
        drawn = table[table.method == "epsd"].dropna(subset=[column]).groupby("epoch")[column].mean()
        assert axes.lines[0].get_xydata().tolist() == [[epoch, pytest.approx(value)] for epoch, value in drawn.items()]
        assert "nats" in axes.get_ylabel()
        assert ("this objective" in axes.get_title()) == (column == "kl_views")
        assert ink(figure, axes) > 0.01
    assert len(figure.axes[2].lines[0].get_xdata()) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(METHODS)


def test_divergences_that_are_all_zero_are_drawn_on_a_linear_axis() -> None:
    table = rows(tuple(analysis.KL), epochs=3).assign(kl_views=0.0)
    axes = analysis.distillation(table).axes
    assert [panel.get_yscale() for panel in axes] == ["log", "linear", "log"]


@pytest.mark.parametrize("empty", [rows(()).iloc[:0], rows(("grad_norm",)), pd.DataFrame()])
def test_nothing_measured_is_an_error(empty: pd.DataFrame) -> None:
    with pytest.raises(FigureError):
        analysis.trainability(empty, rows(("value",)))
    with pytest.raises(FigureError):
        analysis.distillation(empty)
    with pytest.raises(FigureError, match="nothing to draw"):
        analysis.trainability(rows(("grad_norm", "grad_norm_ce")), rows(("value",)).assign(value=math.nan))


# --- calibration ----------------------------------------------------------------------------------------------------


def test_calibration_draws_the_filled_bins_of_each_method() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.65, 0.35]]).log()
    tables = {
        "epsd": metrics.reliability(logits, torch.tensor([0, 1, 0]), 10),
        "random": metrics.reliability(logits, torch.tensor([1, 1, 1]), 10),
    }
    numbers = {name: {"ece": 0.1, "nll": 0.2, "brier": 0.3} for name in tables}
    figure = analysis.calibration(tables, numbers)
    axes = figure.axes[0]
    lines = {line.get_label().partition(":")[0]: line for line in axes.lines}
    assert np.allclose(lines["epsd"].get_xydata(), [[0.65, 1], [0.9, 0.5]])
    rings = axes.collections[0]
    assert np.allclose(rings.get_offsets(), [[0.65, 1], [0.9, 0.5]])
    assert rings.get_sizes()[1] > rings.get_sizes()[0], "two images of three"
    assert lines["random"].get_ydata().tolist() == [0, 0]
    assert "ECE 0.100, NLL 0.200, Brier 0.300" in lines["epsd"].get_label()
    assert ink(figure, axes) > 0.01
    empty = metrics.reliability(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    for nothing in ({}, {"epsd": empty}):
        with pytest.raises(FigureError):
            analysis.calibration(nothing, {})


# --- landscape ------------------------------------------------------------------------------------------------------


def bowl(steep: float, points: int = 17) -> torch.Tensor:
    places = torch.linspace(-1, 1, points, dtype=torch.float64)
    return 0.2 + steep * (places[:, None] ** 2 + 2 * places[None, :] ** 2)


def test_landscapes_share_their_levels_and_the_steeper_is_darker() -> None:
    figure = analysis.loss_landscapes({"epsd": bowl(0.5), "prospr": bowl(3.0)}, 1.0)
    flat, steep, bar = figure.axes
    levels = [tuple(axes.collections[0].levels) for axes in (flat, steep)]
    assert levels[0] == levels[1]
    assert levels[0][0] == pytest.approx(0.2) and levels[0][-1] >= 9.2
    assert flat.get_xlim() == (-1, 1) and (flat.get_title(), steep.get_title()) == ("epsd", "prospr")
    assert np.median(grey(figure, steep)) < np.median(grey(figure, flat)) - 0.1
    middle = [line.get_xydata().tolist() for line in flat.lines]
    assert middle == [[[0, 0]]]
    assert "nats" in bar.get_ylabel()
    assert len(np.unique(grey(figure, steep).round(2))) > 8
    assert flat.texts, "levels are written on their lines"


@pytest.mark.parametrize(
    "surface", [torch.full((5, 5), 0.7), torch.full((5, 5), 0.0), bowl(1.0).index_fill(0, torch.tensor(0), math.nan)]
)
def test_flat_and_broken_landscapes_are_drawn(surface: torch.Tensor) -> None:
    figure = analysis.loss_landscapes({"epsd": surface.double()}, 1.0)
    assert grey(figure, figure.axes[0]).size > 0


@pytest.mark.parametrize("span", [(0.5, 0.52), (0.01, 3.0)], ids=["narrow", "wide"])
def test_no_two_contours_have_one_name(span: tuple[float, float]) -> None:
    across = torch.linspace(*span, 17, dtype=torch.float64)
    figure = analysis.loss_landscapes({"epsd": across.expand(17, 17)}, 1.0)
    names = [text.get_text() for text in figure.axes[0].texts]
    assert len(names) > 3 and len(set(names)) == len(names)


def test_no_landscape_is_an_error() -> None:
    for nothing in ({}, {"epsd": torch.full((3, 3), math.nan)}):
        with pytest.raises(FigureError, match="no finite loss"):
            analysis.loss_landscapes(nothing, 1.0)


# --- features -------------------------------------------------------------------------------------------------------


def test_features_are_signs_of_their_class_and_the_wrong_ones_are_ringed() -> None:
    points = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]])
    given = (points, torch.tensor([0, 1, 1, 0]), torch.tensor([True, True, False, True]))
    figure = analysis.features({"epsd": given}, ["3", "8"], titles={"epsd": "epsd, t-SNE"})
    axes = figure.axes[0]
    three, eight, wrong = axes.lines
    assert three.get_xydata().tolist() == [[0, 0], [1, 1]] and three.get_marker() == "$3$"
    assert eight.get_xydata().tolist() == [[1, 0], [0, 1]] and eight.get_marker() == "$8$"
    assert wrong.get_xydata().tolist() == [[0, 1]] and wrong.get_markerfacecolor() == "none"
    assert axes.get_title() == "epsd, t-SNE"
    assert ink(figure, axes) > 0.001


@pytest.mark.parametrize("classes", [10, 20])
def test_every_class_has_a_colour_of_its_own(classes: int) -> None:
    labels = torch.arange(classes)
    points = np.stack([np.arange(classes)] * 2, axis=1).astype(float)
    figure = analysis.features(
        {"epsd": (points, labels, torch.ones(classes, dtype=torch.bool))}, [str(n) for n in labels], titles={"epsd": ""}
    )
    assert len({str(line.get_color()) for line in figure.axes[0].lines[:classes]}) == classes


def test_long_names_get_markers_and_many_classes_are_cut() -> None:
    labels = torch.arange(60) % 30
    points = np.random.default_rng(0).normal(size=(60, 2))
    names = [f"class {number}" for number in range(30)]
    axes = analysis.features({"a": (points, labels, labels < 0)}, names, titles={"a": "a"}).axes[0]
    assert len(axes.lines) == 20 + 1
    assert len({(line.get_marker(), line.get_color()) for line in axes.lines[:20]}) == 20
    assert axes.lines[20].get_markeredgecolor() == "black"
    assert len(axes.lines[-1].get_xdata()) == 40, "rings only around what is shown"


def test_no_features_are_an_error() -> None:
    nothing = np.zeros((0, 2)), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
    for given in ({}, {"a": nothing}):
        with pytest.raises(FigureError):
            analysis.features(given, ["x"], titles={"a": "a"})
