"""Where trials are kept: journals that a kill does not spoil, and one line soon for what cannot be used."""

import time
from pathlib import Path

import pytest

from epsd.engine import storage
from epsd.engine.ledger import Ledger, open_study
from epsd.engine.storage import StorageError, open_storage, shown

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def test_a_half_written_line_does_not_spoil_the_journal(tmp_path: Path) -> None:
    journal = tmp_path / "deep" / "trials.journal"
    opened = open_storage(journal)
    open_study(opened, "s", ["maximize"])
    ledger = Ledger(opened, "s", range(2))
    ledger.add(0)
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 6, "work')
    ledger.add(1)
    assert journal.read_bytes().startswith(whole + b"{")
    assert len(Ledger(open_storage(journal), "s", range(2)).trials()) == 2


@pytest.mark.parametrize(
    "url, message",
    [
        ("postgresql://me:secret@127.0.0.1:1/none", r"postgresql://127\.0\.0\.1:1/none cannot be used \(.*refused"),
        ("nosuch://x/y", r"nosuch://x/y cannot be used"),
        ("mysql+mysqldb://me@127.0.0.1/x", r"needs the Python package 'MySQLdb'"),
        ("/proc/nowhere/optuna.journal", r"/proc/nowhere/optuna\.journal cannot be used"),
    ],
)
def test_a_storage_that_cannot_be_reached_is_said_soon(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    started = time.monotonic()
    with pytest.raises(StorageError, match=message) as raised:
        open_storage(url)
    assert time.monotonic() - started < 10
    assert "secret" not in str(raised.value)


def test_a_password_is_not_shown() -> None:
    assert shown("postgresql://me:secret@host/db") == "postgresql://host/db" and shown(Path("x")) == "x"
