"""The same parameters give the same bytes: two runs of every stage, compared file by file, but for times and dates."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from conftest import ROOT

SMALL: dict[str, dict[str, Any]] = {
    "data": {"limit": 12},
    "prune": {"batch_size": 32},
    "train": {"epochs": 1, "batch_size": 32},
    "evaluate": {"latency_repeats": 1},
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
    for number in ("1", "2"):
        folder = tmp_path_factory.mktemp("bytes")
        shutil.copy(empty_store, folder / "mlflow.db")
        (folder / "dvc.yaml").touch()
        with (folder / "params.yaml").open("w") as file:
            yaml.dump(params, file)
        environment = {**os.environ, "PYTHONHASHSEED": number, "OMP_NUM_THREADS": "1"}
        environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        environment.pop("DVC_ROOT", None)
        command = [sys.executable, str(Path(__file__).with_name("rounds.py")), str(ROOT / "stages"), *STAGES]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        folders.append(folder / "artifacts")
    return folders


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
