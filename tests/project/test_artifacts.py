"""Files are written whole or not at all, models and tables come back as they were, and errors name the file."""

import math
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from epsd.files.digests import DamagedFile
from epsd.project import artifacts
from epsd.project.artifacts import ArtifactError
from epsd.training import checkpoints


def net(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width))


def test_a_model_comes_back_with_its_card(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "model.safetensors"
    artifacts.save_model(model, path, {"num_classes": 3})
    assert artifacts.read_json(tmp_path / "model.json") == {"num_classes": 3}
    other = artifacts.load_into(net(), path)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


def test_saving_changes_no_weight_but_drops_the_sign_of_zero(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0] = -0.0
    artifacts.save_model(model, tmp_path / "m.safetensors", {})
    saved = artifacts.load_state(tmp_path / "m.safetensors")["0.weight"]
    assert torch.equal(saved, model[0].weight)
    assert not torch.signbit(saved[0]).any()
    assert torch.signbit(model[0].weight[0]).all()


def test_wrong_missing_and_damaged_models_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(ArtifactError, match=r"m\.safetensors: missing"):
        artifacts.load_state(path)
    artifacts.save_model(net(), path, {})
    with pytest.raises(ArtifactError, match=r"m\.safetensors: does not fit"):
        artifacts.load_into(net(width=4), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedFile, match=r"m\.safetensors: cannot be read"):
        artifacts.load_state(path)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.write_json(path, {"new": math.nan})
    with pytest.raises(KeyError), artifacts.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert artifacts.read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        artifacts.write_json(tmp_path / "file" / "a.json", {})


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB with a small model and a checkpoint on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a full disk needs the right to mount a small file system")
    artifacts.save_model(net(), disk / "model.safetensors", {"size": "small"})
    checkpoints.save(disk / "last.safetensors", {"w": torch.zeros(3)}, "m")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_what_was_there_stays(full_disk: Path) -> None:
    before = {path.name: path.read_bytes() for path in full_disk.iterdir()}
    attempts: list[Callable[[], None]] = [
        lambda: artifacts.save_model(nn.Linear(500, 500), full_disk / "model.safetensors", {"size": "large"}),
        lambda: checkpoints.save(full_disk / "last.safetensors", {"w": torch.zeros(500, 500)}, "m"),
        lambda: artifacts.write_json(full_disk / "model.json", {"text": "x" * 400_000}),
    ]
    for attempt in attempts:
        with pytest.raises(ArtifactError, match=r"cannot be written \(No space left on device") as error:
            attempt()
        assert "\n" not in str(error.value)
        assert {path.name: path.read_bytes() for path in full_disk.iterdir()} == before


@pytest.mark.parametrize(("text", "words"), [("[1]", "carries no digest"), ("{", "cannot be read")])
def test_other_json_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DamagedFile, match=words):
        artifacts.read_json(tmp_path / "a.json")


def test_tables_of_numbers_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    artifacts.write_csv(path, ["epoch", "loss", "name"], [[1, 0.1 + 0.2, "a"], [2, "", "b"]])
    assert artifacts.read_csv(path) == {"epoch": [1.0, 2.0], "loss": [0.1 + 0.2, None]}
    with pytest.raises(ArtifactError, match="missing"):
        artifacts.read_csv(tmp_path / "none.csv")


def test_names_that_are_no_text_are_written_as_they_are(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    artifacts.write_csv(tmp_path / "t.csv", ["class", name], [[name, 1.5]])
    assert (tmp_path / "t.csv").read_bytes() == b"class,caf\xe9\ncaf\xe9,1.5\n"
    artifacts.write_text(tmp_path / "t.md", f"Read from /{name}.")
    assert (tmp_path / "t.md").read_bytes() == b"Read from /caf\xe9."
    artifacts.write_json(tmp_path / "t.json", {name: name})
    assert artifacts.read_json(tmp_path / "t.json") == {name: name}
