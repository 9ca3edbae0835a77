"""Checkpoints: what goes in comes out, damaged and foreign ones are refused."""

from pathlib import Path

import pytest
import torch

from epsd.training.checkpoints import CheckpointError, fingerprint, load, save
from epsd.types import EpsdError


def test_any_nest_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    state = {"a": {1: shared, "b": [shared, 2, None, "text", True]}, "empty": {}, "half": torch.ones(2).half()}
    save(tmp_path / "c.safetensors", state, "mark")
    loaded = load(tmp_path / "c.safetensors", "mark")
    assert loaded is not None
    assert list(loaded["a"]) == [1, "b"]
    assert torch.equal(loaded["a"][1], shared)
    assert loaded["a"]["b"][1:] == [2, None, "text", True]
    assert loaded["empty"] == {}
    assert loaded["half"].dtype == torch.float16


def test_absent_is_none_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    assert load(path, "mark") is None
    save(path, {"w": torch.randn(500)}, "mark")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"c\.safetensors: cannot be read .*Delete it to start again"):
        load(path, "mark")


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    weights = {
        "half": torch.randn(7).bfloat16(),
        "whole": torch.randn(3, 5),
        "yes": torch.tensor(True),
        "no": torch.ones(0),
    }
    save(path, {"weights": weights, "epoch": 12, "rate": 0.125}, "mark")
    content = path.read_bytes()
    assert load(path, "mark") is not None
    length = 8 + int.from_bytes(content[:8], "little")
    places = [*range(length, len(content)), content.index(b"12"), content.index(b"0.125"), content.index(b"[3,5]") + 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"c\.safetensors: .* Delete it to start again") as error:
            load(path, "mark")
        assert "\n" not in str(error.value)


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "c.safetensors", {"w": torch.zeros(1)}, "mine")
    with pytest.raises(CheckpointError, match="other parameters, data or code"):
        load(tmp_path / "c.safetensors", "yours")


def test_an_optimiser_goes_through_it(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    save(tmp_path / "c.safetensors", {"optimiser": optimiser.state_dict()}, "m")
    other = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    other.load_state_dict(load(tmp_path / "c.safetensors", "m")["optimiser"])
    assert other.param_groups[0]["lr"] == 0.1
    assert torch.equal(other.state[layer.weight]["momentum_buffer"], layer.weight.grad)


def test_fingerprints_follow_values_and_files(tmp_path: Path) -> None:
    file = tmp_path / "mask"
    file.write_bytes(b"one")
    first = fingerprint({"lr": 0.1}, [file])
    assert fingerprint({"lr": 0.1}, [file]) == first
    assert fingerprint({"lr": 0.2}, [file]) != first
    file.write_bytes(b"two")
    assert fingerprint({"lr": 0.1}, [file]) != first
    with pytest.raises(EpsdError, match="absent"):
        fingerprint({}, [tmp_path / "absent"])
