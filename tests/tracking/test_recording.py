import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tracking_server
from conftest import ROOT
from epsd.project import processes, runtime
from epsd.tracking import new_id, pages, store, track
from epsd.tracking.addresses import AddressError, shown, tracking_uri
from epsd.tracking.replay import replay
from epsd.tracking.spool import resolve
from epsd.tracking.store import Store
from epsd.tracking.texts import as_text, conflicts
from epsd.tracking.ui import ui_address
from forks import in_processes

PARAMS = {
    "train.lr": 0.1,
    "train.clip_norm": None,
    "evaluate.ece_bins": 15,
    "detect.epochs": 12,
    "dataset.name": "digits",
}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch, empty_store) -> Path:
    """A project of its own: its store, its spool, nothing said yet."""
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "dvc.yaml").touch()
    shutil.copy(empty_store, folder)
    monkeypatch.chdir(folder)
    runtime._said.clear()
    return folder


def session(stage: str = "train", run_id: str | None = None, **more):
    return track(stage, **{"experiment": "epsd", "name": "a-run", "run_id": run_id, "params": PARAMS, **more})


def client():
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri())


def all_runs() -> list:
    found = client()
    return list(found.search_runs([e.experiment_id for e in found.search_experiments()]))


def points(run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client().get_metric_history(run_id, key))


def spooled() -> list[Path]:
    return sorted(Path(".epsd/spool").glob("*.jsonl"))


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [(0.95, "0.95"), (5e-4, "0.0005"), (None, "null"), (True, "true"), ("cskd", "cskd"), ([0.5, 1], "[0.5, 1]")],
)
def test_parameters_read_as_in_params_yaml(value, text):
    assert as_text(value) == text


def test_numbers_of_numpy_and_torch_are_numbers():
    import numpy as np
    import torch

    assert [as_text(value) for value in (np.int64(3), np.float32(0.5), torch.tensor(2))] == ["3", "0.5", "2"]


def test_one_is_one_point_zero():
    known = {"a": "1", "b": "x", "c": "0.1"}
    assert conflicts(known, {"a": "1.0", "b": "x", "new": "3"}) == []
    assert conflicts(known, {"a": "2", "b": "y", "c": "0.10"}) == ["a", "b"]


def test_the_store_is_in_the_project_also_from_a_queued_copy(project, monkeypatch):
    copy = project / ".dvc" / "tmp" / "exps" / "tmp1"
    copy.mkdir(parents=True)
    shutil.copy("dvc.yaml", copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(project))
    assert tracking_uri() == f"sqlite:///{project}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert tracking_uri() == f"sqlite:///{project}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri() == "http://host:5000"


def test_passwords_are_not_shown():
    assert shown("https://me:secret@host:1/x") == "https://host:1/x"
    assert shown("sqlite:////a/mlflow.db") == "sqlite:////a/mlflow.db"


# --- one run per model ----------------------------------------------------------------------------------------------


