"""Every file that a stage reads, damaged in every way: one line that names the file, and nothing is written."""

import contextlib
import importlib.util
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from conftest import ROOT
from epsd.compute.devices import Machine
from epsd.datasets.digit_scenes import DigitScenes
from epsd.files import digests
from epsd.project import artifacts
from epsd.project.params import load
from epsd.project.processes import one_line
from epsd.tracking import models
from epsd.types import EpsdError
from handed_on import contents, servable

SMALL: dict[str, dict[str, Any]] = {
    "data": {"limit": 12},
    "prune": {"score": {"name": "random"}, "compare": False, "batch_size": 32},
    "train": {"epochs": 1, "batch_size": 32},
    "evaluate": {"latency_repeats": 0},
    "voc": {"name": "digit_scenes", "train": 2, "validation": 1, "test": 2},
    "detect": {"epochs": 1, "batch_size": 2, "pictures": 0},
}
PICTURE = artifacts.VOC / "VOCdigits" / "JPEGImages" / "train_00000.jpg"
DATA = {split: [artifacts.DATA / f"{split}_{kind}.npy" for kind in ("images", "labels")] for split in ("train", "test")}
MODEL = [artifacts.MODEL, artifacts.MODEL_CARD, artifacts.RUN]
READS: dict[str, list[Path]] = {
    "prune": [artifacts.DATA_INDEX, *DATA["train"]],
    "train": [
        artifacts.DATA_INDEX,
        *DATA["train"],
        artifacts.MASK,
        artifacts.CHANNELS,
        artifacts.INITIAL,
        artifacts.PRUNE_REPORT,
    ],
    "evaluate": [artifacts.DATA_INDEX, *DATA["test"], *MODEL, artifacts.HISTORY],
    "detect": [artifacts.VOC_INDEX, PICTURE, *MODEL, artifacts.MASK],
}
FILES = [(stage, path) for stage, paths in READS.items() for path in paths]
TABLES = [(stage, path) for stage, path in FILES if path.suffix == ".json"]


def sealed(content: dict[str, Any]) -> bytes:
    """As if we had written it; also NaN and infinity, which we refuse to write."""
    text = digests.sealed(json.loads(json.dumps(content), parse_constant=lambda name: 8e300 if "I" in name else None))
    body = text.rpartition(',\n  "checksum"')[0].replace("8e+300", "Infinity")
    return f'{body},\n  "checksum": ["crc32", "{digests.digest([body.encode()])}"]\n}}\n'.encode()


