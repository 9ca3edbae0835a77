"""The table of which code a result depends on, and the marks that derive from it."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import ROOT
from epsd.project import artifacts, code
from epsd.project.params import Params, bearing, override, parse, read_yaml
from epsd.project.settings import Bearing
from epsd.studies import work
from epsd.studies.plan import Cell

Edit = Callable[..., None]
NO_NUMBER = (
    "evaluation/model_card.py", "evaluation/servable.py", "figures/style.py", "detection/drawing.py", "cli.py",
    "tracking/models.py", "tracking/runs.py", "pipeline/export.py", "pipeline/describe.py", "project/presets.py",
    "tuning/report.py", "comparison/tables.py", "registry.py",
)  # fmt: skip
"""What a stage writes for eyes, what records and asks: of no mark."""


def params(**changes: Any) -> Params:
    tree = read_yaml(ROOT / "params.yaml")
    for key, value in changes.items():
        override(tree, key.replace("__", "."), value)
    return parse(tree)


def cell_mark(**changes: Any) -> str:
    work._code.cache_clear()
    data: Any = SimpleNamespace(digest="d", machine=SimpleNamespace(device=torch.device("cpu")))
    return work.mark(Cell(params(**changes), {"name": "pipeline"}), data)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the marks of the checkpoints read beside code and parameters."""
    monkeypatch.chdir(tmp_path)
    for path in (artifacts.DATA_INDEX, artifacts.MASK, artifacts.CHANNELS, artifacts.INITIAL, artifacts.VOC_INDEX,
                 artifacts.MODEL, artifacts.MODEL_CARD):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    monkeypatch.setattr(sys, "path", [str(ROOT / "stages"), *sys.path])
    return tmp_path


def marks(**changes: Any) -> dict[str, str]:
    import detect  # stages/ are scripts, no package
    import train

    own = params(**changes)
    return {
        "classifier": train.fingerprint(own),
        "detector": detect.fingerprint(own),
        "cell": cell_mark(**changes),
        "search": repr(code.digests(["prune", "train", "evaluate"], own.model_dump())),
    }


def test_every_entry_is_there() -> None:
    tree = {**params().model_dump(), "procedure": {"name": "prune_then_distill"}}
    assert not [room for room in code.CHANGES if not (code.PACKAGE / code._filled(room, tree)).exists()]
    assert not [name for name in (*code.NOTHING, *code.SHOWN) if not (code.PACKAGE / name).exists()]


def test_what_is_written_for_eyes_and_what_records_makes_nothing_stale(folder: Path, edit: Edit) -> None:
    before = marks()
    edit(*NO_NUMBER)
    assert marks() == before


@pytest.mark.parametrize(
    "file, stale",
    [
        ("training/fit.py", {"classifier", "detector", "cell", "search"}),
        ("objectives/cskd.py", {"classifier", "cell", "search"}),  # the chosen one
        ("objectives/dlb.py", set()),
        ("scores/epsd.py", {"cell", "search"}),  # a checkpoint is bound to the mask itself
        ("scores/snip.py", set()),
        ("architectures/resnet.py", {"classifier", "detector", "cell", "search"}),
        ("detectors/faster_rcnn.py", {"detector"}),
        ("detectors/ssd.py", set()),
        ("preparing/write.py", {"cell"}),  # the others are bound to the prepared data
        ("evaluation/metrics.py", {"cell", "search"}),
        ("studies/procedures/pipeline.py", {"cell"}),
        ("studies/prune_then_distill/student.py", set()),
    ],
)
def test_an_edit_makes_stale_what_it_can_change(folder: Path, edit: Edit, file: str, stale: set[str]) -> None:
    before = marks()
    edit(file)
    after = marks()
    assert {name for name in before if before[name] != after[name]} == stale


def test_a_procedure_with_a_room_depends_on_it(edit: Edit) -> None:
    tree = {**params().model_dump(), "procedure": {"name": "prune_then_distill"}}
    before = code.digests(work.CODE, tree)
    edit("studies/prune_then_distill/student.py")
    after = code.digests(work.CODE, tree)
    assert [name for name in after if after[name] != before[name]] == ["studies/prune_then_distill/student.py"]


def test_the_dense_twin_is_trained_as_the_classifier_is(folder: Path, edit: Edit) -> None:
    before = marks(detect__beside="dense")["detector"]
    edit("objectives/cskd.py")
    assert marks(detect__beside="dense")["detector"] != before


@pytest.mark.parametrize(
    "change",
    [{"data__workers": 3}, {"launch__processes": 2}, {"tracking__experiment": "other"}, {"detect__pictures": 1}],
)
def test_what_changes_no_result_is_in_no_mark(folder: Path, change: dict[str, Any]) -> None:
    assert marks(**change) == marks()


def test_other_parameters_are_in_the_marks_they_bear_on(folder: Path) -> None:
    before, after = marks(), marks(train__lr=0.03)
    assert {name for name in before if before[name] != after[name]} == {"classifier", "cell"}
    assert marks(launch__sync_batchnorm=False)["classifier"] != before["classifier"]


def test_a_note_beside_a_parameter_holds_for_what_lies_below() -> None:
    assert bearing("train.lr") == Bearing()
    assert not bearing("tracking.experiment").marked
    assert bearing("detect.detector.channels").on == ("detect/", "time/detect")
    assert bearing("prune.score.graphs_kept").only_timing and not bearing("prune.score.steps").only_timing
    assert not bearing("dataset.download").on and bearing("dataset.root").on == ("",)
