"""Where trials are kept: a journal file, or a database behind a URL, for several machines."""

import contextlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from epsd.engine import EngineError

PATIENCE = 15.0
"""Seconds that a storage may take to answer before the work is given up."""
HEARTBEAT = 30
"""Seconds between two signs of life of a trial, in a database."""
GRACE = 4
"""Heartbeats that may be missed before a trial of another machine counts as lost."""

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="optuna")


class StorageError(EngineError):
    """A storage that cannot be reached, read or written."""


class _KernelLock:
    """A lock that the kernel releases when its holder is killed; Optuna's own would stay until it is broken by force.

    On taking it, a line that a killed writer or a full disk left half written is cut off: it would spoil the journal.
    """

    def __init__(self, journal: Path) -> None:
        self._journal, self._lock = journal, FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        if self._journal.stat().st_size:
            with self._journal.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    content = self._journal.read_bytes()
                    file.truncate(content.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._lock.release()


def shown(where: str | Path) -> str:
    """The storage as it may be printed: without a password."""
    return re.sub(r"//[^/@]*@", "//", str(where))


def open_storage(
    where: str | Path, heartbeat: int = HEARTBEAT, on_stale: Callable[[optuna.Study, FrozenTrial], None] | None = None
) -> BaseStorage:
    """The journal file, or the database behind a URL, whose tables are made where need be.

    heartbeat, on_stale : seconds between signs of life in a database; what is called for a trial that has missed GRACE.

    Raises StorageError, after PATIENCE seconds at most, for a storage that cannot be reached or written.
    """
    if "://" not in str(where):
        return _journal(Path(where))
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return _database(str(where), heartbeat, on_stale)
        except ImportError as error:  # Optuna hides which
            missing = error.name or getattr(error.__cause__ or error.__context__, "name", None)
            raise StorageError(
                f"storage: {shown(where)} needs the Python package '{missing}' "
                "(PostgreSQL: pip install 'epsd[postgres]'; MySQL: pip install 'epsd[mysql]')."
            ) from None
        except Exception as error:  # also the race of several processes that make the tables of a fresh database
            if _hopeless(error) or time.monotonic() > deadline:
                raise unreachable(where, error) from None
            time.sleep(0.5)


def unreachable(where: str | Path, error: BaseException) -> StorageError:
    """The one line for a storage that does not answer."""
    reason = " ".join(str(getattr(error, "orig", None) or error.__cause__ or error).split())[:200]
    return StorageError(f"storage: {shown(where)} cannot be used ({reason}).")


def storage_errors() -> tuple[type[Exception], ...]:
    """What a storage raises that does not answer, or not as it should."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return (SQLAlchemyError, StorageInternalError, OSError)


@contextlib.contextmanager
def tolerant() -> Iterator[None]:
    """For what may be left undone where the storage does not answer: others will put it right."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (StorageError, *storage_errors())):
            raise


def _hopeless(error: Exception) -> bool:
    """An address that no waiting will mend."""
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    return isinstance(error, ArgumentError | NoSuchModuleError | ValueError)


def _journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_KernelLock(path)))
    except (OSError, ValueError) as error:
        raise StorageError(f"storage: {path} cannot be used ({error}).") from None


def _database(url: str, heartbeat: int, on_stale: Any) -> BaseStorage:
    from sqlalchemy.engine import make_url

    backend = make_url(url).get_backend_name()
    arguments = {"timeout": 60} if backend == "sqlite" else {"connect_timeout": 5}
    return RDBStorage(
        url,
        engine_kwargs={"connect_args": arguments, "pool_pre_ping": True},
        heartbeat_interval=heartbeat,
        grace_period=GRACE * heartbeat,
        heartbeat_stale_trial_callback=on_stale,
    )
