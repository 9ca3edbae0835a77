"""A study with a "prune, then distill" row: one run per cell, the same metric names, its own network and story."""

import json
from pathlib import Path

import pandas as pd
import pytest

from epsd.cli import main
from epsd.registry import ParamsError
from epsd.studies import plan
from epsd.studies.work import Place
from studies.test_study import QUICK, enter, write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROW = {"name": "ptd", "procedure": {"name": "prune_then_distill", "share": 0.5, "select": "last"}}
GRID = {"scores": ["snip"], "variants": [ROW], "sparsities": [0.75], "seeds": 1, "baseline": None}
QUICKER = {**QUICK, "architecture.width": 0.5, "data.validation": 0.25}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def test_a_cell_of_a_study(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPSD_QUIET", "0")
    file = write(project / "grid.yaml", **GRID, set=QUICKER)
    assert main(["study", str(file)]) == 0
    assert "ptd" in capsys.readouterr().out
    folder = project / "artifacts" / "studies" / "grid"
    table = pd.read_csv(folder / "cells.csv").set_index("method")
    assert list(table.index) == ["snip", "ptd"]
    epochs = 2 + 2 * 1 + 2  # teacher, two rounds of 65 %, student
    images = table.loc["ptd", "cost/images_backward"] / epochs
    assert images > 0 and images % 32 == 0
    assert table.loc["snip", "cost/images_backward"] == 2 * images + 32
    parts = table.loc["ptd", [f"cost/{name}_image_passes" for name in ("teacher", "rounds", "student")]]
    assert parts.sum() == table.loc["ptd", "cost/image_passes"]
    nonzero = table["model/parameters_nonzero"]
    assert nonzero["ptd"] == pytest.approx(nonzero["snip"], rel=0.15)
    assert {"accuracy_against_sparsity.png", "cost_against_accuracy.png"} <= {path.name for path in folder.iterdir()}
    costs = pd.read_csv(folder / "cost_against_accuracy.csv").set_index("method")
    assert costs.loc["ptd", "image_passes"] > 2 * costs.loc["snip", "image_passes"]

    from mlflow import MlflowClient

    run_id = str(table.loc["ptd", "run_id"])
    run = (client := MlflowClient()).get_run(run_id)
    assert run.data.params["procedure.student"] == "narrow"
    assert run.data.tags["procedure"] == "prune_then_distill"
    assert "2 rounds of 1 epochs" in run.data.tags["mlflow.note.content"]
    phases = [point.value for point in client.get_metric_history(run_id, "train/phase")]
    assert phases == [0, 0, 1, 2, 3, 3]
    assert len(client.get_metric_history(run_id, "val/top1")) >= epochs
    card = json.loads(Path(client.download_artifacts(run_id, "model/model.json")).read_text())
    assert 0 < card["architecture"]["width"] < 0.5


@pytest.mark.parametrize(
    ("procedure", "changes", "said"),
    [
        ({"student": "small"}, {}, "student: .*'narrow', 'rewound' or 'scored'"),
        ({"rounds": 7}, {}, "unknown 'rounds'.*share, teacher_epochs"),
        ({"round_epochs": 3}, {}, "round_epochs: 3 is more than the teacher's 2"),
        ({}, {"prune.channel_cap": 1.0}, "prune_then_distill goes by magnitudes"),
        ({}, {"prune.rescale": True}, "prune_then_distill goes by magnitudes"),
        ({}, {"architecture": {"name": "vgg", "depth": 11}, "dataset": "cifar"}, "student: 'narrow' needs"),
    ],
)
def test_what_cannot_work_is_said_before_any_training(
    project: Path, procedure: dict[str, object], changes: dict[str, object], said: str
) -> None:
    row = {**ROW, "procedure": {**ROW["procedure"], **procedure}}
    small = {key: value for key, value in QUICKER.items() if not (changes and key.startswith("architecture"))}
    file = write(project / "grid.yaml", **{**GRID, "variants": [row]}, set={**small, **changes})
    with pytest.raises(ParamsError, match=said):
        plan.load(file)
    assert not Place("grid").folder.exists()
