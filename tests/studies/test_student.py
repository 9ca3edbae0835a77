"""Prune, then distill from parameters: the three students, the width of the narrow one, what it cost."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT
from epsd.data.prepared import Prepared
from epsd.datasets import DATASETS
from epsd.masks import Mask, prunable
from epsd.pipeline.prune import initial, pruned
from epsd.preparing.write import prepare
from epsd.project.params import Params, override, parse, read_yaml
from epsd.registry import ParamsError
from epsd.studies.prune_then_distill import student as made
from epsd.studies.prune_then_distill.rewinding import Rewinding
from epsd.studies.prune_then_distill.student import Distilled, distilled, narrowed, nonzero, parameters
from toys import Killed, stop_after

SETTINGS = Rewinding(share=0.5, select="last")
QUICK = {
    "architecture.width": 0.5, "train.epochs": 1, "train.batch_size": 24, "prune.batch_size": 24, "threads": 1,
    "train.warmup_epochs": 0, "prune.sparsity": 0.75, "prune.score": {"name": "snip"}, "device": "cpu",
}  # fmt: skip


def params(**changes: Any) -> Params:
    tree = read_yaml(ROOT / "presets" / "digits.yaml")
    for name, value in {**QUICK, **changes}.items():
        override(tree, name, value)
    return parse(tree)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("data")
    prepare(DATASETS["digits"]()(), folder, seed=0, limit=8, validation=0.25, test=0.2)
    return Prepared.load(folder)


def run(data: Prepared, kind: made.StudentKind, **changes: Any) -> Distilled:
    return distilled(params(**changes), data, SETTINGS, kind, on_epoch=lambda record: None)


def test_the_scored_student_is_the_runs_own_network(data: Prepared) -> None:
    """Same mask and, before training, same weights as the pipeline prunes; its scoring is paid for."""
    asked = params(**{"train.lr": 1e-30, "train.weight_decay": 0.0})
    found = distilled(asked, data, SETTINGS, "scored", on_epoch=lambda record: None)
    mask, model, report, *_ = pruned(asked, data)
    assert found.mask.jaccard(mask) == 1.0
    mask.apply_(model)
    kept = prunable(found.student)
    assert all(torch.equal(weight, prunable(model)[name]) for name, weight in kept.items())
    free = run(data, "rewound").history[-1]["cost/images_backward"]
    assert found.history[-1]["cost/images_backward"] == free + report["images_backward"] > free


def test_the_rewound_student_starts_from_the_initial_weights(data: Prepared) -> None:
    still = {"train.lr": 1e-30, "train.weight_decay": 0.0}
    found = run(data, "rewound", **still)
    model = initial(params(), data)
    found.mask.apply_(model)
    assert all(torch.equal(weight, prunable(model)[name]) for name, weight in prunable(found.student).items())
    assert found.mask.kept == found.mask.total - round(0.75 * found.mask.total)
    assert found.figures["mask/sparsity"] == found.figures["teacher/sparsity"]


def test_the_narrow_student_has_as_many_parameters_as_the_sparse_network_keeps(data: Prepared) -> None:
    asked = params()
    found = run(data, "narrow")
    wanted = nonzero(asked, data, Mask.from_scores(
        {name: torch.arange(float(p.numel())) for name, p in prunable(initial(asked, data)).items()}, 0.75
    ))  # fmt: skip
    size = sum(p.numel() for p in found.student.parameters())
    assert abs(size - wanted) < 0.15 * wanted
    assert found.mask.sparsity == 0
    assert found.architecture == {**asked.architecture, "width": found.architecture["width"]}
    assert 0 < found.architecture["width"] < 0.5


@pytest.mark.parametrize("wanted", [1, 600, 5_000, 19_000, 10**9])
def test_the_width_found_is_the_nearest(data: Prepared, wanted: int) -> None:
    """Against every width that makes another network."""
    asked = params(**{"architecture.depth": 14})
    widths = {channels / 64 for channels in range(1, 33)} | {0.5 * k / 512 for k in range(1, 513)}
    sizes = {parameters({**asked.architecture, "width": width}, data) for width in widths}
    size = parameters(narrowed(asked, data, wanted), data)
    assert abs(size - wanted) == min(abs(other - wanted) for other in sizes)


def test_an_architecture_without_width_is_refused_before_any_training(data: Prepared) -> None:
    with pytest.raises(ParamsError, match=r"student: 'narrow' needs .* \(resnet.*'vgg' has none.*rewound or scored"):
        distilled(
            params(architecture={"name": "vgg", "depth": 11}),
            data,
            SETTINGS,
            on_epoch=lambda record: pytest.fail("trained"),
        )


def test_what_each_part_cost_adds_up(data: Prepared) -> None:
    found = run(data, "narrow")
    last = found.history[-1]
    for unit in ("image_passes", "seconds"):
        parts = [found.figures[f"cost/{name}_{unit}"] for name in ("teacher", "rounds", "student")]
        assert sum(parts) == pytest.approx(last[f"cost/{unit}"])
        assert min(parts) > 0
    assert found.figures["cost/student_image_passes"] == found.figures["cost/teacher_image_passes"] * 4 / 3
    assert found.figures["teacher/rounds"] == 2
    assert {"teacher/dense_top1", "teacher/pruned_nll"} <= set(found.figures)


def test_it_goes_on_in_its_folder(data: Prepared, tmp_path: Path) -> None:
    """The scoring of the student is not paid twice."""
    whole = run(data, "scored")
    with pytest.raises(Killed):
        distilled(params(), data, SETTINGS, "scored", on_epoch=stop_after(4), folder=tmp_path, mark="m")
    again = distilled(params(), data, SETTINGS, "scored", on_epoch=lambda record: None, folder=tmp_path, mark="m")
    assert all(torch.equal(v, whole.student.state_dict()[n]) for n, v in again.student.state_dict().items())
    assert again.figures["cost/student_image_passes"] == whole.figures["cost/student_image_passes"]
