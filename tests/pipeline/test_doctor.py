"""`epsd doctor` and `epsd` alone: what fails is a line, and the first command is the one that makes sense here."""

from pathlib import Path

import pytest

from epsd.cli import main
from epsd.pipeline import doctor
from epsd.project import artifacts
from epsd.types import EpsdError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    return tmp_path


def steps(monkeypatch: pytest.MonkeyPatch, *stale: str) -> list[str]:
    monkeypatch.setattr(doctor, "stale_stages", lambda: list(stale))
    return [command for command, _ in doctor.next_steps()]


def test_the_next_step_follows_the_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps(monkeypatch)[0] == "dvc repro", "nothing has run"
    for path in (artifacts.DATA_INDEX, artifacts.METRICS):
        path.parent.mkdir(parents=True)
        path.touch()
    assert steps(monkeypatch, "train")[0] == "dvc repro"
    assert steps(monkeypatch) == [
        "make ui",
        "epsd predict IMAGE",
        "epsd export --to FOLDER",
        "epsd compare",
        "epsd tune",
    ]
    (project / "mlruns").mkdir()
    (project / "mlruns" / "optuna.journal").touch()
    assert steps(monkeypatch)[-1] == "epsd tune --apply"
    (project / "dvc.yaml").unlink()
    assert steps(monkeypatch) == ["cd PROJECT"]


def test_without_a_command_it_says_what_is_next(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("dvc repro ")


def test_what_fails_is_a_finding(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No DVC here, a store that nobody knows, a file that is damaged: three lines, and status 1."""

    def fails() -> list[str]:
        raise EpsdError("dvc status: not inside of a DVC repository")

    monkeypatch.setattr(doctor, "stale_stages", fails)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere")
    artifacts.SERVED_MODEL.mkdir(parents=True)
    (artifacts.SERVED_MODEL / "model.onnx").write_bytes(b"x")
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "versions",
        "device",
        "space",
        "! runs",
        "! forms",
        "! stages",
    ]
    assert "carries no digest" in lines[4] and "is no address" in lines[3]


def test_a_store_that_is_not_there_yet_is_fine(project: Path) -> None:
    assert doctor._runs() == doctor.Finding("runs", f"sqlite:///{project}/mlflow.db: the first training makes it")


def test_completion_knows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "predict" in script and "--sparsity" not in script


def test_the_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"epsd {version('epsd')}\n"
