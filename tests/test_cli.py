"""The `epsd` command: what it prints, its exit status, and one line for a mistake."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from epsd.cli import main
from epsd.project import presets


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
    """An empty project folder with the repository's presets."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "presets").symlink_to(root / "presets")
    return tmp_path


@pytest.mark.parametrize("arguments", [["preset"], ["preset", "--list"]])
def test_list_names_every_preset(arguments: list[str], project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in (project / "presets").glob("*.yaml"))
    assert all(len(line.split()) > 3 for line in lines)


def test_show_prints_the_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset", "cifar10-vgg19"]) == 0
    assert capsys.readouterr().out == presets.whole("cifar10-vgg19")
    assert not (project / "params.yaml").exists()


def test_apply_writes_and_says_where_the_copy_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").write_text("mine: 1\n")
    assert main(["preset", "digits", "--apply"]) == 0
    assert (project / "params.yaml").read_text() == (project / "presets/digits.yaml").read_text()
    (copy,) = project.glob("params.yaml.*")
    assert copy.read_text() == "mine: 1\n"
    assert copy.name in capsys.readouterr().out


def test_apply_is_of_the_project_wherever_one_is_in_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "stages").mkdir()
    monkeypatch.chdir(project / "stages")
    assert main(["preset", "digits", "--apply"]) == 0
    assert capsys.readouterr().out.startswith("../params.yaml is now the preset 'digits'")
    assert (project / "params.yaml").exists() and not any((project / "stages").iterdir())
    (project / "dvc.yaml").unlink()
    assert main(["preset", "digits", "--apply"]) == 1
    assert "belongs to no project" in capsys.readouterr().err
    assert main(["preset", "--apply"]) == 1
    assert "--apply needs a NAME. Valid: cifar10-quick, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--apply", "x"], "'x' is no number of a trial: these count from 0"),
        (["tune", "--trials", "0"], "'0' is no whole number from 1 on"),
        (["study", "digits", "--minutes", "soon"], "'soon' is no number above 0"),
    ],
)
def test_wrong_numbers_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_an_interrupt_is_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> list[str]:
        os.kill(os.getpid(), signal.SIGINT)
        return []

    monkeypatch.setattr("epsd.project.presets.names", interrupted)
    assert main(["preset", "--list"]) == 130
    assert capsys.readouterr().err == "epsd: interrupted.\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "study.db"), "study.db: No space left on device."),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            "not enough memory (libtorch_cpu.so:",
        ),
        (MemoryError("Unable to allocate 8 GiB"), "out of memory"),
    ],
)
def test_a_machine_without_room_is_one_line(
    error: Exception, message: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_room() -> list[str]:
        raise error

    monkeypatch.setattr("epsd.project.presets.names", without_room)
    assert main(["preset", "--list"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"epsd: {message}") and told.count("\n") == 1


def test_an_unknown_preset_is_one_line_and_changes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").write_text("mine: 1\n")
    assert main(["preset", "cifar10-resnet", "--apply"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "Did you mean 'cifar10-resnet18'" in message
    assert (project / "params.yaml").read_text() == "mine: 1\n"


@pytest.mark.parametrize("arguments", [["presets"], ["preset", "digits", "--aply"]])
def test_unknown_arguments_show_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: epsd" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["preset", "tune", "compare", "study", "analyse", "predict", "promote"])
def test_every_command_can_be_quiet(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--quiet" in capsys.readouterr().out


def test_quiet_is_told_to_all_that_follows(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPSD_QUIET", "")
    assert main(["preset", "--list", "--quiet"]) == 0
    assert os.environ["EPSD_QUIET"] == "1"


def test_starts_without_the_heavy_libraries() -> None:
    heavy = "{'torch', 'mlflow', 'optuna', 'pandas'}"
    code = f"import sys, epsd.cli; epsd.cli.parser(); sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
