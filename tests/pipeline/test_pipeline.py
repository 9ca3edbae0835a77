"""The five stages end to end, as their users run them: the default, a killed run, experiments, real photographs."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import warm
from conftest import ROOT, shared_file
from epsd.masks import Mask
from epsd.project.artifacts import load_state
from epsd.project.params import override

pytestmark = pytest.mark.slow

SMALL = {
    "data.limit": 40,
    "train.epochs": 3,
    "evaluate.latency_repeats": 2,
    "voc.train": 16,
    "voc.validation": 4,
    "voc.test": 8,
    "detect.epochs": 1,
    "detect.pictures": 1,
}
"""Numbers that make a run of seconds; what it learns does not matter here."""

NO_FILES = {"evaluate.export.onnx": False, "detect.onnx": False}
"""Where it does not matter either what is handed on."""


class Project:
    """A clone of the project in a folder of its own, with its own git history, DVC cache and MLflow store.

    Its stages are processes of `warm` that run the clone's code; with `cold`, Python as a user starts it.
    """

    def __init__(self, folder: Path, changes: Mapping[str, Any], cold: bool = False) -> None:
        self.folder, self.cold = folder, cold
        names = self._git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").split("\n")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / "dvc.lock").unlink(missing_ok=True)
        self.change(changes)
        self._git(folder, "init", "-q")
        self._git(folder, "add", "-A")
        self._git(folder, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start")

    @staticmethod
    def _git(folder: Path, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        """As a user's shell has it: the environment's tools first, nothing of the test's own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "EPSD_", "PYTEST_"))}
        programs = [str(Path(sys.executable).parent), os.environ["PATH"]]
        path = os.pathsep.join(programs if self.cold else [str(Path(warm.python()).parent), *programs])
        identity = {
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@t",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@t",
        }
        return {**kept, **identity, "PATH": path, "DVC_NO_ANALYTICS": "1"}

    def change(self, changes: Mapping[str, Any]) -> None:
        """Set values of params.yaml by dotted name, comments kept."""
        yaml, path = YAML(), self.folder / "params.yaml"
        tree = yaml.load(path)
        for name, value in changes.items():
            override(tree, name, value)
        yaml.dump(tree, path)

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=900
        )
        text = done.stdout + done.stderr
        assert not check or done.returncode == 0, text[-3000:]
        return text

    def repro(self, check: bool = True) -> set[str]:
        """`dvc repro`; the stages whose script ran."""
        self.said = self.run("dvc", "repro", check=check)
        return {line.split("'")[1] for line in self.said.splitlines() if line.startswith("Running stage '")}

    def json(self, name: str) -> Any:
        return json.loads((self.folder / "artifacts" / name).read_text())

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.folder / "mlflow.db") as link:
            return link.execute(query).fetchall()


