"""Figures by what they contain: the numbers that are drawn, labels with units, styles that need no colour."""

import math
import re
from pathlib import Path

import pytest
import torch

from epsd.evaluation import metrics
from epsd.figures import style as figures


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_confusion_writes_counts_and_shades_shares() -> None:
    table = torch.tensor([[3, 1], [0, 8]])
    figure = figures.confusion(table, ["cat", "dog"])
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]
    assert sorted(texts(axes)) == ["1", "3", "8"]  # a zero is left blank
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert "12 test images" in axes.get_title()
    assert figure.axes[1].get_ylabel() == "share of the true class"


def test_numbers_are_legible_on_their_shade() -> None:
    axes = figures.confusion(torch.tensor([[3, 1], [0, 8]]), ["cat", "dog"]).axes[0]
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert colours == {"3": "white", "1": "black", "8": "white"}


def test_confusion_of_many_classes_stays_readable_and_of_an_empty_one_finite(tmp_path: Path) -> None:
    table = torch.eye(100, dtype=torch.int64)
    table[3, 3] = 0
    figure = figures.confusion(table, [f"class {number}" for number in range(100)])
    assert texts(figure.axes[0]) == []
    assert figure.get_size_inches().max() <= 13
    assert torch.isfinite(torch.as_tensor(figure.axes[0].images[0].get_array().tolist())).all()


def test_reliability_draws_the_filled_bins_only() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.65, 0.35]]).log()
    table = metrics.reliability(logits, torch.tensor([0, 1, 0]), bins=10)
    upper, lower = figures.reliability(table).axes
    bars = {round(bar.get_x(), 6): bar.get_height() for bar in upper.patches}
    assert len(bars) == 2
    assert sorted(bars.values()) == [0.5, 1.0]
    assert sorted(round(bar.get_height(), 6) for bar in lower.patches) == [round(1 / 3, 6), round(2 / 3, 6)]
    assert f"{table.ece():.4f}" in upper.get_title()
    assert lower.get_xlabel() == "confidence (largest probability)"
    assert upper.get_ylabel() == "accuracy (share right)"


def test_density_names_every_layer_and_the_dead() -> None:
    axes = figures.density_per_layer({"conv1": 0.5, "conv2": 0.0, "fc": 0.031}, 0.05).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [50, 0, 3.1]
    assert "dead layer" in texts(axes)[1]
    assert "%" in axes.get_xlabel()
    assert axes.yaxis_inverted()
    assert axes.lines[0].get_xdata()[0] == 5


def test_a_mask_at_a_glance() -> None:
    """Each weight is in one bar, on its side of the threshold; the first layer's squares are its filters."""
    from epsd.masks import Mask

    scores = {"conv1": torch.rand(5, 3, 2, 2), "fc": torch.rand(4, 10)}
    scores["fc"][0, :7] = 0
    mask = Mask.from_scores(scores, 0.5)
    figure = figures.glance(mask, scores)
    layers, ranked, first = figure.axes
    assert [round(bar.get_width(), 4) for bar in layers.patches] == [
        round(100 * float(keep.float().mean()), 4) for keep in mask.keep.values()
    ]
    removed, kept = (patch.get_data() for patch in ranked.patches)
    assert (removed.values.sum(), kept.values.sum()) == (mask.total - mask.kept - 7, mask.kept)
    least = min(scores[name][keep].min() for name, keep in mask.keep.items())
    assert ranked.lines[0].get_xdata()[0] == pytest.approx(float(least.log10()))
    assert "7 scores of 0" in ranked.get_legend().get_title().get_text()
    drawn = torch.tensor(first.images[0].get_array().filled(-1))
    assert drawn.shape == (5, 8) and float(drawn[:2, 3:5].sum()) == pytest.approx(
        float(mask.keep["conv1"][1].float().mean(0).sum())
    )
    assert len(figures.glance(mask, None).axes) == 2


