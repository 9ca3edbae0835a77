"""A study's cells in a storage: handed out once each, on one machine or several, whoever is killed."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import mysql
import postgres
from epsd.cli import main
from epsd.engine import ledger as engine
from epsd.engine.ledger import DONE, RUNNING, Ledger
from epsd.engine.storage import open_storage
from epsd.studies import StudyError, plan, queue
from epsd.studies.queue import Queue, Session
from epsd.studies.work import Place, Result
from epsd.tracking.runs import read_runs
from studies.test_study import QUICK, begin, enter, write

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore::UserWarning")
SESSION = Session("", [])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder with the repository's presets."""
    return enter(tmp_path, monkeypatch)


def laid(path: Path, storage: str | None = None) -> Queue:
    made = plan.load(path)
    found = Queue(made, Place(made.study.name), storage)
    found.lay()
    return found


def result(*_: Any, metrics: dict[str, float] | None = None) -> Result:
    return Result("r", 0, {}, {"test/top1": 0.5} if metrics is None else metrics, {}, 1.0)


def cells_of(made: Queue, order: list[str]) -> list[str]:
    return [str(made.cells[own].cell) for own in order]


def test_a_worker_stays_with_what_it_has_computed_and_leaves_to_others_what_they_have(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = laid(write(project / "grid.yaml", sparsities=[0.5, 0.8], seeds=1))
    other = laid(project / "grid.yaml")
    taken = other.ledger.claim(other.ledger.trials())
    assert taken is not None and taken.number == 0
    order: list[str] = []

    def train(plan_: Any, place: Any, own: str, *_: Any) -> Result:
        order.append(own)
        return result()

    monkeypatch.setattr(queue, "run_cell", train)
    with other.ledger.at_work():  # which gives its cell back, as a process that is stopped does
        monkeypatch.setattr(engine, "POLL", 0.01)
        late = Session("", [], time.time() + 0.5)
        first.work(late)
    assert cells_of(first, order) == ["random cskd s0.5 seed 0", "random cskd s0.8 seed 0", "epsd cskd s0.8 seed 0"]
    first.work(SESSION)
    assert cells_of(first, order[3:]) == ["epsd cskd s0.5 seed 0"]


def test_a_cell_without_the_metric_is_done_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = laid(write(project / "grid.yaml", sparsities=[0.5], seeds=1))
    monkeypatch.setattr(queue, "run_cell", lambda *a: result(metrics={}))
    made.work(SESSION)
    assert {trial.state.name for trial in made.ledger.trials()} == {"PRUNED"} and len(made.done()) == 2
    laid(project / "grid.yaml")
    assert len(made.ledger.trials()) == 2


def test_a_bug_is_shown_and_its_cell_is_tried_by_the_next_session_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = laid(write(project / "grid.yaml", sparsities=[0.5], seeds=1))
    tried: list[str] = []

    def broken(plan_: Any, place: Any, own: str, *_: Any) -> Result:
        tried.append(own)
        raise KeyError("bug")

    monkeypatch.setattr(queue, "run_cell", broken)
    for left in (1, 0):
        with pytest.raises(KeyError):
            made.work(SESSION)
        assert made.left(made.ledger.trials(), SESSION) == left
    made.work(SESSION)
    assert len(tried) == len(set(tried)) == 2
    laid(project / "grid.yaml")
    assert made.left(made.ledger.trials(), Session("", [0, 1])) == 2


@pytest.mark.parametrize("changes, other", [({"data.limit": 14}, "data"), ({"train.lr": 0.05}, "code, parameters")])
def test_others_at_work_on_the_same_cells_with_other_data_or_code_are_named(
    changes: dict[str, Any], other: str, project: Path
) -> None:
    made = laid(write(project / "grid.yaml", sparsities=[0.5], seeds=1))
    assert made.ledger.claim(made.ledger.trials())
    changed = write(project / "changed.yaml", name="grid", sparsities=[0.5], seeds=1, set={**QUICK, **changes})
    with pytest.raises(StudyError, match=rf"is training the cell 'epsd cskd s0.5 seed 0' of .* with other {other}"):
        laid(changed)


def test_the_storage_of_the_file_or_the_command_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(project / "grid.yaml", storage="postgresql://me:secret@127.0.0.1:1/none", sparsities=[0.5])
    assert main(["study", "grid.yaml", "--storage", "nosuch://x/y"]) == 1
    assert capsys.readouterr().err.startswith("epsd: storage: nosuch://x/y cannot be used")
    made = laid(project / "grid.yaml", "elsewhere.journal")
    made.ledger.add_done(next(iter(made.cells)), 0.5, result=result()._asdict())
    assert main(["study", "grid.yaml", "--list", "--storage", "elsewhere.journal"]) == 0
    assert capsys.readouterr().out.split("\n")[0] == "done  epsd cskd s0.5 seed 0"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "postgresql", "mysql"])
def test_a_killed_worker_loses_and_doubles_no_cell(kind: str, project: Path, request: pytest.FixtureRequest) -> None:
    """SIGKILL in mid-training: another worker does that cell, from its last epoch on, and each is done once."""
    storage = None
    if server := {"postgresql": postgres.server, "mysql": mysql.server}.get(kind):
        context = server()
        storage = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
    epochs = 12
    slow = {**QUICK, "train.epochs": epochs, "data.limit": 40}
    write(project / "grid.yaml", sparsities=[0.5, 0.8], seeds=1, set=slow, storage=storage)
    process = begin(project, "--workers", "2")
    victim = running(project, storage)
    os.kill(victim.user_attrs["owner"]["pid"], signal.SIGKILL)
    assert process.wait(timeout=400) == 0
    made = laid(project / "grid.yaml", storage)
    trials = made.ledger.trials()
    assert sorted(trial.user_attrs["slot"] for trial in trials if trial.state in DONE) == sorted(made.cells)
    (retry,) = [trial for trial in trials if trial.user_attrs.get("retry_of") == victim.number]
    assert retry.state in DONE and retry.user_attrs["owner"]["pid"] != victim.user_attrs["owner"]["pid"]
    assert retry.user_attrs["run_id"] == victim.user_attrs["run_id"]
    assert len(read_runs(["epsd"], ["kind=cell"])) == 4
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    for trial in trials:
        if trial.state in DONE:
            points = client.get_metric_history(trial.user_attrs["run_id"], "train/loss")
            assert sorted(point.step for point in points) == list(range(1, epochs + 1))
    assert not client.search_runs(["1"], "attributes.status = 'RUNNING'")


def running(project: Path, storage: str | None) -> Any:
    """A trial in the middle of its training."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        begun = {path.parent.name for path in (project / ".epsd/studies/grid/work").glob("*/last.safetensors")}
        if begun:
            where = storage or project / ".epsd/studies/grid/trials.journal"
            for trial in Ledger(open_storage(where), "cells of grid", []).trials():
                if trial.state == RUNNING and trial.user_attrs["slot"] in begun:
                    return trial
        time.sleep(0.05)
    raise AssertionError("no cell got that far")
