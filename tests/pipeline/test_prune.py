"""Scores computed once and cut at several sparsities give the masks of separate scorings."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT
from epsd.data.prepared import Prepared
from epsd.datasets import DATASETS
from epsd.pipeline.prune import pruned, scored, scoring_key
from epsd.preparing.write import prepare
from epsd.project.params import Params, override, parse, read_yaml
from epsd.pruning.paths import on_path
from epsd.registry import choose

SMALL = {"data.limit": 12, "architecture.width": 0.25, "prune.batch_size": 32, "threads": 1}


def params(**changes: Any) -> Params:
    tree = read_yaml(ROOT / "params.yaml")
    for key, value in {**SMALL, **changes}.items():
        override(tree, key, value)
    return parse(tree)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder: Path = tmp_path_factory.mktemp("data")
    prepare(choose(DATASETS, {"name": "digits"})(), folder, limit=12)
    return Prepared.load(folder)


@pytest.mark.filterwarnings("ignore:no weight survives")
@pytest.mark.parametrize(
    "score", [{"name": "epsd"}, {"name": "grasp"}, {"name": "synflow"}, {"name": "random", "distribution": "erk"}]
)
@pytest.mark.parametrize("objective", ["cskd", "pskd"])
def test_shared_scores_equal_separate_ones(score: dict[str, Any], objective: str, data: Prepared) -> None:
    common = {"prune.score": score, "objective": {"name": objective}, "seed": 3}
    known = scored(params(**common), data)
    for sparsity, control in ((0.5, "none"), (0.9, "reinitialised")):
        mine = params(**common, **{"prune.sparsity": sparsity, "prune.control": control})
        assert scoring_key(mine) == scoring_key(params(**common))
        apart, shared = pruned(mine, data), pruned(mine, data, known)
        assert all(torch.equal(keep, shared.mask.keep[name]) for name, keep in apart.mask.keep.items())
        weights = dict(shared.model.named_parameters())
        assert all(torch.equal(weight, weights[name]) for name, weight in apart.model.named_parameters())
        measured = {"seconds", "peak_memory_mib"}
        assert apart.report.keys() == shared.report.keys()
        assert {k: v for k, v in apart.report.items() if k not in measured} == {
            k: v for k, v in shared.report.items() if k not in measured
        }


@pytest.mark.filterwarnings("ignore:no weight survives", "ignore:.*lie on no path")
def test_the_report_says_what_of_the_final_mask_is_in_effect(data: Prepared) -> None:
    """Of the mask that is trained, after the control."""
    for control in ("none", "shuffled"):
        found = pruned(params(**{"prune.sparsity": 0.97, "prune.control": control}), data)
        effective = on_path(found.model, found.mask, data.image_shape)
        assert found.report["effective_sparsity"] == pytest.approx(1 - effective.kept / effective.total)
        assert found.examined is not None
        assert [row["on_path"] for row in found.examined.rows()] == [kept for kept, _ in effective.per_layer().values()]
        assert found.report["on_path"] < 1 < 1 + found.report["random_erk_gini"]


def test_scores_are_not_shared_over_rounds(data: Prepared) -> None:
    several = params(**{"prune.rounds": 2})
    with pytest.raises(ValueError, match="rounds 1"):
        pruned(several, data, scored(several, data))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"prune.score.steps": 1}, {"objective.weight": 2.0}, {"data.flip": True}]
)
def test_another_scoring_has_another_key(change: dict[str, Any]) -> None:
    assert scoring_key(params(**change)) != scoring_key(params())
