"""Accuracy against latency: a point for every form of every run, methods by colour and forms by marker."""

from pathlib import Path

import pytest

from epsd.comparison.types import ComparisonError, Entry
from epsd.figures import deployed, study

SETTINGS = ("batch1_one_thread", "batch32_one_thread")


def run(seed: int, score: str, *, int8: bool = True, began: float = 0, top1: float = 0.9) -> Entry:
    """int8 is twice as fast as fp32, which is twice as fast as torch; each loses a hundredth."""
    metrics = {"test/top1": top1, "deploy/onnx_top1": top1 - 0.01} | ({"deploy/int8_top1": top1 - 0.02} if int8 else {})
    for setting, factor in zip(SETTINGS, (1.0, 30.0), strict=True):
        for form, ms in (("torch", 0.4), ("onnx", 0.2), *([("int8", 0.1)] if int8 else [])):
            metrics[f"latency/{form}_{setting}_ms"] = ms * factor * (1 + seed / 100)
    metrics |= {"model/bytes_sparse": 5e4, "deploy/onnx_bytes": 3e5, **({"deploy/int8_bytes": 1e5} if int8 else {})}
    params = {"seed": str(seed), "prune.sparsity": "0.9", "prune.score.name": score, "objective.name": "cskd"}
    return Entry({**params, "prune.control": "none"}, metrics, began, "d", "", {"versions.cpu": "A x2"})


def runs() -> list[Entry]:
    return [run(0, "epsd"), run(1, "epsd"), run(0, "random", int8=False)]


def test_every_form_of_every_run_is_a_point() -> None:
    points = deployed.points([*runs(), run(0, "epsd", began=-1, top1=0.1)], SETTINGS)
    assert len(points) == 3 + 3 + 2, "of two runs of one configuration and seed the later one counts"
    int8 = points[(points["form"] == "int8") & (points["seed"] == 1)].iloc[0]
    assert int8["accuracy"] == pytest.approx(0.88)
    assert [int8[setting] for setting in (*SETTINGS, "size")] == pytest.approx([0.101, 3.03, 100])
    assert int8["method"] == "epsd + cskd, sparsity 0.9: ONNX int8"
    assert set(points["of"]) == {"epsd + cskd, sparsity 0.9", "random + cskd, sparsity 0.9"}


def test_the_figure_has_a_panel_per_batch_size_and_one_for_the_size_and_looks_by_method_and_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(deployed, "save", lambda figure, path: drawn.append(figure))
    deployed.draw(runs(), tmp_path / "figure.png")
    (figure,) = drawn
    assert [axes.get_xlabel().splitlines()[0].partition(",")[0] for axes in figure.axes] == [
        "ms of a pass: 1 image",
        "ms of a pass: 32 images",
        "kB of the file",
    ]
    looks = {box.get_label(): box[0] for box in figure.axes[0].containers}
    assert len(looks) == 5
    of = {name: (line.get_color(), line.get_marker()) for name, line in looks.items()}
    epsd = [look for name, look in of.items() if name.startswith("epsd")]
    assert len({colour for colour, _ in epsd}) == 1 and len({marker for _, marker in epsd}) == 3
    torches = [look for name, look in of.items() if ": torch" in name]
    assert len({marker for _, marker in torches}) == 1 and len({colour for colour, _ in torches}) == 2


@pytest.mark.parametrize("top1", [0.011, 0.5, 1.0])
def test_shares_end_at_one_around_a_single_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top1: float) -> None:
    drawn = []
    monkeypatch.setattr(deployed, "save", lambda figure, path: drawn.append(figure))
    deployed.draw([run(0, "epsd", int8=False, top1=top1)], tmp_path / "figure.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert -0.02 <= low < top1 - 0.01 < top1 < high <= 1.02


def test_it_is_written_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        deployed.draw(runs(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert study.COSTS.keys() == {"seconds", "image_passes"}


def test_runs_that_were_not_timed_are_named(tmp_path: Path) -> None:
    bare = Entry({"seed": "0", "prune.sparsity": "0.9"}, {"test/top1": 0.9})
    with pytest.raises(ComparisonError, match="--figure: none of 1 runs was timed"):
        deployed.draw([bare], tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