def stage(name: str) -> Callable[..., Any]:
    """The body of a stage."""
    spec = importlib.util.spec_from_file_location(f"stage_{name}", ROOT / "stages" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    body: Callable[..., Any] = module.main
    return body


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    """A folder in which prepare, prune and train have run."""
    folder = tmp_path_factory.mktemp("damage")
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load((ROOT / "params.yaml").read_text())
    for section, values in SMALL.items():
        params[section] = values if section == "voc" else params[section] | values
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.delenv("DVC_ROOT", raising=False)
        for name in ("prepare", "prune", "train"):
            stage(name)(load(), Machine())
        yield folder


def refused(name: str, path: Path, content: bytes, *others: Path) -> None:
    """The stage ends with one line that names the file, whose `content` is now this; all else is as it was."""
    sound = {file: file.read_bytes() for file in artifacts.ROOT.rglob("*") if file.is_file()}
    path.write_bytes(content)
    try:
        with pytest.raises(Exception) as caught:
            stage(name)(load(), Machine())
        line = one_line(caught.value)
        assert line is not None, repr(caught.value)
        assert any(file.name in line for file in (path, *others)), line
        assert "\n" not in line and len(line) < 500, line
        left = {file: file.read_bytes() for file in artifacts.ROOT.rglob("*") if file.is_file()}
        assert left == {**sound, path: content}
    finally:
        path.write_bytes(sound[path])


def damages(content: bytes) -> Iterator[bytes]:
    """Bits flipped at the start, in the header, in the middle and at the end; cut; empty; zeros; something else."""
    for place in (0, 9, len(content) // 3, len(content) // 2, len(content) - 2):
        damaged = bytearray(content)
        damaged[place] ^= 1
        yield bytes(damaged)
    yield from (content[:100], content[:-2], b"", bytes(len(content)), b"\xff\xd8" * 40)


@pytest.mark.parametrize(("name", "path"), FILES, ids=[f"{name}-{path.name}" for name, path in FILES])
def test_damage_is_one_line_that_names_the_file(project: Path, name: str, path: Path) -> None:
    for content in damages(path.read_bytes()):
        refused(name, path, content)


NEEDED = {
    artifacts.DATA_INDEX: ("class_names", "image_shape", "mean", "std", "storage", "root", "reading", "sizes", "digest",
                           "digests", "settings"),
    artifacts.MODEL_CARD: ("architecture", "num_classes", "class_names", "image_shape", "mean", "std"),
    artifacts.RUN: ("run_id",),
    artifacts.VOC_INDEX: ("class_names", "scenes", "digest", "dropped"),
    artifacts.PRUNE_REPORT: (),
}  # fmt: skip
WRONG: dict[Path, dict[str, list[Any]]] = {
    artifacts.DATA_INDEX: {
        "class_names": ["ten", [], [1, 2]],
        "image_shape": [[1, 8], [1, 8, 0], "1x8x8"],
        "mean": [[], ["a"], [1e999]],
        "std": [[0.0], [-1.0], None],
        "storage": ["disk", None],
        "sizes": [{"train": -1}, {"somewhere": 3}, 7],
        "digests": [{"train_images.npy": 3}, []],
        "reading": [None, {"size": "large"}],
    },
    artifacts.MODEL_CARD: {
        "architecture": [{}, {"name": "resnet9"}, {"name": "resnet", "depth": -8}, "resnet", {"name": ["resnet"]}],
        "num_classes": [0, 3, 10**40, "ten", None],
        "class_names": [["one"], None],
        "image_shape": [[1, 8], [3, 8, 8], [1, -8, 8]],
        "mean": [[], [0.1, 0.2]],
        "std": [[0.0], ["x"]],
    },
    artifacts.RUN: {"run_id": [None, 3, {}], "name": [4], "tags": [[]], "history": [None]},
    artifacts.VOC_INDEX: {
        "class_names": [[], None, 3],
        "scenes": [{}, [], {"train": [{}]}, {"train": [], "validation": [], "test": 3}],
    },
    artifacts.PRUNE_REPORT: {"sparsity": ["0.95", None, [1]], "kept": [{}]},
}


@pytest.mark.parametrize(("name", "path"), TABLES, ids=[f"{name}-{path.name}" for name, path in TABLES])
def test_a_key_that_is_missing_or_wrong_is_one_line(project: Path, name: str, path: Path) -> None:
    """With a digest that fits, as another version might write it."""
    sound = artifacts.read_json(path)
    without = [{key: value for key, value in sound.items() if key != gone} for gone in NEEDED[path]]
    for content in [*without, *({**sound, key: value} for key, some in WRONG[path].items() for value in some)]:
        refused(name, path, sealed(content))


def test_curves_of_another_training_are_one_line(project: Path) -> None:
    other = artifacts.read_json(artifacts.RUN) | {"history": "00000000"}
    refused("evaluate", artifacts.RUN, sealed(other), artifacts.HISTORY)


SCENE: dict[str, list[Any]] = {
    "id": [None],
    "size": [[64], [0, 0], "64x64"],
    "boxes": [[[-1, 0, 5, 5]], [[0, 0, 0, 5]], [[0, 0, 900, 5]], [[0, 0, float("inf"), 5]], [[1]], "none", None],
    "labels": [[-1], [10], [], "a", None, [1.5]],
    "difficult": [[], None],
    "digest": ["00000000", None],
    "image": ["nowhere.jpg", None],
}


def test_a_scene_that_cannot_be_is_one_line(project: Path) -> None:
    path = artifacts.VOC_INDEX
    sound = artifacts.read_json(path)
    first = sound["scenes"]["train"][0] | {"boxes": [[1.0, 1.0, 9.0, 9.0]], "labels": [3], "difficult": [False]}
    for key, values in SCENE.items():
        for scene in [{**first, key: value} for value in values] + [{k: v for k, v in first.items() if k != key}]:
            content = {**sound, "scenes": {**sound["scenes"], "train": [scene, *sound["scenes"]["train"][1:]]}}
            refused("detect", path, sealed(content), Path("nowhere.jpg"), PICTURE)


@pytest.mark.parametrize(("name", "path"), [("train", artifacts.MASK), ("train", artifacts.INITIAL),
                                            ("evaluate", artifacts.MODEL), ("detect", artifacts.MODEL)])  # fmt: skip
def test_tensors_of_zeros_or_of_something_else_are_one_line(project: Path, name: str, path: Path) -> None:
    """With a digest that fits. A mask may leave layers out: those stay as they are."""
    sound, kind = path.read_bytes(), "mask" if path == artifacts.MASK else "weights"
    tensors, about = digests.load_tensors(path, kind)
    first = next(iter(tensors))
    zeros = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    others = [{**tensors, first: tensors[first][:1].clone()}, {**tensors, "stranger": tensors[first].clone()}]
    fewer = [{key: tensor for key, tensor in tensors.items() if key != first}] if kind == "weights" else []
    for damaged in (zeros, *others, *fewer):
        order = {"order": list(damaged)} if kind == "mask" else about
        digests.save_tensors(path, kind, damaged, order)
        content = path.read_bytes()
        path.write_bytes(sound)
        refused(name, path, content)


def test_labels_and_images_that_cannot_be_are_one_line(project: Path) -> None:
    """With a digest that fits."""
    index = artifacts.read_json(artifacts.DATA_INDEX)
    labels = np.load(artifacts.DATA / "test_labels.npy")
    images = np.load(artifacts.DATA / "test_images.npy")
    damaged = {
        "labels": [labels - 1, labels + 1, labels.astype(float), labels[1:], labels[:, None]],
        "images": [images[1:], images.astype(float), images[:, :, 1:], images[0]],
    }
    try:
        for kind, arrays in damaged.items():
            path = artifacts.DATA / f"test_{kind}.npy"
            sound = path.read_bytes()
            for array in arrays:
                np.save(path, array)
                content, crc = path.read_bytes(), digests.digest_of(path)
                path.write_bytes(sound)
                artifacts.write_json(artifacts.DATA_INDEX, {**index, "digests": {**index["digests"], path.name: crc}})
                refused("evaluate", path, content)
    finally:
        artifacts.write_json(artifacts.DATA_INDEX, index)


# --- no room --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Whoever writes beyond that many bytes is refused, as on a full disk, by the system itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL = [("prepare", 64, "train_images.npy"), ("prune", 64, "channels.safetensors"), ("prune", 4096, "mask.safetensors"),
        ("train", 64, "run.json|last.safetensors"), ("train", 300, "last.safetensors"),
        ("evaluate", 64, "model.sparse.safetensors"),
        ("evaluate", 100_000, "model.onnx"), ("detect", 4096, "detector.safetensors")]  # fmt: skip


@pytest.mark.parametrize(("name", "size", "file"), FULL)
def test_a_disk_without_room_is_one_line_that_names_the_file(
    name: str, size: int, file: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object
) -> None:
    """`capsys` holds in memory what pytest otherwise writes to a file. Which of several files is the first that a stage
    cannot write may hang on whether the store of runs was opened before in this process."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with contextlib.chdir(tmp_path), pytest.raises(Exception) as caught, files_up_to(size):
        stage(name)(load(), Machine())
    line = one_line(caught.value)
    assert (
        line is not None
        and any(name in line for name in file.split("|"))
        and "File too large" in line
        and "\n" not in line
    ), repr(caught.value)
    left = {path.name for path in (tmp_path / "artifacts").rglob(".*")}
    assert left == set(), "nothing half-written stays"


def test_scenes_and_models_that_do_not_fit_on_the_disk_are_named(tmp_path: Path) -> None:
    with files_up_to(300), pytest.raises(EpsdError, match=r"VOCdigits: cannot be written \(File too large\)\.$"):
        DigitScenes()(tmp_path, seed=0)
    given = contents(tmp_path)
    with files_up_to(300), pytest.raises(EpsdError, match=r"model: cannot be written \(File too large\)\.$"):
        models.write(tmp_path / "model", servable(), given)
    assert {path.name for path in tmp_path.iterdir()} == {"VOCdigits", "model_card.md", "model.json"}
