import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from epsd.project import runtime


def test_root_is_where_dvc_says(monkeypatch, tmp_path):
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "tmp1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert runtime.project_root() == tmp_path.resolve()
    assert runtime.state_folder("locks") == tmp_path.resolve() / ".epsd" / "locks"


def test_the_users_paths_start_at_the_root_also_in_a_copy(monkeypatch, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/me")
    assert runtime.located("images.zip") == tmp_path.resolve() / "images.zip"
    assert runtime.located("/data/images") == Path("/data/images")
    assert runtime.located("~/images") == Path("/home/me/images")


def test_root_without_dvc_is_the_folder_of_dvc_yaml(monkeypatch, tmp_path):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert runtime.project_root() == inner.resolve()
    (tmp_path / "dvc.yaml").touch()
    assert runtime.project_root() == tmp_path.resolve()


def test_versions_say_what_made_a_result():
    found = runtime.versions()
    assert {"python", "platform", "epsd", "torch", "torchvision", "mlflow", "cpu"} <= set(found)
    assert found["torch"] == torch.__version__.split("+")[0]
    assert all(isinstance(value, str) and value for value in found.values())
    found["torch"] = "changed"
    assert runtime.versions()["torch"] != "changed"


def test_versions_name_commit_and_dirt(monkeypatch, tmp_path):
    runtime._versions.cache_clear()
    monkeypatch.chdir(tmp_path)
    assert "git.commit" not in runtime.versions()
    for command in (
        ["init", "-q"],
        ["-c", "user.email=a@b", "-c", "user.name=n", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], check=True)
    runtime._versions.cache_clear()
    assert (len(runtime.versions()["git.commit"]), runtime.versions()["git.dirty"]) == (40, "false")
    (tmp_path / "file").touch()
    subprocess.run(["git", "add", "file"], check=True)
    runtime._versions.cache_clear()
    assert runtime.versions()["git.dirty"] == "true"
    runtime._versions.cache_clear()


@pytest.mark.parametrize("value, quiet", [("1", True), ("true", True), ("0", False), ("", False)])
def test_quiet(monkeypatch, value, quiet):
    monkeypatch.setenv("EPSD_QUIET", value)
    assert runtime.quiet() is quiet


def test_telemetry_is_off_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    runtime.no_telemetry()
    import os

    assert os.environ["DO_NOT_TRACK"] == "true"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_an_error_in_one_line_keeps_no_password() -> None:
    text = runtime.brief(RuntimeError("no answer from\n http://me:secret@host:1/x " + "and so on " * 30))
    assert text.startswith("no answer from http://host:1/x and so on") and len(text) == 160
    assert runtime.brief(KeyError()) == "KeyError"


class Asked(BaseException):
    """What the handler of these tests raises."""


@pytest.fixture
def raising():
    def handle(number, frame):
        raise Asked(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_the_block(raising, number):
    done = []
    with pytest.raises(Asked), runtime.signals_wait(), runtime.signals_wait():
        os.kill(os.getpid(), number)
        done.append("all of it")
    assert done == ["all of it"]
    assert signal.getsignal(number) is raising


def test_a_second_signal_does_not_wait(raising):
    done = []
    with pytest.raises(Asked), runtime.signals_wait():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(2)
    assert done == [1]
    assert signal.getsignal(signal.SIGTERM) is raising


class StopsInItsDestructor:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_that_python_drops_comes_once_more(raising, capsys):
    """In a destructor an exception of a signal's handler is printed and forgotten: the process would go on."""
    with pytest.raises(Asked), runtime.stops_arrive(Asked):
        StopsInItsDestructor()
        for _ in range(1000):
            time.sleep(0.01)
    assert capsys.readouterr().err == ""
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_stop_that_python_drops_waits_like_any_other(raising):
    """For what holds stops back by itself, and for `signals_wait`."""
    done, holding = [], [True]
    with pytest.raises(Asked), runtime.stops_arrive(Asked, held=lambda: holding[0]):
        StopsInItsDestructor()
        time.sleep(0.1)
        done.append("held")
        with runtime.signals_wait():
            holding.clear()
            holding.append(False)
            time.sleep(0.1)
            done.append("waited")
        time.sleep(10)
    assert done == ["held", "waited"]


def test_other_exceptions_that_python_drops_are_told_as_ever(raising, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    with runtime.stops_arrive(KeyboardInterrupt):
        StopsInItsDestructor()
    assert [type(value) for value in told] == [Asked]


def test_what_a_signal_does_by_default_is_left_as_it_is():
    before = signal.getsignal(signal.SIGHUP)
    assert before is signal.SIG_DFL or callable(before)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime.signals_wait():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
