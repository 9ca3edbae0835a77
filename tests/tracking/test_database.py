import contextlib
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from sqlalchemy import QueuePool, create_engine

from epsd.project import runtime
from epsd.tracking import database, track
from epsd.tracking.store import Store
from forks import in_processes


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch) -> Path:
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    runtime._said.clear()
    return tmp_path


def session(name: str = "a-run"):
    return track("train", experiment="epsd", name=name)


def runs() -> list[tuple[str, str, int]]:
    """Name, status and number of points of every run."""
    counted = "(SELECT count(*) FROM metrics WHERE metrics.run_uuid = runs.run_uuid AND key = 'train/loss')"
    with contextlib.closing(sqlite3.connect("mlflow.db")) as link:
        assert link.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return link.execute(f"SELECT name, status, {counted} FROM runs ORDER BY name").fetchall()


def beside() -> list[str]:
    """What else is there of a database."""
    return sorted(path.name for path in Path().glob("mlflow.db?*"))


def _record(folder: Path, uri: str) -> None:
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    with session(folder.name) as tracker:
        tracker.metrics({"train/loss": 1.0}, step=0)


def _make_and_die(uri: str, statements: int, own: bool) -> None:
    """SIGKILL after so many statements, of a maker of ours or of MLflow's that writes under the database's own name."""
    from mlflow import MlflowClient
    from sqlalchemy import Engine, event

    left = iter(range(statements - 1, -1, -1))
    event.listen(Engine, "after_cursor_execute", lambda *_: next(left) or os.kill(os.getpid(), signal.SIGKILL))
    with database._unsynced():
        Store(uri).client if own else MlflowClient(tracking_uri=uri).search_experiments()


def aged() -> None:
    os.utime("mlflow.db", (time.time() - 60,) * 2)


# --- makers ---------------------------------------------------------------------------------------------------------


def test_six_projects_that_first_touch_one_database_record_six_runs(project):
    folders = [project / f"clone-{number}" for number in range(6)]
    for folder in folders:
        folder.mkdir()
        (folder / "dvc.yaml").touch()
    assert in_processes(*((_record, folder, f"sqlite:///{project}/mlflow.db") for folder in folders)) == [0] * 6
    assert runs() == [(folder.name, "FINISHED", 1) for folder in folders]
    assert not list(project.rglob("*.jsonl")) and beside() == ["mlflow.db.lock"]


@pytest.mark.parametrize("statements", [400, 1200])
def test_a_database_whose_maker_was_killed_is_made_again(statements, project, capsys):
    """At 400 of some 1,700 statements a journal is left, which must not be played back into the new one."""
    assert in_processes((_make_and_die, f"sqlite:///{project}/mlflow.db", statements, False)) == [-signal.SIGKILL]
    assert Path("mlflow.db").is_file() and Path("mlflow.db-journal").exists() == (statements == 400)
    aged()
    with session():
        pass
    assert runs() == [("a-run", "FINISHED", 0)] and beside() == ["mlflow.db.lock"]
    assert capsys.readouterr().err.count("half-made") == 1


def test_a_killed_maker_of_ours_leaves_no_database(project, capsys):
    assert in_processes((_make_and_die, f"sqlite:///{project}/mlflow.db", 400, True)) == [-signal.SIGKILL]
    assert beside() == ["mlflow.db.lock", "mlflow.db.new", "mlflow.db.new-journal"] and not Path("mlflow.db").exists()
    with session():
        pass
    assert runs() == [("a-run", "FINISHED", 0)] and beside() == ["mlflow.db.lock"]
    assert capsys.readouterr().err == ""


def test_a_database_that_is_deleted_between_two_runs_of_a_process_is_made_again(project, empty_store):
    (project / "elsewhere").mkdir()
    Path("mlflow.db").symlink_to("elsewhere/mlflow.db")
    shutil.copy(empty_store, "elsewhere")
    for name in ("one", "two"):
        with session(name):
            pass
        assert runs() == [(name, "FINISHED", 0)]
        Path("elsewhere/mlflow.db").unlink()
    assert Path("mlflow.db").is_symlink(), "and where the link says"


# --- what is whole, or not ours -------------------------------------------------------------------------------------


def tables(*statements: str) -> Path:
    with contextlib.closing(sqlite3.connect("mlflow.db")) as link, link:
        for statement in statements:
            link.execute(statement)
    aged()
    return Path("mlflow.db")


def test_what_holds_anything_is_never_made_again(project, monkeypatch):
    monkeypatch.setattr(database, "_make", lambda *_: pytest.fail("made again"))
    begun = "CREATE TABLE experiments (experiment_id INTEGER)"
    for more in ("CREATE TABLE mine (a)", "INSERT INTO experiments VALUES (0)"):
        database.complete(tables(begun, more), project)
        Path("mlflow.db").unlink()
    models = "CREATE TABLE registered_models (name TEXT)", "INSERT INTO registered_models VALUES ('epsd')"
    database.complete(tables(begun, *models), project)


def test_another_program_that_makes_it_is_waited_for(project, empty_store, monkeypatch, capsys):
    Path("mlflow.db").touch()
    monkeypatch.setattr(database.time, "sleep", lambda _: shutil.copy(empty_store, project))
    before = empty_store.read_bytes()
    database.complete(project / "mlflow.db", project)
    assert Path("mlflow.db").read_bytes() == before and capsys.readouterr().err == ""


def test_a_file_that_is_no_database_is_named_and_left(project, capsys):
    Path("mlflow.db").write_text("not a database at all, but some notes of mine " * 100)
    with session():
        pass
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and f"{project}/mlflow.db cannot be used (file is not a database; once it is moved away" in said
    )
    assert Path("mlflow.db").read_text().startswith("not a database")
    Path("mlflow.db").rename("notes")
    with session("another"):
        pass
    assert [name for name, *_ in runs()] == ["a-run", "another"]


def test_a_kept_connection_is_used_again_until_its_file_is_another(tmp_path):
    database.watch_connections()
    engine = create_engine(f"sqlite:///{tmp_path / 'a.db'}", poolclass=QueuePool)

    def kept() -> tuple[int, bool]:
        with engine.connect() as link:
            raw = link.connection.dbapi_connection
            known = raw.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)
            raw.execute("CREATE TABLE IF NOT EXISTS t (x)")
            return id(raw), known

    first = kept()
    assert kept() == (first[0], True)
    (tmp_path / "a.db").unlink()
    assert kept()[1] is False, "the deleted file has the table"
    (tmp_path / "b.db").touch()
    (tmp_path / "b.db").replace(tmp_path / "a.db")
    assert kept()[1] is False


def test_a_kept_connection_is_not_used_after_a_fork(tmp_path, monkeypatch):
    database.watch_connections()
    engine = create_engine(f"sqlite:///{tmp_path / 'a.db'}", poolclass=QueuePool)
    with engine.connect() as link:
        before = link.connection.dbapi_connection
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with engine.connect() as link:
        assert link.connection.dbapi_connection is not before
