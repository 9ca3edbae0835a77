"""The same parameters give the same bytes: two runs of every stage, compared file by file, but for times and dates."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from PIL import Image
from ruamel.yaml import YAML

import warm
from conftest import ROOT
from epsd.datasets.image_folder import ImageFolder
from epsd.files.archives import ArchiveError
from epsd.pipeline import changes
from epsd.preparing.write import prepare

SMALL: dict[str, dict[str, Any]] = {
    "data": {"limit": 12},
    "prune": {"batch_size": 32},
    "train": {"epochs": 1, "batch_size": 32},
    "evaluate": {"latency_repeats": 1, "export": {"int8": True}},  # `auto` asks the clock whether int8 is kept
    "voc": {"name": "digit_scenes", "train": 2, "validation": 1, "test": 2},
    "detect": {"epochs": 1, "batch_size": 2, "pictures": 1},
}
STAGES = ("prepare", "prune", "train", "evaluate", "detect")
MEASURED = re.compile(
    r"seconds|time|memory|latency_|_ms\b|load_of_others"  # keys and columns
    r"|ms of one|as fast as|Other processes had|^\| (torch|ONNX|dense twin)"  # lines of the model card
)
IDENTITY = {"run_id", "history", "checksum", "model_uuid", "utc_time_created", "model_size_bytes"}
"""Of a run and of files that hold times; MLflow's name, date and size (with the times) of an exported model."""


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> list[Path]:
    """Two folders in which every stage has run, in processes that order their sets differently."""
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load((ROOT / "params.yaml").read_text())
    for section, values in SMALL.items():
        params[section] = values if section == "voc" else params[section] | values
    folders = []
    for seed in ({}, {"PYTHONHASHSEED": "2"}):  # without one Python takes a seed by chance
        folder = tmp_path_factory.mktemp("bytes")
        shutil.copy(empty_store, folder / "mlflow.db")
        (folder / "dvc.yaml").touch()
        with (folder / "params.yaml").open("w") as file:
            yaml.dump(params, file)
        run(folder, *STAGES, **seed)
        folders.append(folder / "artifacts")
    return folders


