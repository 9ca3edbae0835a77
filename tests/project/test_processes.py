import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from epsd.project import processes
from epsd.project.processes import Stopped, end, gone, signals_wait, start, stops, wait
from epsd.types import EpsdError


def kill(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.02)  # the handler runs soon, not at once


def sleeping(*before: str) -> list[str]:
    return [sys.executable, "-c", "; ".join([*before, "import time; time.sleep(60)"])]


# --- asked to stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, words", [(2, "interrupted"), (15, "stopped by SIGTERM"), (1, "stopped by SIGHUP")])
def test_a_signal_leaves_the_block_with_its_status(number, words):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=words) as stop, stops():
        kill(number)
    assert stop.value.status == 128 + number
    assert signal.getsignal(number) is before


def test_further_requests_do_not_disturb_the_way_out_but_a_person_can_insist():
    left = []
    with pytest.raises(Stopped) as stop, stops():
        try:
            kill(signal.SIGTERM)
        finally:
            kill(signal.SIGTERM)
            left.append("in order")
            kill(signal.SIGINT)
            left.append("not reached")
    assert left == ["in order"] and stop.value.signum == signal.SIGINT


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops():
            kill(signal.SIGHUP)
            with signals_wait():
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
                kill(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_worker_has_no_story_to_finish():
    with stops():
        if not (child := os.fork()):
            kill(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_the_block(number):
    done = []
    with pytest.raises(Stopped), stops():
        handler = signal.getsignal(number)
        with signals_wait(), signals_wait():
            kill(number)
            time.sleep(0.05)
            done.append("all of it")
        assert signal.getsignal(number) is handler
        done.append("not reached")
    assert done == ["all of it"]


def test_a_second_signal_does_not_wait():
    done = []
    with pytest.raises(Stopped), stops(), signals_wait():
        kill(signal.SIGTERM)
        done.append(1)
        kill(signal.SIGTERM)
        done.append(2)
    assert done == [1]


class StopsInItsDestructor:
    def __del__(self):
        kill(signal.SIGTERM)


def test_a_stop_that_python_drops_comes_once_more(capsys):
    """In a destructor an exception of a signal's handler is printed and forgotten: the process would go on."""
    with pytest.raises(Stopped), stops():
        StopsInItsDestructor()
        for _ in range(1000):
            time.sleep(0.01)
    assert capsys.readouterr().err == ""


def test_a_stop_that_python_drops_waits_like_any_other():
    done = []
    with pytest.raises(Stopped), stops():
        with signals_wait():
            StopsInItsDestructor()
            time.sleep(0.1)
            done.append("waited")
        time.sleep(10)
    assert done == ["waited"]


def test_other_exceptions_that_python_drops_are_told_as_ever(monkeypatch):
    class Fails:
        def __del__(self):
            raise ValueError

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    with stops():
        Fails()
    assert [type(value) for value in told] == [ValueError]


# --- who lives, and those that are started --------------------------------------------------------------------------


def test_the_dead_are_known_also_where_nobody_reaps_them():
    me = processes.identity()
    assert not gone(me["pid"], me["pid.started"]) and gone(me["pid"], me["pid.started"] - 60)
    child = subprocess.Popen(sleeping())
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert gone(child.pid)
    child.wait()
    assert gone(child.pid)


def test_a_child_reads_its_job_and_knows_who_waits():
    code = (
        "import json, os, sys; sys.exit(json.load(sys.stdin)['status'] * (os.environ['EPSD_STARTER'] == sys.argv[1]))"
    )
    child = start([sys.executable, "-c", code, str(os.getpid())], os.environ, {"status": 5})
    wait([child], 20)
    assert child.returncode == 5


def test_the_end_is_clean_where_it_can_be_and_hard_where_not(tmp_path: Path):
    deaf = "import signal; signal.signal(15, signal.SIG_IGN); open('deaf', 'w')"
    children = [subprocess.Popen(sleeping(*before), text=True, cwd=tmp_path) for before in ((), (deaf,))]
    while not (tmp_path / "deaf").exists():
        time.sleep(0.01)
    end(children, 0.3)
    assert [child.returncode for child in children] == [-signal.SIGTERM, -signal.SIGKILL]


def test_one_who_insists_ends_the_children_at_once(tmp_path: Path):
    deaf = "import signal; signal.signal(15, signal.SIG_IGN); open('deaf', 'w')"
    child = subprocess.Popen(sleeping(deaf), text=True, cwd=tmp_path)
    while not (tmp_path / "deaf").exists():
        time.sleep(0.01)
    with pytest.raises(Stopped), stops():
        signal.signal(signal.SIGALRM, lambda *_: kill(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        end([child], 60)
    assert child.returncode == -signal.SIGKILL


OUTLIVES = """
import os, sys, time
from epsd.project.processes import not_outliving, start, stops
if len(sys.argv) == 1:
    start([sys.executable, __file__, "child"], os.environ, {})
    time.sleep(60)
with stops(), not_outliving():
    open("at work", "w").write(str(os.getpid()))
    try:
        time.sleep(60)
    finally:
        open("tidied", "w").close()
"""


def test_a_child_in_a_session_of_its_own_ends_with_its_starter(tmp_path: Path):
    (tmp_path / "run.py").write_text(OUTLIVES)
    parent = subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path / "at work").exists() or not (tmp_path / "at work").read_text():
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    child = int((tmp_path / "at work").read_text())
    deadline = time.monotonic() + 10
    while not gone(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (tmp_path / "tidied").exists()


# --- its last line --------------------------------------------------------------------------------------------------


def test_out_of_memory_is_one_line():
    line = processes.one_line(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. See docs"))
    assert line == "out of memory on the device: lower the batch size. (CUDA out of memory)"


def test_only_what_the_user_can_mend_is_one_line():
    assert processes.one_line(EpsdError("x")) == "x"
    assert processes.one_line(OSError(errno.EROFS, "Read-only file system", "out")) == "out: Read-only file system."
    assert processes.one_line(ValueError("x")) is None
