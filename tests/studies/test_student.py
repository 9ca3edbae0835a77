"""Prune, then distill from parameters: the three students, the width of the narrow one, what it cost."""

from collections.abc import Callable
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
from epsd.studies.procedures import Desk, PruneThenDistill, Trained
from epsd.studies.procedures.types import Cache
from epsd.studies.prune_then_distill.student import StudentKind, narrowed, nonzero, parameters
from epsd.training.record import Record
from toys import Killed, stop_after

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


def run(
    data: Prepared, kind: StudentKind, folder: Path, log: Callable[[Record], None] = lambda record: None, **changes: Any
) -> Trained:
    procedure = PruneThenDistill(student=kind, share=0.5, select="last")
    return procedure(params(**changes), data, Desk(folder, "m", log, Cache(), None))


def test_the_scored_student_is_the_runs_own_network(data: Prepared, tmp_path: Path) -> None:
    """Same mask and, before training, same weights as the pipeline prunes; its scoring is paid for."""
    still = {"train.lr": 1e-30, "train.weight_decay": 0.0}
    found = run(data, "scored", tmp_path / "scored", **still)
    mask, model, report, *_ = pruned(params(**still), data)
    assert found.mask.jaccard(mask) == 1.0
    mask.apply_(model)
    kept = prunable(found.model)
    assert all(torch.equal(weight, prunable(model)[name]) for name, weight in kept.items())
    free = run(data, "rewound", tmp_path / "rewound").history[-1]["cost/images_backward"]
    assert found.history[-1]["cost/images_backward"] == free + report["images_backward"] > free


def test_the_rewound_student_starts_from_the_initial_weights(data: Prepared, tmp_path: Path) -> None:
    still = {"train.lr": 1e-30, "train.weight_decay": 0.0}
    found = run(data, "rewound", tmp_path, **still)
    model = initial(params(), data)
    found.mask.apply_(model)
    assert all(torch.equal(weight, prunable(model)[name]) for name, weight in prunable(found.model).items())
    assert found.mask.kept == found.mask.total - round(0.75 * found.mask.total)
    assert found.figures["mask/sparsity"] == found.figures["teacher/sparsity"]


def test_the_narrow_student_has_as_many_parameters_as_the_sparse_network_keeps(data: Prepared, tmp_path: Path) -> None:
    asked = params()
    found = run(data, "narrow", tmp_path)
    wanted = nonzero(asked, data, Mask.from_scores(
        {name: torch.arange(float(p.numel())) for name, p in prunable(initial(asked, data)).items()}, 0.75
    ))  # fmt: skip
    size = sum(p.numel() for p in found.model.parameters())
    assert abs(size - wanted) < 0.15 * wanted
    assert found.mask.sparsity == 0
    assert found.architecture is not None
    assert found.architecture == {**asked.architecture, "width": found.architecture["width"]}
    assert 0 < found.architecture["width"] < 0.5


@pytest.fixture(scope="module")
def sizes(data: Prepared) -> set[int]:
    """Parameters of a network of 14 layers at every width that makes another one."""
    architecture = params(**{"architecture.depth": 14}).architecture
    widths = {k / 256 for k in range(1, 129)}  # of 16, 32 and 64 channels the roundings change at k / 128
    return {parameters({**architecture, "width": width}, data) for width in widths}


@pytest.mark.parametrize("wanted", [1, 600, 5_000, 19_000, 10**9])
def test_the_width_found_is_the_nearest(data: Prepared, sizes: set[int], wanted: int) -> None:
    """Against every width that makes another network."""
    asked = params(**{"architecture.depth": 14})
    size = parameters(narrowed(asked, data, wanted), data)
    assert abs(size - wanted) == min(abs(other - wanted) for other in sizes)


def test_an_architecture_without_width_is_refused_before_any_training(data: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"student: 'narrow' needs .* \(resnet.*'vgg' has none.*rewound or scored"):
        run(data, "narrow", tmp_path, lambda record: pytest.fail("trained"), architecture={"name": "vgg", "depth": 11})


def test_what_each_part_cost_adds_up(data: Prepared, tmp_path: Path) -> None:
    found = run(data, "narrow", tmp_path)
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
    whole = run(data, "scored", tmp_path / "whole")
    with pytest.raises(Killed):
        run(data, "scored", tmp_path / "killed", stop_after(4))
    again = run(data, "scored", tmp_path / "killed")
    assert all(torch.equal(v, whole.model.state_dict()[n]) for n, v in again.model.state_dict().items())
    assert again.figures["cost/student_image_passes"] == whole.figures["cost/student_image_passes"]