def test_a_run_holds_all_that_was_told(project, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "salty-cow")
    (project / "curves.png").write_bytes(b"png")
    with session(tags={"kind": "pipeline", "seed": 0}, description="What it was.") as tracker:
        for epoch in range(3):
            tracker.metrics({"train/loss": 1 / (epoch + 1), "val/top1": epoch / 3}, step=epoch)
        tracker.metrics({"test/top1": 0.98})
        tracker.artifact("curves.png")
        tracker.dataset("digits", "d" * 64, "sklearn", {"train": 1300})
        tracker.params({"architecture.depth": 20})
    (run,) = all_runs()
    assert run.info.run_id == tracker.run_id
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a-run")
    assert run.data.params == {
        "train.lr": "0.1",
        "train.clip_norm": "null",
        "evaluate.ece_bins": "15",
        "detect.epochs": "12",
        "dataset.name": "digits",
        "architecture.depth": "20",
    }
    assert points(tracker.run_id, "train/loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert run.data.metrics["test/top1"] == 0.98 and run.data.metrics["time/train"] > 0
    tags = run.data.tags
    assert {"kind", "seed", "host", "pid", "config_hash", "versions.torch", "mlflow.user"} <= set(tags)
    assert tags["dvc.exp_name"] == "salty-cow" and tags["mlflow.note.content"] == "What it was."
    assert tags["mlflow.source.name"] == "stages/train.py"
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    assert run.info.artifact_uri == f"{project}/mlruns/{tracker.run_id}/artifacts"
    assert Path(run.info.artifact_uri, "curves.png").read_bytes() == b"png"
    assert spooled() == []


def test_a_later_stage_adds_to_the_run():
    with session() as tracker:
        tracker.metrics({"train/loss": 1.0}, step=0)
    with session("evaluate", tracker.run_id) as later:
        later.metrics({"test/top1": 0.5})
    assert later.run_id == tracker.run_id
    (run,) = all_runs()
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/top1"] == 0.5
    assert run.data.tags["mlflow.source.name"] == "stages/train.py"


def test_resuming_logs_no_point_twice():
    with pytest.raises(ValueError), session() as tracker:
        for epoch in range(4):
            tracker.metrics({"train/loss": float(epoch)}, step=epoch)
        raise ValueError("power cut")
    (run,) = all_runs()
    assert run.info.status == "FAILED" and run.data.tags["error"] == "ValueError: power cut"
    with session(run_id=tracker.run_id) as tracker:
        for epoch in range(2, 6):
            tracker.metrics({"train/loss": float(epoch)}, step=epoch)
    assert points(tracker.run_id, "train/loss") == [(epoch, float(epoch)) for epoch in range(6)]
    (run,) = all_runs()
    assert run.info.status == "FINISHED" and "error" not in run.data.tags


@pytest.mark.parametrize("spool", [False, True])
def test_a_finished_training_stays_finished_when_later_stages_fail(spool, away):
    def tags_after(stage: str, fails: bool) -> dict[str, str]:
        with contextlib.suppress(ValueError), session(stage, tracker.run_id):
            away(spool)
            if fails:
                raise ValueError(f"no {stage}")
        away(False)
        with session("other", name="sends what was kept"):
            pass
        run = client().get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        return {key: run.data.tags[key] for key in ("failed_stage", "error") if key in run.data.tags}

    with session() as tracker:
        pass
    assert tags_after("evaluate", True) == {"failed_stage": "evaluate", "error": "ValueError: no evaluate"}
    assert tags_after("detect", True) == {"failed_stage": "evaluate detect", "error": "ValueError: no detect"}
    assert tags_after("evaluate", False) == {"failed_stage": "detect", "error": "ValueError: no detect"}
    assert tags_after("detect", False) == {}


def test_a_figure_without_a_step_is_replaced_when_it_changes():
    with session() as tracker:
        tracker.metrics({"test/top1": 0.5, "test/ece": 0.1})
    time.sleep(0.01)
    with session("evaluate", tracker.run_id) as later:
        later.metrics({"test/top1": 0.4, "test/ece": 0.1})
    (run,) = all_runs()
    assert run.data.metrics["test/top1"] == 0.4
    assert len(points(tracker.run_id, "test/ece")) == 1


def test_the_run_of_a_machine_that_died_does_not_run_for_ever():
    with session(name="lost") as lost:
        lost.tags({"host": "elsewhere"})
        with session(lost_run_id=lost.run_id) as tracker:
            assert client().get_run(lost.run_id).info.status == "KILLED"
    with session(lost_run_id=tracker.run_id):  # it was not lost after all
        assert client().get_run(tracker.run_id).info.status == "FINISHED"


def test_a_run_that_is_gone_is_replaced(capsys):
    with session("evaluate", "0123456789abcdef0123456789abcdef") as tracker:
        tracker.metrics({"test/top1": 0.5})
    (run,) = all_runs()
    assert run.info.run_id == tracker.run_id
    assert run.data.params["train.lr"] == "0.1"
    assert "run 0123456789abcdef0123456789abcdef is no more" in capsys.readouterr().err
    client().delete_run(tracker.run_id)
    with session("evaluate", tracker.run_id) as again:
        pass
    assert again.run_id != tracker.run_id


@pytest.mark.parametrize("spool", [False, True])
def test_a_run_that_was_made_anew_gets_its_curves_once(spool, project, empty_store, away):
    epochs = [{"epoch": n, "train/loss": 1 / (n + 1), "val/top1": n / 4 if n else None} for n in range(4)]
    with session() as tracker:
        tracker.epoch({"epoch": 0, "train/loss": 1.0})
    shutil.copy(empty_store, project)
    away(spool)
    with session("evaluate", tracker.run_id) as later:
        later.curves(epochs)
    away(False)
    with session("detect", tracker.run_id) as later:
        later.curves(epochs)
    assert points(later.run_id, "train/loss") == [(n, 1 / (n + 1)) for n in range(4)]
    assert points(later.run_id, "val/top1") == [(n, n / 4) for n in range(1, 4)]


def test_a_store_that_was_wiped_gets_one_whole_run_again(project, empty_store, away):
    """DVC keeps the id of the first run for ever."""
    told = {"tags": {"kind": "pipeline"}, "description": "A network."}
    with session(**told) as first:
        away(True)
        first.describe("Test", "Top-1 0.4.")
    shutil.copy(empty_store, project)
    away(False)
    with session("evaluate", first.run_id, **told) as tracker:
        tracker.describe("Test", "Top-1 0.5.")
        with session("trial", parent_run_id=first.run_id) as child:
            pass
    with session("detect", first.run_id, **told) as later:
        later.describe("Detection", "mAP 0.7.")
    assert later.run_id == tracker.run_id != first.run_id
    other, run = all_runs()
    assert (other.info.run_id, other.data.tags["mlflow.parentRunId"]) == (child.run_id, run.info.run_id)
    assert run.data.params["train.lr"] == "0.1" and run.data.tags["kind"] == "pipeline"
    assert run.data.tags["mlflow.note.content"] == "A network.\n\n**Test.** Top-1 0.5.\n\n**Detection.** mAP 0.7."


def test_other_settings_of_a_later_stage_get_their_own_row():
    with session() as tracker:
        for epoch in range(3):
            tracker.metrics({"train/loss": float(epoch)}, step=epoch)
        tracker.dataset("digits", "abc")
    with session("evaluate", tracker.run_id) as first:
        first.metrics({"test/ece": 0.1})
    with session("detect", tracker.run_id) as first:
        first.metrics({"detect/map50": 0.9})
    changed = PARAMS | {"evaluate.ece_bins": 20}
    for _ in range(2):  # the second time finds the sibling that the first one made
        with session("evaluate", tracker.run_id, params=changed) as sibling:
            sibling.metrics({"test/ece": 0.2})
    assert sibling.run_id != tracker.run_id
    runs = {run.info.run_id: run for run in all_runs()}
    assert set(runs) == {tracker.run_id, sibling.run_id}
    other = runs[sibling.run_id]
    assert other.data.tags["derived_from"] == tracker.run_id
    assert other.data.params["evaluate.ece_bins"] == "20"
    assert other.data.metrics["detect/map50"] == 0.9, "what still holds came along"
    assert points(sibling.run_id, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert points(sibling.run_id, "test/ece") == [(0, 0.2)], "what holds no more did not"
    assert other.inputs.dataset_inputs
    assert runs[tracker.run_id].data.metrics["test/ece"] == 0.1
    assert runs[tracker.run_id].data.params["evaluate.ece_bins"] == "15"


def test_the_description_grows_by_paragraphs_and_a_sibling_keeps_what_holds():
    with session(description="A network.", tags={"kind": "pipeline", "dataset": "digits"}) as tracker:
        tracker.describe("Test", "Top-1 0.5.")
        tracker.describe("Detection", "mAP 0.7.")
        tracker.describe("Test", "Top-1 0.6.")
    tags = client().get_run(tracker.run_id).data.tags
    assert tags["mlflow.note.content"] == "A network.\n\n**Detection.** mAP 0.7.\n\n**Test.** Top-1 0.6."
    with session("detect", tracker.run_id, params={**PARAMS, "detect.epochs": 3}) as other:
        other.describe("Detection", "mAP 0.8.")
    tags = client().get_run(other.run_id).data.tags
    assert tags["mlflow.note.content"] == "A network.\n\n**Test.** Top-1 0.6.\n\n**Detection.** mAP 0.8."
    assert tags["kind"] == "pipeline" and tags["dataset"] == "digits" and tags["derived_from"] == tracker.run_id
    assert tags["epsd.local_id"] != client().get_run(tracker.run_id).data.tags["epsd.local_id"]


def test_nan_and_infinity_are_named_not_stored():
    with session() as tracker:
        tracker.metrics({"train/loss": float("nan"), "train/kl": float("inf"), "train/top1": 0.5}, step=3)
        tracker.metrics({"train/loss": float("nan")}, step=4)
    (run,) = all_runs()
    assert "train/loss" not in run.data.metrics and run.data.metrics["train/top1"] == 0.5
    assert run.data.tags["nonfinite"] == "train/kl, train/loss from step 3"


def test_odd_names_and_values_do_no_harm(capsys):
    with session() as tracker:
        tracker.metrics({"test/a@b=c": 1, "mask/dead": ["conv1"], "mask/name": "x", "mask/none": None, "val/ok": 2})
        tracker.tags({"long": "x" * 9000, "flag": True})
        tracker.params({f"many.{number}": number for number in range(250)})
        tracker.metrics({f"many/{number}": number for number in range(1200)})
        tracker.artifact("not-there.png")
        tracker.metrics(None)  # type: ignore[arg-type]
    (run,) = all_runs()
    assert run.data.metrics["test/a_b_c"] == 1 and run.data.metrics["val/ok"] == 2
    assert not any(key.startswith("mask/") for key in run.data.metrics)
    assert len(run.data.params) == 255 and run.data.metrics["many/1199"] == 1199
    assert "not-there.png" in capsys.readouterr().err


def test_a_refused_change_is_said_and_put_aside(capsys):
    with session() as tracker:
        tracker.params({"train.lr": 0.2})
        tracker.metrics({"val/top1": 1.0})
    (run,) = all_runs()
    assert run.data.params["train.lr"] == "0.1" and run.data.metrics["val/top1"] == 1.0
    assert "refused params" in capsys.readouterr().err
    assert "train.lr" in Path(".epsd/spool/rejected.txt").read_text()


def test_an_error_of_the_stage_passes_through():
    class Odd(BaseException):
        pass

    with pytest.raises(Odd), session():
        raise Odd
    (run,) = all_runs()
    assert run.info.status == "FAILED"


# --- processes ------------------------------------------------------------------------------------------------------


def _open_and_die(run_id: str | None = None) -> None:
    with session(run_id=run_id):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_does_not_run_for_ever():
    in_processes((_open_and_die,))
    (dead,) = all_runs()
    assert dead.info.status == "RUNNING"
    with session() as alive:
        assert client().get_run(dead.info.run_id).info.status == "KILLED"
        with session():
            assert client().get_run(alive.run_id).info.status == "RUNNING", "the living are left alone"
    in_processes((_open_and_die, alive.run_id))
    with session():
        assert client().get_run(alive.run_id).info.status == "FINISHED", "what has finished stays so"


def test_a_run_that_is_finished_while_another_looks_for_the_dead_stays_finished(monkeypatch):
    with session() as tracker:

        def ends_meanwhile(tags):
            client().set_terminated(tracker.run_id, "FINISHED")
            return True

        monkeypatch.setattr(store, "is_gone", ends_meanwhile)
        with session():
            assert client().get_run(tracker.run_id).info.status == "FINISHED"


def test_a_run_that_was_announced_is_one_run_however_its_opening_ends(away):
    announced = new_id()
    in_processes((_open_and_die, announced))
    with pytest.raises(ValueError), session(run_id=announced):
        raise ValueError
    away(True)
    with session(run_id=announced) as kept:
        assert kept.run_id == announced
    away(False)
    with session(run_id=announced) as tracker:
        pass
    (run,) = all_runs()
    assert (run.info.run_id, run.info.status) == (tracker.run_id, "FINISHED")
    with session("evaluate", announced, params={**PARAMS, "evaluate.ece_bins": 20}) as sibling:
        assert sibling.run_id != tracker.run_id
    with session("evaluate", announced) as tracker:
        assert tracker.run_id == run.info.run_id


@pytest.mark.parametrize("spool", [False, True])
def test_a_session_that_is_stopped_while_it_opens_leaves_no_run_of_its_own(spool, away, monkeypatch):
    with session() as before:
        pass
    opening = Store.open

    def interrupted(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return opening(*arguments, **named)

    for run_id in (None, new_id(), before.run_id):
        with monkeypatch.context() as patch, pytest.raises(processes.Stopped), processes.stops():
            patch.setattr(Store, "open", interrupted)
            away(spool)
            with session("evaluate", run_id):
                pytest.fail("the work began")
    away(False)
    with session("detect", before.run_id):
        pass
    (run,) = all_runs()
    assert run.info.run_id == before.run_id and run.info.status == "FINISHED" and spooled() == []
    assert run.data.tags["failed_stage"] == "evaluate"


# --- a project that moves -------------------------------------------------------------------------------------------


def test_artifacts_survive_a_move(project, monkeypatch):
    (project / "a.txt").write_text("kept")
    with session() as tracker:
        tracker.artifact("a.txt")
    moved = project.parent / "elsewhere, with a space"
    project.rename(moved)
    monkeypatch.chdir(moved)
    with session("evaluate", tracker.run_id) as later:
        later.metrics({"test/top1": 1.0})
    assert later.run_id == tracker.run_id
    (run,) = all_runs()
    assert run.info.artifact_uri == f"{moved}/mlruns/{tracker.run_id}/artifacts"
    assert Path(client().download_artifacts(tracker.run_id, "a.txt")).read_text() == "kept"
    with session() as new:
        new.artifact("a.txt")
    assert client().get_run(new.run_id).info.artifact_uri.startswith(f"{moved}/mlruns/")


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_a_store_without_the_right_to_write_can_be_read(folder, moved, project, monkeypatch):
    from epsd.tracking.registered import RegistryError, promote
    from epsd.tracking.runs import read_runs

    with session(tags={"kind": "pipeline"}) as tracker:
        pass
    read_runs()  # all is imported
    if moved:
        project = project.rename(project.parent / "moved")
        monkeypatch.chdir(project)
    if folder:
        Path("mlflow.db.lock").unlink()
    readable = {project / "mlflow.db": 0o444} | ({project: 0o555} if folder else {})
    with restricted(readable):
        assert list(read_runs()["run_id"]) == [tracker.run_id]
        with pytest.raises(RegistryError, match=r"Recent runs: .*a-run"):
            promote("another")


@contextlib.contextmanager
def restricted(modes: dict[Path, int]):
    """Files with these rights, and nobody here who is above them."""
    before = {path: path.stat().st_mode for path in modes}
    root = os.geteuid() == 0
    try:
        for path, mode in modes.items():
            path.chmod(mode)
        if root:
            for path in modes:
                for parent in path.parents[:-2]:
                    parent.chmod(parent.stat().st_mode | 0o55)
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in before.items():
            path.chmod(mode)


def test_ui_address(project):
    (project / "mlflow.db").rename("away.db")
    assert ui_address() == "http://127.0.0.1:5000/"
    (project / "away.db").rename("mlflow.db")
    assert ui_address() == "http://127.0.0.1:5000/"
    with session() as tracker:
        pass
    number = client().get_run(tracker.run_id).info.experiment_id
    assert ui_address(7) == f"http://127.0.0.1:7/#/experiments/{number}/runs?{pages.QUERY}"


@pytest.mark.parametrize("goal", ["ui", "serve"])
@pytest.mark.parametrize("uri", ["", "sqlite:///other.db", "http://127.0.0.1:9", "databricks"])
def test_make_serves_the_store_that_is_meant_where_it_is_now(goal, uri, project, monkeypatch):
    file = uri.removeprefix("sqlite:///") if uri.startswith("sqlite") else "mlflow.db"
    if uri.startswith("sqlite"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with session() as tracker:
        pass
    moved = project.rename(project.parent / "moved")
    programs = moved / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "mlflow").write_text('#!/bin/sh\necho "mlflow $MLFLOW_TRACKING_URI $@"\n')
    for name in ("requirements.lock", "pyproject.toml", ".venv/complete", ".venv/bin/python", ".venv/bin/mlflow"):
        (moved / name).touch()
        (moved / name).chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), "-C", str(moved), goal]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    served = [line for line in done.stdout.splitlines() if line.startswith("mlflow ")]
    if uri == "databricks":
        assert done.returncode and not served and "MLFLOW_TRACKING_URI: 'databricks' is no" in done.stderr
    elif uri.startswith("http"):
        assert done.returncode == 0 and len(served) == (goal == "serve"), done.stderr
        assert goal == "serve" or f"Runs: {uri} " in done.stdout
    else:
        assert (uri or f"sqlite:///{moved}/mlflow.db") in served[0], done.stderr
        with contextlib.closing(sqlite3.connect(moved / file)) as link:
            (place,) = link.execute("SELECT artifact_uri FROM runs").fetchone()
        assert place == f"{moved}/mlruns/{tracker.run_id}/artifacts"


# --- outages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def away(monkeypatch):
    """Lets the store fail at will: `away(True)` ... `away(False)`."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    state = {"away": False}

    def failing(original):
        def call(*arguments, **named):
            if state["away"]:
                raise MlflowException("connection refused")
            return original(*arguments, **named)

        return call

    for name in ("log_batch", "create_run", "search_runs", "get_experiment_by_name", "log_artifact", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, failing(getattr(MlflowClient, name)))
    monkeypatch.setattr(Store, "probe", failing(Store.probe))
    return lambda value: state.update(away=value)


def test_an_outage_in_the_middle_loses_nothing_and_is_said_once(away, capsys, project):
    (project / "late.txt").write_text("at the time")
    with session() as tracker:
        for epoch in range(6):
            away(epoch >= 2)
            tracker.metrics({"train/loss": float(epoch)}, step=epoch)
        tracker.artifact("late.txt")
        (project / "late.txt").write_text("changed since")
    (run,) = all_runs_of(away)
    assert run.info.status == "RUNNING" and len(spooled()) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "cannot be used (connection refused)" in errors and ".epsd/spool" in errors
    away(False)
    with session("evaluate", tracker.run_id) as later:
        later.metrics({"test/top1": 0.5})
    assert later.run_id == tracker.run_id
    (run,) = all_runs()
    assert run.info.status == "FINISHED"
    assert points(tracker.run_id, "train/loss") == [(epoch, float(epoch)) for epoch in range(6)]
    assert Path(run.info.artifact_uri, "late.txt").read_text() == "at the time"
    assert spooled() == [] and list(Path(".epsd/spool").glob("*.files")) == []


def all_runs_of(away) -> list:
    """What the store holds now, though it is away."""
    away(False)
    found = all_runs()
    away(True)
    return found


def test_a_run_begun_during_an_outage_gets_its_real_id_later(away, capsys):
    away(True)
    with session() as tracker:
        tracker.metrics({"train/loss": 1.0}, step=0)
    assert tracker.run_id.startswith("local-")
    with session("evaluate", tracker.run_id) as second:
        second.metrics({"test/top1": 0.5})
    assert second.run_id == tracker.run_id
    away(False)
    with session("detect", tracker.run_id) as third:
        third.metrics({"detect/map50": 0.9})
    (run,) = all_runs()
    assert third.run_id == run.info.run_id
    assert {"train/loss", "test/top1", "detect/map50"} <= set(run.data.metrics)
    assert run.data.params["train.lr"] == "0.1" and run.info.status == "FINISHED"
    with session("evaluate", tracker.run_id) as again:  # the stand-in stays good, as DVC's cache may keep it for ever
        pass
    assert again.run_id == run.info.run_id
    shutil.rmtree(".epsd/runs")
    with session("evaluate", tracker.run_id) as again:  # even without the note of it
        pass
    assert again.run_id == run.info.run_id


def test_the_store_comes_back_while_the_stage_runs(away):
    away(True)
    with session() as tracker:
        tracker.metrics({"train/loss": 0.0}, step=0)
        away(False)
        tracker._next_try = 0.0
        tracker.metrics({"train/loss": 1.0}, step=1)
        assert not tracker.run_id.startswith("local-") and spooled() == []
        tracker.metrics({"train/loss": 2.0}, step=2)
    (run,) = all_runs()
    assert points(run.info.run_id, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_the_store_is_back_at_the_end(away):
    with session() as tracker:
        away(True)
        tracker.metrics({"train/loss": 0.0}, step=0)
        away(False)
    assert spooled() == []
    assert points(tracker.run_id, "train/loss") == [(0, 0.0)]


def test_a_replay_that_is_interrupted_begins_again(away, monkeypatch):
    """Exactly once, though half of it had been sent."""
    away(True)
    with session() as tracker:
        for epoch in range(4):
            tracker.metrics({"train/loss": float(epoch)}, step=epoch)
    away(False)
    sent = Store.metrics

    def breaking(self, run_id, event):
        if event["step"] == 2:
            raise ConnectionError("again")
        sent(self, run_id, event)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "metrics", breaking)
        with pytest.raises(ConnectionError):
            replay(Store(tracking_uri()))
    assert len(spooled()) == 1
    replay(Store(tracking_uri()))
    (run,) = all_runs()
    assert points(run.info.run_id, "train/loss") == [(epoch, float(epoch)) for epoch in range(4)]
    assert run.info.status == "FINISHED" and spooled() == []
    assert resolve(tracker.run_id) == run.info.run_id


@pytest.mark.parametrize("uri", [None, "sqlite:///other.db"])
def test_what_was_kept_in_a_folder_that_is_moved_since_is_sent(uri, away, capsys, project, monkeypatch):
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (project / "late.txt").write_text("at the time")
    away(True)
    with session() as tracker:
        tracker.artifact("late.txt")
    away(False)
    moved = project.rename(project.parent / "moved")
    monkeypatch.chdir(moved)
    with session("evaluate", tracker.run_id):
        pass
    (run,) = all_runs()
    assert Path(run.info.artifact_uri, "late.txt").read_text() == "at the time"
    assert spooled() == [] and "refused artifact" not in capsys.readouterr().err


def test_what_the_store_will_never_take_does_not_hold_up_the_rest(away, capsys, monkeypatch):
    away(True)
    with session(experiment="x" * 600) as refused:
        refused.artifact("dvc.yaml")
    with session() as tracker:
        tracker.tags({"file": "caf\udce9.png"})  # a file's name need not be text
        tracker.metrics({"train/loss": 1.0}, step=0)
    spoiled = Path(".epsd/spool/0-spoiled.jsonl")
    spoiled.write_bytes(b"\xff\xfe\n" + b'{"op": "metrics"}\n')
    away(False)
    capsys.readouterr()
    with session("evaluate", tracker.run_id) as later:
        later.metrics({"test/top1": 0.5})
    (run,) = all_runs()
    assert later.run_id == run.info.run_id
    assert {"train/loss", "test/top1"} <= set(run.data.metrics)
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "refused" in line]) == 2, said
    assert spooled() == [spoiled], "of no store that is known"
    (aside,) = Path(".epsd/spool").glob("*.refused")
    assert f"{aside.resolve()}" in "".join(said) and list(aside.with_suffix(".files").rglob("dvc.yaml"))


def test_what_was_kept_for_one_server_does_not_go_to_another(away, monkeypatch):
    away(True)
    with session() as tracker:
        tracker.metrics({"train/loss": 0.0}, step=0)
    away(False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    with session():
        pass
    assert len(spooled()) == 1 and resolve(tracker.run_id) == tracker.run_id


def test_even_an_unwritable_spool_does_not_stop_the_work(away, capsys, project):
    (project / ".epsd").mkdir()
    (project / ".epsd" / "spool").write_text("a file where a folder should be")
    with session() as tracker:
        away(True)
        tracker.metrics({"train/loss": 0.0}, step=0)
    assert "not recorded" in capsys.readouterr().err


ODD = ("databricks", "ftp://host/x", "./mlruns", "sqlite://runs.db", "sqlite:///", "sqlit:///a.db", "http://host:port")


@pytest.mark.parametrize("uri", [*ODD, "postgres://me:secret@host/runs"])
def test_an_address_of_no_known_kind_is_refused_at_the_start(uri, monkeypatch, project):
    from epsd.pipeline.stage import check
    from epsd.project.params import DEFAULT_PATH, load
    from epsd.registry import ParamsError

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(AddressError, match=r"^MLFLOW_TRACKING_URI: .* Valid: sqlite:///.*mlflow.db\.$"):
        session().__enter__()
    (project / ".epsd/spool").mkdir(parents=True)
    (project / ".epsd/spool/1.jsonl").touch()
    with pytest.raises(ParamsError, match=r"1 session in .*spool wait for their store") as found:
        check(load(ROOT / DEFAULT_PATH))
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("uri", ["mysql+pymysql://me@host:3306/runs", "postgresql:///runs?host=/tmp", "https://host/x"])
def test_addresses_of_every_kind_are_taken(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri() == uri


@pytest.fixture
def silent(monkeypatch):
    """The port of a server that takes no connection and refuses none, as behind a firewall."""
    with socket.socket() as listening, contextlib.ExitStack() as stack:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):  # its queue is full
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


def counted(monkeypatch, owner, name):
    """One entry for each call of `owner.name` from now on."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a: calls.append(1) or real(*a))
    return calls


@pytest.mark.parametrize("kind", ["postgresql", "mysql+pymysql", "http"])
def test_a_server_that_does_not_answer_costs_a_hundredth_of_the_time(kind, silent, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{kind}://me:secret@127.0.0.1:{silent}/runs")
    tries = counted(monkeypatch, Store, "probe")
    with session() as tracker:
        began = time.monotonic()
        for epoch in range(100):
            tracker.metrics({"train/loss": 1.0}, step=epoch)
        assert len(tries) == 1
        assert tracker._next_try - began > 50 * store._ANSWER_WITHIN, "a hundred times what the try took"
    said = capsys.readouterr().err
    assert said.count("cannot be used") == 1 and "secret" not in said
    assert len(spooled()) == 1


@pytest.mark.parametrize("kind", ["postgresql+psycopg", "mysql+pymysql"])
def test_a_database_that_refuses_is_asked_once(kind, monkeypatch, capsys):
    from mlflow.store.db import utils

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{kind}://localhost:9/runs")
    tries = counted(monkeypatch, utils, "create_sqlalchemy_engine")
    with session():
        pass
    assert len(tries) == 2, "at the start and at the end, and not ten times each"
    assert "cannot be used" in capsys.readouterr().err


# --- a real server --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "server"
    folder.mkdir()
    made = tracking_server.Server(folder)
    made.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    yield made
    made.kill()


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_training_loses_no_point(server, project, capsys):
    (project / "model.txt").write_text("weights")
    with session() as tracker:
        for epoch in range(30):
            if epoch == 10:
                server.kill()
            before = time.monotonic()
            tracker.metrics({"train/loss": 1 / (epoch + 1), "val/top1": epoch / 30}, step=epoch)
            assert time.monotonic() - before < 10, "an outage may not hold training up"
        tracker.artifact("model.txt", folder="model")
        tracker.metrics({"test/top1": 0.9})
    with session(name="begun without a server") as other:
        other.metrics({"train/loss": 7.0}, step=0)
    errors = capsys.readouterr().err
    assert errors.count("cannot be used") == 1 and len(spooled()) == 2

    server.start()
    with session("evaluate", other.run_id) as later:
        later.metrics({"test/top1": 0.8})
    assert spooled() == []
    runs = {run.info.run_name: run for run in all_runs()}
    assert set(runs) == {"a-run", "begun without a server"}
    assert points(tracker.run_id, "train/loss") == [(epoch, 1 / (epoch + 1)) for epoch in range(30)]
    assert points(tracker.run_id, "val/top1") == [(epoch, epoch / 30) for epoch in range(30)]
    assert points(tracker.run_id, "test/top1") == [(0, 0.9)]
    assert Path(client().download_artifacts(tracker.run_id, "model/model.txt")).read_text() == "weights"
    assert capsys.readouterr().out == "", "MLflow says nothing of its own"
    assert later.run_id == runs["begun without a server"].info.run_id
    assert points(later.run_id, "train/loss") == [(0, 7.0)] and points(later.run_id, "test/top1") == [(0, 0.8)]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


@pytest.mark.slow
def test_a_trainer_killed_while_the_server_is_away_loses_no_point(server):
    """Both die; the next training goes on in the same run from its checkpoint."""
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2]); from tracking.test_recording import session\n"
        "with session() as tracker:\n"
        "    for epoch in range(8):\n"
        "        if epoch == 3: os.killpg(int(sys.argv[1]), signal.SIGKILL)\n"
        "        tracker.metrics({'train/loss': float(epoch)}, step=epoch)\n"
        "    print(tracker.run_id, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(server.process.pid), str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    server.process.wait(10)
    server.start()
    with session(run_id=done.stdout.strip()) as tracker:
        for epoch in range(6, 12):
            tracker.metrics({"train/loss": float(epoch)}, step=epoch)
    (run,) = all_runs()
    assert run.info.status == "FINISHED"
    assert points(run.info.run_id, "train/loss") == [(epoch, float(epoch)) for epoch in range(12)]