def test_scores_that_may_be_negative_are_drawn_as_they_are() -> None:
    from epsd.masks import Mask

    scores = {"fc": torch.randn(40, 100)}
    scores["fc"][0, 0] = 1e6
    mask = Mask.from_scores(scores, 0.9)
    ranked = figures.glance(mask, scores).axes[1]
    assert sum(patch.get_data().values.sum() for patch in ranked.patches) == 4000
    assert ranked.get_xlim()[0] < -1 and ranked.get_xlim()[1] < 10


def test_curves_differ_without_colour_and_gaps_stay_gaps() -> None:
    panels = {"loss (nats)": {"train/loss": [2.0, 1.0], "val/nll": [2.1, None]}, "learning rate": {"lr": [0.1, 0.01]}}
    figure = figures.curves(panels)
    loss, rate = figure.axes
    styles = {(line.get_linestyle(), line.get_marker()) for line in loss.lines}
    assert len(styles) == 2
    assert {line.get_color() for axes in figure.axes for line in axes.lines} == {"black"}
    assert list(loss.lines[0].get_xdata()) == [1, 2]
    assert math.isnan(loss.lines[1].get_ydata()[1])
    assert rate.get_xlabel() == "epoch"
    assert loss.get_ylabel() == "loss (nats)"


def test_history_columns_become_panels_with_units() -> None:
    history = {"epoch": [1.0], "train/loss": [2.0], "val/loss": [3.0], "val/top1": [0.5], "time/epoch": [9.0]}
    panels = figures.history_panels(history)
    assert panels == {
        "loss (nats)": {"train/loss": [2.0], "val/loss": [3.0]},
        "top-1 (share right)": {"val/top1": [0.5]},
    }


def test_save_writes_a_png_of_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        figures.save(figures.density_per_layer({"fc": 0.5}), tmp_path / name)
    first, second = (tmp_path / name for name in ("a.png", "b.png"))
    assert first.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert first.read_bytes() == second.read_bytes()


def test_matplotlib_stays_off_the_start_up_path() -> None:
    import subprocess
    import sys

    code = "import sys, epsd.figures.style; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_training_records_has_a_panel_each_and_ink_in_it() -> None:
    from epsd.objectives import OBJECTIVES
    from epsd.project.recipes import Recipe
    from epsd.training.fit import fit
    from inks import ink
    from toys import ToyBatches, convnet

    records = fit(
        convnet(), ToyBatches(), objective=OBJECTIVES["cskd"](), recipe=Recipe(epochs=3), validation=ToyBatches()
    )
    history = {name: [record[name] for record in records] for name in records[0]}
    panels = figures.history_panels(history)
    assert {label: set(series) for label, series in panels.items()} == {
        "loss (nats)": {"train/loss", "val/nll"},
        "terms of the objective (nats)": {"train/cross_entropy", "train/distillation"},
        "gradient norm\n(nats per unit of weight)": {"train/grad_norm"},
        "top-1 (share right)": {"train/top1", "val/top1"},
        "learning rate": {"train/lr"},
    }
    figure = figures.curves(panels)
    for axes, series in zip(figure.axes, panels.values(), strict=True):
        assert [line.get_ydata().tolist() for line in axes.lines] == list(series.values())
        assert ink(figure, axes) > 0.005


@pytest.mark.parametrize("history", [{}, {"epoch": [1.0]}])
def test_a_history_without_curves_gives_no_panel(history: dict[str, list[float]]) -> None:
    assert figures.history_panels(history) == {}


def test_a_name_with_dollars_is_no_formula(tmp_path: Path) -> None:
    names = [r"$\frac{$", "a$b$c", "plain"]
    figure = figures.confusion(torch.eye(3), names)
    figures.save(figure, tmp_path / "c.png")
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert [text.replace(r"\$", "$") for text in shown] == names
    assert not any(len(re.findall(r"(?<!\\)\$", text)) for text in shown)
