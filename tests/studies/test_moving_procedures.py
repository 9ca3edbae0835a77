"""A study with rows whose masks move: pruning and self-distillation at once, and RigL."""

from pathlib import Path

import pandas as pd
import pytest

from epsd.cli import main
from epsd.registry import ParamsError
from epsd.studies import plan
from studies.test_study import QUICK, enter, write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CONCURRENT = {"name": "concurrent", "procedure": {"name": "concurrent", "every": 1}}
RIGL = {
    "name": "rigl",
    "procedure": {"name": "rigl", "every": 1},
    "set": {"prune.score": {"name": "random", "distribution": "erk"}},
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def test_rows_of_masks_that_move(project: Path) -> None:
    grid = {"scores": ["random"], "variants": [CONCURRENT, RIGL], "sparsities": [0.9], "seeds": 1, "baseline": "random"}
    file = write(project / "grid.yaml", **grid, set={**QUICK, "architecture.width": 0.5})
    assert main(["study", str(file)]) == 0
    table = pd.read_csv(project / "artifacts" / "studies" / "grid" / "cells.csv").set_index("method")
    assert list(table.index) == ["random", "concurrent", "rigl"]
    assert table["mask/kept"].nunique() == 1 and (table["mask/sparsity"].round(3) == 0.9).all()
    assert (table["model/sparsity"] >= table["mask/sparsity"] - 1e-9).all(), "recounted from the trained weights"
    assert (table["mask/effective_sparsity"] >= table["mask/sparsity"]).all()
    images = table["cost/images_backward"]
    assert images["concurrent"] == images["rigl"] > 0, "neither scores"

    from mlflow import MlflowClient

    run = MlflowClient().get_run(str(table.loc["concurrent", "run_id"]))
    assert run.data.params["procedure.every"] == "1" and run.data.tags["procedure"] == "concurrent"
    assert "lost 90.0% of its smallest weights meanwhile" in run.data.tags["mlflow.note.content"]
    told = MlflowClient().get_run(str(table.loc["rigl", "run_id"])).data.tags["mlflow.note.content"]
    assert "The mask moved every 1 steps" in told


@pytest.mark.parametrize(
    ("procedure", "sparsity", "said"),
    [
        ({"name": "concurrent"}, 0, "needs one above 0"),
        ({"name": "concurrent", "start": 0.8}, 0.5, "start: 0.8 is after end: 0.75"),
        ({"name": "rigl", "share": 1.5}, 0.5, "share: input should be less than or equal to 1"),
        ({"name": "rigl", "delta": 5}, 0.5, "unknown 'delta'.*every, share, end"),
    ],
)
def test_what_cannot_work_is_said_before_any_training(
    project: Path, procedure: dict[str, object], sparsity: float, said: str
) -> None:
    grid = {"scores": ["snip"], "variants": [{"name": "row", "procedure": procedure}], "sparsities": [sparsity]}
    with pytest.raises(ParamsError, match=said):
        plan.load(write(project / "grid.yaml", **grid, set=QUICK))
