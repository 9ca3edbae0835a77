"""The progress bar: drawn on a terminal, silent elsewhere and when asked to be."""

import os
import pty
import subprocess
import sys

import pytest

from epsd.project import progress

SCRIPT = """
import time
from epsd.project.progress import Progress
with Progress("train", 4) as bar:
    for _ in range(4):
        bar.step()
        bar.say("loss 0.5")
        time.sleep(0.05)
"""


def on_a_terminal(**environment: str) -> str:
    master, slave = pty.openpty()
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, stderr=slave, env={**os.environ, "TERM": "xterm", **environment}, check=True)
    os.close(slave)
    assert done.returncode == 0
    shown = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(master)
    return shown.decode()


def test_a_terminal_shows_title_count_and_text() -> None:
    shown = on_a_terminal()
    assert "train" in shown
    assert "4/4" in shown
    assert "loss 0.5" in shown


def test_quiet_shows_nothing() -> None:
    assert on_a_terminal(EPSD_QUIET="1").strip() == ""


def test_a_pipe_shows_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_a_stage_tells_a_pipe_how_it_goes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every half minute, and where it goes on; not when quiet, not where it is switched off."""
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(progress, "lines", True)
    monkeypatch.delenv("EPSD_QUIET", raising=False)
    with progress.Progress("train", 10, 2, after=1) as bar:
        bar.say("loss 0.5")
        for _ in range(4):
            bar.step()
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "train: going on after epoch 1"
    assert lines and all(line.startswith("train: ") and "%, loss 0.5, " in line for line in lines)
    assert lines[0] == "train: 40%, loss 0.5, 180 s left", "60 seconds for two steps, and six more to go"
    with progress.Progress("train", 10, 2, shown=False, after=1) as bar:
        bar.step()
    monkeypatch.setenv("EPSD_QUIET", "1")
    with progress.Progress("train", 10, 2, after=1) as bar:
        bar.step()
    assert capsys.readouterr().err == ""
