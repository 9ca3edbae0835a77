"""Two machines, run as two folders: one database, one MLflow server, each with its own prepared data.

What docs/scaling.md tells to start where, and what it says of one that dies.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest

import postgres
import warm
from conftest import ROOT
from epsd.engine.ledger import DONE, RUNNING, Ledger
from epsd.engine.storage import open_storage
from studies.test_study import QUICK, write
from tracking_server import Server
from tuning.test_tuning import write as write_params

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore::UserWarning"),
]


class World(NamedTuple):
    """What the machines share."""

    storage: str
    tracking: str

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.tracking)

    def ledger(self, name: str) -> Ledger:
        return Ledger(open_storage(self.storage), name)

    def start(self, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
        kept = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
        environment = {**kept, "EPSD_QUIET": "1", "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": self.tracking}
        command = [sys.executable, "-m", "epsd.cli", *arguments]  # a whole group of processes is to be killed
        return subprocess.Popen(
            command, cwd=folder, env=environment, text=True, start_new_session=True, stderr=subprocess.PIPE
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A database and a tracking server."""
    with postgres.server() as storage:
        server = Server(tmp_path_factory.mktemp("server"))
        server.start()
        yield World(storage, server.uri)
        server.kill()


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders, each a project with nothing in it yet."""
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
        (folder / "dvc.yaml").write_text("stages: {}\n")
        shutil.copy(ROOT / "params.yaml", folder)
        (folder / "presets").symlink_to(ROOT / "presets")
    return folders


def begun(ledger: Callable[[], Ledger], folder: Path) -> None:
    """Wait until a process that was started in `folder` is in the middle of a trial."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            for trial in ledger().trials():
                if trial.state == RUNNING and "run_id" in trial.user_attrs:
                    pid = trial.user_attrs["owner"]["pid"]
                    if Path(f"/proc/{pid}/cwd").resolve() == folder:
                        return
        except (KeyError, OSError):  # not made yet, or ended meanwhile
            pass
        time.sleep(0.1)
    raise AssertionError("no trial got that far")


def test_a_study_on_two_machines_of_which_one_dies(world: World, machines: tuple[Path, Path]) -> None:
    one, _ = machines
    slow = {**QUICK, "train.epochs": 12, "data.limit": 40}
    for folder in machines:
        write(folder / "grid.yaml", sparsities=[0.5, 0.8], seeds=1, set=slow)
    arguments = ("study", "grid.yaml", "--storage", world.storage)
    first, second = (world.start(folder, *arguments) for folder in machines)
    for folder in machines:
        begun(lambda: world.ledger("cells of grid"), folder)
    os.killpg(first.pid, signal.SIGKILL)
    _, errors = second.communicate(timeout=400)
    assert second.returncode == 0, errors
    again = world.start(one, *arguments)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors

    done = [trial for trial in world.ledger("cells of grid").trials() if trial.state in DONE]
    assert len(done) == len({trial.user_attrs["slot"] for trial in done}) == 4
    tables = [pd.read_csv(folder / "artifacts/studies/grid/table.csv") for folder in machines]
    assert tables[0].equals(tables[1]) and set(tables[0]["seeds"]) == {1}
    runs = world.client().search_runs(["1"], "tags.kind = 'cell'")
    assert sorted(run.info.run_id for run in runs if run.info.status == "FINISHED") == sorted(
        trial.user_attrs["run_id"] for trial in done
    )
    assert {run.info.status for run in runs} == {"FINISHED", "KILLED"}
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert world.client().get_run(parent).data.metrics["study/done"] == 4
    data = [sorted(path.name for path in (folder / ".epsd/studies/grid/data").glob("*/")) for folder in machines]
    assert data[0] == data[1] and len(data[0]) == 1, "each has prepared its own"


def test_a_search_on_two_machines_of_which_one_dies(world: World, machines: tuple[Path, Path]) -> None:
    one, two = machines
    search = {"tune.storage": world.storage, "tune.trials": 5, "train.epochs": 25, "tune.pruner": "none"}
    for folder in machines:
        write_params(folder, **search)
        subprocess.run([warm.python(), ROOT / "stages/prepare.py", "--quiet"], cwd=folder, check=True)
    first = world.start(one, "tune")
    begun(lambda: world.ledger("quick"), one)
    second = world.start(two, "tune", "--resume")
    begun(lambda: world.ledger("quick"), two)
    os.killpg(first.pid, signal.SIGKILL)
    _, errors = second.communicate(timeout=400)
    assert second.returncode == 0, errors
    done = [trial for trial in world.ledger("quick").trials() if trial.state in DONE]
    assert sorted(trial.user_attrs["slot"] for trial in done) == list(range(5))
    runs = world.client().search_runs(["1"], "tags.kind = 'trial' and tags.study = 'quick'")
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs}) == 1
    statuses = [run.info.status for run in runs]
    assert statuses.count("FINISHED") == 5 and "RUNNING" not in statuses
