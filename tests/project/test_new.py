"""`epsd init`: a project for whoever has installed the package, from a built wheel, without a clone."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from epsd.cli import main
from epsd.project import new
from epsd.project.params import read_yaml


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as its wheel has it, unpacked."""
    root, place = Path(__file__).parents[2], tmp_path_factory.mktemp("wheel")
    options = ["-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index", "-w", str(place)]
    build = {**os.environ, "TMPDIR": str(place)}
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(root)], check=True, env=build)
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    return place / "site"


def run(site: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "EPSD_QUIET": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment.pop("DVC_ROOT", None)
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_project_from_the_wheel_runs_and_hangs_on_the_packages_version(site: Path, tmp_path: Path) -> None:
    assert "cd mine && dvc repro" in run(site, tmp_path, "epsd.cli", "init", "mine").stdout
    project = tmp_path / "mine"
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("limit: null", "limit: 4", 1))
    run(site, project, "dvc", "repro", "-q", "prepare")
    assert (project / "artifacts/data/data.json").is_file()
    assert (project / new.PACKAGE).read_text().startswith("epsd ")

    def stale() -> dict[str, object]:
        return dict(json.loads(run(site, project, "dvc", "status", "--json", "prepare").stdout))

    assert stale() == {}
    (project / new.PACKAGE).write_text("epsd 99.0\n")
    assert "prepare" in stale(), "another version of the package"


def test_every_dependency_on_the_package_became_its_version(root: Path) -> None:
    ours = read_yaml(root / "dvc.yaml")["stages"]
    text = new.of_package((root / "dvc.yaml").read_text())
    assert "src/" not in text
    from ruamel.yaml import YAML

    theirs = YAML(typ="safe").load(text)["stages"]
    assert list(theirs) == ["package", *ours]
    for name, stage in ours.items():
        kept = [entry for entry in stage["deps"] if not entry.startswith("src/")]
        assert sorted(theirs[name]["deps"]) == sorted([*kept, new.PACKAGE])
        assert {**theirs[name], "deps": 0} == {**stage, "deps": 0}


def test_a_folder_that_is_not_empty_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photo.png").touch()
    assert main(["init", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
