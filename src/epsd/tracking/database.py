"""The file of a local store: made whole or not at all, by one process at a time, from whatever folder it is used."""

import contextlib
import errno
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from epsd.project.runtime import brief, note

_BESIDE = ("", "-journal", "-wal", "-shm")
"""The endings of what SQLite writes: a journal that outlives its database would be played back into the next one."""

_STILL = 5.0
"""Seconds without a write after which nobody makes a database any more: MLflow's steps take hundredths."""

_LOOK_EVERY = 0.1
_OTHERS = ("alembic_", "_alembic_", "sqlite_")


class DatabaseError(OSError):
    """A file in the database's place that is none."""


@contextlib.contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """One process at a time, by a lock at `path` for whoever may write there. Where nobody may, nothing is made."""
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = path.parent.stat().st_mode & 0o666 | 0o600
            held.enter_context(FileLock(path, timeout=timeout, mode=mode))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS):
                raise
        yield


def complete(database: Path, artifacts: Path) -> None:
    """See that `database` is one of MLflow's: made where there is none, and anew where its making was cut off.

    Call it under the lock. `artifacts`: the folder for those of MLflow's own experiment. Raises DatabaseError,
    sqlite3.Error, and what MLflow raises.
    """
    database = database.resolve()  # a link stays one
    while database.exists():
        if not _cut_off(database):
            return
        if abs(time.time() - database.stat().st_mtime) >= _STILL:
            note(f"tracking: {database} was left half-made and has no runs, so it is made again.")
            break
        time.sleep(_LOOK_EVERY)  # an `mlflow ui` may be at it
    _make(database, artifacts)


def _cut_off(database: Path) -> bool:
    """Whether it holds tables of MLflow alone and no experiment: MLflow adds one at the end of the making."""
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=30)) as link:
            tables = {name for (name,) in link.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            for table in tables & {"experiments", "registered_models"}:
                if link.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone():
                    return False
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise DatabaseError(f"{brief(error)}; once it is moved away, a new one is made") from None
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.tracking.dbmodels import initial_models

    own = {*Base.metadata.tables, *initial_models.Base.metadata.tables}
    return all(name in own or name.startswith(_OTHERS) for name in tables)


def _make(database: Path, artifacts: Path) -> None:
    """Under a temporary name, which is always the same: what a maker that was killed has left is gone by the next."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = database.with_name(f"{database.name}.new")
    _remove(new)
    with _unsynced():
        SqlAlchemyStore(f"sqlite:///{new}", str(artifacts)).engine.dispose()
    with new.open("rb") as file:
        os.fsync(file.fileno())
    _remove(database)
    new.replace(database)


@contextlib.contextmanager
def _unsynced() -> Iterator[None]:
    """SQLite waits for the disk at none of MLflow's hundreds of steps: seconds where others use the disk, too."""
    from sqlalchemy import Engine, event

    def connected(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", connected)
    try:
        yield
    finally:
        event.remove(Engine, "connect", connected)


def watch_connections() -> None:
    """No kept connection to a file of SQLite is used again when that was removed or replaced, or after a fork.

    Otherwise a deleted database would live on, unseen, in whoever has it open.
    """
    from sqlalchemy import Pool, event

    for name, listener in (("connect", _opened), ("checkout", _checked)):
        if not event.contains(Pool, name, listener):
            event.listen(Pool, name, listener)


def _opened(connection: Any, record: Any) -> None:
    if isinstance(connection, sqlite3.Connection):
        (_, _, file), *_ = connection.execute("PRAGMA database_list")
        record.info["file"], record.info["seen"] = file, _seen(file)


def _checked(connection: Any, record: Any, _proxy: Any) -> None:
    """The pool opens another connection instead of one for which this raises."""
    from sqlalchemy.exc import DisconnectionError

    if "file" in record.info and record.info["seen"] != _seen(record.info["file"]):
        raise DisconnectionError


def _seen(file: str) -> tuple[int, ...]:
    """Which file is there, and which process sees it."""
    with contextlib.suppress(OSError):
        found = Path(file).stat()
        return os.getpid(), found.st_dev, found.st_ino
    return ()


def _remove(database: Path) -> None:
    for ending in _BESIDE:
        database.with_name(database.name + ending).unlink(missing_ok=True)