def run(folder: Path, *stages: str, **more: str) -> str:
    """The stages in one process; what it said. With a hash seed Python begins anew, else in `warm`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", **more}
    environment.pop("DVC_ROOT", None)
    command = [warm.python(), str(Path(__file__).with_name("rounds.py")), str(ROOT / "stages"), *stages]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def lasting(path: Path) -> object:
    """What of a file is no time and no identity of a run: where there is none of either, its bytes."""
    match path.suffix, path.name:
        case ".json", _:
            return _without(json.loads(path.read_text()))
        case ".csv", _:
            rows = list(csv.DictReader(io.StringIO(path.read_text())))
            return [_without(row) for row in rows]
        case _, "MLmodel":
            return _without(YAML(typ="safe", pure=True).load(path.read_text()))
        case ".md", _:
            text = re.sub(r"\b[0-9a-f]{32}\b", "RUN", path.read_text())
            return [line for line in text.splitlines() if not MEASURED.search(line)]
    return path.read_bytes()


def _without(node: Any) -> Any:
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if key not in IDENTITY and not MEASURED.search(str(key))}
        return {key: _without(value) for key, value in kept.items()}
    return [_without(part) for part in node] if isinstance(node, list) else node


@pytest.mark.slow
def test_every_file_of_two_runs_is_the_same(rounds: list[Path]) -> None:
    one, other = ({path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in rounds)
    assert one == other
    assert len(one) > 40
    assert [path for path in sorted(one) if lasting(rounds[0] / path) != lasting(rounds[1] / path)] == []


@pytest.mark.slow
def test_what_a_later_stage_depends_on_is_the_same_to_the_byte(rounds: list[Path]) -> None:
    """But for run.json, which names the run: a repeated stage makes no later one stale."""
    stages = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
    deps = {dep for stage in stages.values() for dep in stage["deps"] if dep.startswith("artifacts/")}
    for dep in sorted(deps - {"artifacts/train/run.json", "artifacts/train/history.csv"}):
        place = dep.removeprefix("artifacts/")
        files = [path for path in (rounds[0] / place, *(rounds[0] / place).rglob("*")) if path.is_file()]
        assert files
        for path in files:
            assert path.read_bytes() == (rounds[1] / path.relative_to(rounds[0])).read_bytes(), path


# --- links into DVC's cache -----------------------------------------------------------------------------------------


def dvc(folder: Path, *commands: str) -> None:
    """Commands of DVC in `folder`, as a shell gives them."""
    from dvc.cli import main

    with contextlib.chdir(folder):
        for command in commands:
            assert main(command.split()) == 0, command


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["symlink", "hardlink", "reflink"])
def test_stages_read_links_into_the_cache_and_write_beside_them(kind: str, rounds: list[Path], tmp_path: Path) -> None:
    """From the last stage to the first, so that each of them reads links and replaces others."""
    if kind == "reflink":
        (tmp_path / "a").touch()
        if subprocess.run(
            ["cp", "--reflink=always", "a", "b"], cwd=tmp_path, check=False, capture_output=True
        ).returncode:
            pytest.skip(f"the file system of {tmp_path} makes no reflinks")
    shutil.copytree(rounds[0].parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "dvc.yaml").unlink()
    dvc(tmp_path, "init --no-scm -q", f"config cache.type {kind}", "add -q artifacts")
    files = [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    assert kind == "reflink" or all(
        path.is_symlink() or path.stat().st_nlink > 1 for path in files if path.stat().st_size
    )
    cache = {path: path.read_bytes() for path in (tmp_path / ".dvc" / "cache").rglob("*") if path.is_file()}
    assert len(cache) > 40
    said = run(tmp_path, *reversed(STAGES))
    assert "tracking: " not in said and "not possible" not in said
    assert [path for path, content in cache.items() if path.read_bytes() != content] == []
    for path in files:
        assert not path.is_symlink() and path.stat().st_nlink == 1, path
        assert lasting(path) == lasting(rounds[0] / path.relative_to(tmp_path / "artifacts")), path


def test_a_data_set_under_dvc_is_read_through_its_links_and_noticed_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for number in range(12):
        place = tmp_path / "data" / "photos" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * number).save(place / f"{number}.png")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    dvc(tmp_path, "init -q", "config cache.type symlink", "add -q data/photos")
    told = subprocess.run(
        ["git", "status", "-s", "-uall", "data"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["??", "data/photos.dvc"]
    assert (place / "11.png").is_symlink()
    photos = tmp_path / "data" / "photos"
    index = prepare(ImageFolder(root=str(photos))(), tmp_path / "out")
    assert sum(index["sizes"].values()) == 12 and index["class_names"] == ["a", "b"]
    changes.remember({photos: "d"})
    assert changes.changed({photos: "d"}) == []
    (place / "11.png").unlink()
    Image.new("L", (8, 8), 255).save(place / "11.png")
    assert changes.changed({photos: "d"}) == [photos], "before and after DVC knows of it"
    dvc(tmp_path, "add -q data/photos")
    assert (place / "11.png").is_symlink() and changes.changed({photos: "d"}) == [photos]
    shutil.rmtree(photos)
    with pytest.raises(ArchiveError, match=r"photos: no such folder or archive\. DVC has it: `dvc pull .*photos\.dvc`"):
        ImageFolder(root=str(photos))()
    dvc(tmp_path, "checkout -q data/photos.dvc")
    assert ImageFolder(root=str(photos))().class_names == ["a", "b"]


def test_dvc_itself_watches_a_data_set_that_dvc_yaml_names(tmp_path: Path) -> None:
    """What docs/images.md says: one more line under `deps` of prepare."""
    (tmp_path / "photos.zip").write_bytes(b"one")
    dvc(tmp_path, "init --no-scm -q", "add -q photos.zip")
    stage = {"cmd": "echo > made", "deps": ["photos.zip"], "outs": ["made"]}
    YAML().dump({"stages": {"prepare": stage}}, tmp_path / "dvc.yaml")
    with contextlib.chdir(tmp_path), Repo() as repo:
        assert [one.addressing for one in repo.reproduce()] == ["prepare"]
        (tmp_path / "photos.zip").unlink()
        (tmp_path / "photos.zip").write_bytes(b"another")
        assert {"prepare", "photos.zip.dvc"} == set(repo.status())
