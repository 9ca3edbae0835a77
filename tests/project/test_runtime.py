import os
import subprocess
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
    assert {"python", "platform", "cpu", *runtime.PACKAGES} <= set(found)
    assert "not installed" not in found.values(), "a name that no package has"
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

    assert os.environ["DO_NOT_TRACK"] == "true"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_an_error_in_one_line_keeps_no_password() -> None:
    text = runtime.brief(RuntimeError("no answer from\n http://me:secret@host:1/x " + "and so on " * 30))
    assert text.startswith("no answer from http://host:1/x and so on") and len(text) == 160
    assert runtime.brief(KeyError()) == "KeyError"