STAGES = {"prepare", "prune", "train", "evaluate", "detect"}


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The embedded default, as `make repro` runs it."""
    project = Project(tmp_path_factory.mktemp("default"), {}, cold=True)
    assert project.repro() == STAGES
    return project


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Project]:
    yield Project(tmp_path / "project", {**SMALL, **NO_FILES})


def test_the_default_reaches_what_the_readme_says(default: Project) -> None:
    metrics, detect = default.json("evaluate/metrics.json"), default.json("detect/metrics.json")
    assert metrics["test"]["top1"] >= 0.98
    assert detect["map50"] >= 0.90
    assert metrics["model"]["sparsity"] == pytest.approx(0.95, abs=1e-4)
    assert metrics["model"]["bytes_sparse"] < metrics["model"]["bytes_dense"] / 3


def test_the_default_leaves_one_finished_run_with_every_stages_figures(default: Project) -> None:
    runs = default.rows("select run_uuid, status, name from runs")
    assert [(status, name) for _, status, name in runs] == [("FINISHED", "epsd-cskd-s0.95-seed0-digits")]
    assert default.json("train/run.json")["run_id"] == runs[0][0]
    keys = {key for (key,) in default.rows("select distinct key from latest_metrics")}
    assert {
        "test/top1",
        "test/ece",
        "model/compression",
        "detect/map50",
        "mask/sparsity",
        "val/top1",
        "train/loss",
    } <= keys
    params = dict(default.rows("select key, value from params"))
    assert params["prune.score.name"] == "epsd"
    assert params["prune.sparsity"] == "0.95"


def test_the_mask_holds_in_classifier_and_detector(default: Project) -> None:
    mask = Mask.load(default.folder / "artifacts/prune/mask.safetensors")
    classifier = load_state(default.folder / "artifacts/train/model.safetensors")
    detector = load_state(default.folder / "artifacts/detect/model.safetensors")
    followed = 0
    for name, keep in mask.keep.items():
        assert not classifier[name][~keep].any()
        if (inside := f"backbone.body.{name}") in detector:
            followed += 1
            assert not detector[inside][~keep].any()
    assert followed >= len(mask.keep) - 1, "all but the classifier's last layer"


def test_a_second_repro_does_nothing_and_dvc_shows_metrics_and_plots(default: Project) -> None:
    assert default.repro() == set()
    assert "up to date" in default.said
    shown = default.run("dvc", "metrics", "show")
    assert "map50" in shown
    assert "top1" in shown
    default.run("dvc", "plots", "show")
    page = (default.folder / "dvc_plots" / "index.html").read_text()
    plots = YAML(typ="safe").load(ROOT / "dvc.yaml")["plots"]
    titles = [one["title"] for plot in plots if isinstance(plot, dict) for one in plot.values()]
    assert [name for name in (*titles, *(plot for plot in plots if isinstance(plot, str))) if name not in page] == []


def test_only_what_depends_on_a_change_runs_again(small: Project) -> None:
    assert small.repro() == STAGES
    first = small.json("train/run.json")["run_id"]
    small.change({"train.lr": 0.05})
    assert small.repro() == {"train", "evaluate", "detect"}
    second = small.json("train/run.json")["run_id"]
    assert "train.lr" in small.run("dvc", "params", "diff")
    small.change({"detect.lr": 0.01})
    assert small.repro() == {"detect"}
    unused = small.folder / "src/epsd/objectives/dlb.py"
    unused.write_text(unused.read_text() + "\n# edited\n")
    assert small.repro() == set()
    small.change({"train.lr": 0.1, "detect.lr": SMALL.get("detect.lr", _default("detect.lr"))})
    assert small.repro() == set(), "restored from DVC's cache"
    assert small.json("train/run.json")["run_id"] == first != second


def _default(dotted: str) -> Any:
    node: Any = YAML(typ="safe").load(ROOT / "params.yaml")
    for part in dotted.split("."):
        node = node[part]
    return node


def _checkpoint(project: Project) -> Path | None:
    return next(project.folder.glob(".epsd/checkpoints/*/last.safetensors"), None)


def _alive(script: str, folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                inside = (entry / "cwd").readlink() == folder
            except OSError:
                continue
            if inside and script.encode() in command:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_killed_training_goes_on_to_the_same_bits_in_the_same_run(tmp_path: Path) -> None:
    """SIGKILL to dvc: no orphan trains on; `dvc repro` again ends where an uninterrupted run does."""
    changes = {**SMALL, "train.epochs": 12, "data.limit": None, "objective.name": "cskd"}
    broken = Project(tmp_path / "broken", changes, cold=True)
    process = subprocess.Popen(
        ["dvc", "repro", "train"], cwd=broken.folder, env=broken.environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while _checkpoint(broken) is None:
        assert process.poll() is None, "it ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 15
    while _alive("stages/train.py", broken.folder):
        assert time.monotonic() < deadline, "an orphan trains on"
        time.sleep(0.2)
    begun = broken.rows("select run_uuid from runs")
    assert len(begun) == 1
    broken.run("dvc", "repro", "train")
    assert broken.rows("select run_uuid, status from runs") == [(begun[0][0], "FINISHED")]
    points = broken.rows("select step, count(*) from metrics where key = 'train/loss' group by step order by step")
    assert points == [(epoch, 1) for epoch in range(1, 13)]
    assert _checkpoint(broken) is None, "checkpoints of finished trainings are removed"
    resumed = load_state(broken.folder / "artifacts/train/model.safetensors")
    broken.run("dvc", "repro", "-s", "-f", "train")
    for name, tensor in load_state(broken.folder / "artifacts/train/model.safetensors").items():
        assert (resumed[name] == tensor).all(), name


def test_experiments_run_and_queue_into_one_store(small: Project) -> None:
    until = "evaluate"  # without detect: three times ten seconds less
    small.run("dvc", "exp", "run", "-S", "train.lr=0.05", until)
    for seed in (1, 2):
        small.run("dvc", "exp", "run", "--queue", "-S", f"seed={seed}", until)
    small.run("dvc", "queue", "start", "-j", "2")
    deadline = time.monotonic() + 600
    while "Running" in (status := small.run("dvc", "queue", "status")) or "Queued" in status:
        assert time.monotonic() < deadline, status
        time.sleep(2)
    assert "Failed" not in status, status + small.run("dvc", "queue", "logs", check=False)
    names = sorted(name for (name,) in small.rows("select name from runs where status = 'FINISHED'"))
    assert names == [f"epsd-cskd-s0.95-seed{seed}-digits" for seed in (0, 1, 2)]
    tags = {value for (value,) in small.rows("select value from tags where key = 'dvc.exp_name'")}
    assert len(tags) == 3
    locations = [uri for (uri,) in small.rows("select artifact_uri from runs")]
    assert all(str(small.folder / "mlruns") in uri for uri in locations)
    shown = small.run("dvc", "exp", "show", "--csv")
    assert shown.count("0.05") >= 1
    assert "top1" in shown


def test_real_photographs_and_real_voc_pictures(tmp_path: Path) -> None:
    """CIFAR-10 as an image folder in a zip, VOC as a devkit in a zip: the same five stages on a small subset."""
    cifar, voc = shared_file("datasets", "cifar10.zip"), shared_file("datasets", "voc2007-sample.zip")
    project = Project(tmp_path / "project", {**SMALL, "data.crop_padding": 4, "data.flip": True, "data.limit": 12})
    yaml, path = YAML(), project.folder / "params.yaml"
    tree = yaml.load(path)
    tree["dataset"] = {"name": "image_folder", "root": str(cifar), "size": 32}
    tree["voc"] = {"name": "devkit", "root": str(voc), "limit": 6}
    tree["train"]["batch_size"] = tree["prune"]["batch_size"] = 16
    yaml.dump(tree, path)
    assert project.repro() == STAGES
    data = project.json("data/data.json")
    assert data["class_names"][0] == "airplane"
    assert data["image_shape"] == [3, 32, 32]
    assert data["sizes"]["test"] == 10 * 12
    assert project.json("evaluate/metrics.json")["model"]["sparsity"] == pytest.approx(0.95, abs=1e-3)
    assert project.json("detect/metrics.json")["sparsity"] == pytest.approx(0.95, abs=0.02)
    assert project.json("voc/voc.json")["class_names"][:3] == ["aeroplane", "bicycle", "bird"]
    per_class = (project.folder / "artifacts/detect/per_class.csv").read_text().splitlines()
    assert len(per_class) == 1 + len(project.json("voc/voc.json")["class_names"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune.sparsity": 1.0}, "prune.sparsity"),
        ({"prune.sparsity": -0.1}, "prune.sparsity"),
        ({"prune.sparsityy": 0.9}, "sparsityy"),
        ({"train.epochs": "many"}, "train.epochs"),
        ({"objective.name": "cskdd"}, "Did you mean 'cskd'"),
        ({"detect.detector.name": "yolo"}, "faster_rcnn"),
        ({"objective.temprature": 3.0}, "temperature"),
        ({"train.batch_size": 4096}, "batch"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_lost(default: Project, changes: dict[str, Any], message: str) -> None:
    before = (default.folder / "params.yaml").read_text()
    saved = (default.folder / "artifacts/train/model.safetensors").read_bytes()
    try:
        default.change(changes)
        stage = "train" if "train.batch_size" in changes else "prepare"
        command = [warm.python(), f"stages/{stage}.py"]
        done = subprocess.run(command, cwd=default.folder, env=default.environment, capture_output=True, text=True)
    finally:
        (default.folder / "params.yaml").write_text(before)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (default.folder / "artifacts/train/model.safetensors").read_bytes() == saved
