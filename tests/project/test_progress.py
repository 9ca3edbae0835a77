"""The progress bar: drawn on a terminal, silent elsewhere and when asked to be."""

import os
import pty
import subprocess
import sys

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
