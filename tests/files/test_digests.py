"""Tensors and JSON come back as they were, in the same bytes each time; what is not what was written is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from epsd.files import digests
from epsd.files.digests import DamagedFile

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "one": torch.tensor(3),
    "none": torch.zeros(0, 4),
}
ABOUT = {"order": list(TENSORS), "text": 'quoted "name" é\n', "number": 0.1, "nothing": None}


def test_tensors_and_what_is_said_of_them_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digests.save_tensors(path, "weights", TENSORS, ABOUT)
    tensors, about = digests.load_tensors(path, "weights")
    assert about == ABOUT
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype for name, tensor in TENSORS.items()
    )
    assert digests.kind_of(path) == "weights"
    with pytest.raises(DamagedFile, match=r"a\.safetensors: holds weights, not mask"):
        digests.load_tensors(path, "mask")


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """Of several keys safetensors would write the order of a hash map, another one each time."""
    found = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        digests.save_tensors(path, "weights", dict(reversed(TENSORS.items())) if number % 2 else TENSORS, ABOUT)
        found.add(path.read_bytes())
    assert len(found) == 1


def test_every_flipped_bit_of_a_tensor_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digests.save_tensors(path, "weights", TENSORS, ABOUT)
    sound = path.read_bytes()
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            tensors, about = digests.load_tensors(path, "weights")
        except DamagedFile as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # of the space that fills up the header
            assert about == ABOUT and all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
            assert sound[place : place + 1].isspace()


@pytest.mark.parametrize(
    "metadata", [None, {}, {"epsd": "{}"}, {"epsd": "no json"}, {"epsd": '{"kind": 3}'}, {"x": "y"}]
)
def test_a_file_of_somebody_else_is_none_of_ours(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata)
    with pytest.raises(DamagedFile, match=r"a\.safetensors: (carries no digest|cannot be read)"):
        digests.load_tensors(path, "weights")
    assert digests.kind_of(path) in (None, 3)


@pytest.mark.parametrize("content", [{"b": [1, 2.5, None, "é\udce9"], "a": {"x": True}}, {}, {"a": {}}])
def test_json_carries_its_digest(content: dict[str, Any], tmp_path: Path) -> None:
    text = digests.sealed(content)
    assert json.loads(text) == {**content, "checksum": ["crc32", text[-13:-5]]}
    assert digests.unsealed(text.encode(), tmp_path) == content
    for place in range(len(text.encode())):
        damaged = bytearray(text.encode())
        damaged[place] ^= 1 << place % 8
        with pytest.raises(DamagedFile, match=f"{tmp_path.name}: (damaged or edited|carries no digest|cannot be read)"):
            digests.unsealed(bytes(damaged), tmp_path)
    for other in ("[1]", "{", "3", "", '{"a": 1}', text[:-1], text + " ", "[" * 100_000):
        with pytest.raises(DamagedFile, match=f"{tmp_path.name}: (carries no digest|cannot be read)"):
            digests.unsealed(other.encode(), tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        digests.sealed({"a": float("nan")})


def test_any_file_has_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"x" * 3_000_000)
    wanted = digests.digest_of(path)
    assert wanted == digests.digest([b"x" * 1_000_000, b"x" * 2_000_000])
    digests.check(path, wanted)
    path.write_bytes(b"x" * 2_999_999)
    with pytest.raises(DamagedFile, match=r"a\.csv: damaged or replaced"):
        digests.check(path, wanted)
    with pytest.raises(DamagedFile, match=r"b\.csv: cannot be read \(No such file"):
        digests.check(tmp_path / "b.csv", wanted)
