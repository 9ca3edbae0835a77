"""The compact file gives back the very same bits, is smaller where it should be, and damage is found."""

import pytest
import torch
from torch import Tensor

from epsd.architectures.resnet import ResNet
from epsd.evaluation import compact_file
from epsd.files import digests
from epsd.files.digests import DamagedFile
from epsd.project import artifacts


def thinned(tensor: Tensor, density: float, seed: int = 0) -> Tensor:
    keep = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < density
    return torch.where(keep, tensor, torch.zeros_like(tensor))


def same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return (
        first.numpy().tobytes() == second.numpy().tobytes()
        if first.dtype != torch.bfloat16
        else bool((first.view(torch.int16) == second.view(torch.int16)).all())
    )


@pytest.fixture
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    net = ResNet(depth=20)(10, (3, 32, 32))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(thinned(parameter, 0.02 if "layer3" in name else 0.3))
    return net


def test_a_network_comes_back_bit_for_bit(net, tmp_path) -> None:
    state = net.state_dict()
    sizes = compact_file.save(state, tmp_path / "m.safetensors", {"num_classes": 10})
    back, card = compact_file.load(tmp_path / "m.safetensors")
    assert card == {"num_classes": 10}
    assert list(back) == list(state)
    assert all(same_bits(back[name], state[name]) for name in state)
    fresh = ResNet(depth=20)(10, (3, 32, 32))
    fresh.load_state_dict(back)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh.eval()(image), net.eval()(image))
    assert sizes.file == (tmp_path / "m.safetensors").stat().st_size
    assert sizes.dense == sum(t.numel() * t.element_size() for t in state.values())


def test_ways_follow_the_density(net, tmp_path) -> None:
    compact_file.save(net.state_dict(), tmp_path / "m.safetensors")
    _, about = digests.load_tensors(tmp_path / "m.safetensors", compact_file.KIND)
    ways = {name: entry["way"] for name, entry in about["tensors"].items()}
    assert ways["layer3.1.conv1.weight"] == "gaps"
    assert ways["layer2.1.conv1.weight"] == "bitmap"
    assert ways["bn1.weight"] == "dense"
    assert ways["bn1.num_batches_tracked"] == "dense"


def test_size_at_two_percent_is_near_the_bound(tmp_path) -> None:
    weight = thinned(torch.randn(512, 512, 3, 3), 0.02)
    kept = int(weight.count_nonzero())
    sizes = compact_file.save({"w": weight}, tmp_path / "w.safetensors")
    assert sizes.file < 5.1 * kept + 1000  # four bytes of value, one of place, few skips
    assert sizes.ratio > 9


@pytest.mark.parametrize("density", [0.0, 0.0005, 0.02, 0.11, 0.13, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_density_and_type(density: float, dtype: torch.dtype, tmp_path) -> None:
    weight = thinned(torch.randn(37, 101), density).to(dtype)
    compact_file.save({"w": weight}, tmp_path / "w.safetensors")
    assert same_bits(compact_file.load(tmp_path / "w.safetensors")[0]["w"], weight)


@pytest.mark.parametrize("positions", [[0], [254], [255], [256], [0, 255, 511], [509, 510, 511, 4095], [4095], []])
def test_gaps_around_the_skip_code(positions: list[int]) -> None:
    keep = torch.zeros(4096, dtype=torch.bool)
    keep[positions] = True
    assert torch.equal(compact_file._from_gaps(compact_file._to_gaps(keep), 4096), keep)


def test_odd_tensors(tmp_path) -> None:
    negative_zero = torch.zeros(1000)
    negative_zero[10], negative_zero[11] = -0.0, float("nan")
    state = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "integers": torch.zeros(100, dtype=torch.int64),
        "negative_zero": negative_zero,
        "transposed": thinned(torch.randn(60, 40), 0.05).t(),
        "flags": torch.tensor([True, False]),
    }
    compact_file.save(state, tmp_path / "m.safetensors")
    back, _ = compact_file.load(tmp_path / "m.safetensors")
    assert all(same_bits(back[name], tensor.contiguous()) for name, tensor in state.items())


def test_a_compact_file_is_told_from_others(net, tmp_path) -> None:
    compact_file.save(net.state_dict(), tmp_path / "compact.safetensors")
    artifacts.save_model(net, tmp_path / "dense.safetensors", {})
    (tmp_path / "text.safetensors").write_text("text")
    found = {path.stem: compact_file.is_compact(path) for path in tmp_path.glob("*.safetensors")}
    assert found == {"compact": True, "dense": False, "text": False}


@pytest.mark.parametrize("entry", [7, {"way": "gaps", "shape": None}, {"way": "dense"}, {"shape": [2**62]}, []])
def test_a_crafted_index_is_refused(entry: object, tmp_path) -> None:
    about = {"tensors": {"w": entry}, "card": {}}
    parts = {"w:codes": torch.zeros(3, dtype=torch.uint8), "w:values": torch.ones(2)}
    digests.save_tensors(tmp_path / "w.safetensors", compact_file.KIND, parts, about)
    with pytest.raises(DamagedFile, match=r"w\.safetensors"):
        compact_file.load(tmp_path / "w.safetensors")


def test_missing_truncated_and_foreign_files_are_named(net, tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(DamagedFile, match=r"m\.safetensors"):
        compact_file.load(path)
    compact_file.save(net.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedFile, match=r"m\.safetensors"):
        compact_file.load(path)
    artifacts.save_model(net, path, {})
    with pytest.raises(DamagedFile, match="holds weights, not compact model"):
        compact_file.load(path)


@pytest.mark.parametrize(
    ("way", "codes"),
    [("gaps", [255] * 9 + [0, 1]), ("gaps", [3]), ("bitmap", [255, 255, 0, 0]), ("bitmap", [1]), ("nonsense", [1])],
)
def test_places_that_do_not_fit_are_refused(way: str, codes: list[int], tmp_path) -> None:
    about = {"tensors": {"w": {"way": way, "shape": [30]}}, "card": {}}
    parts = {"w:codes": torch.tensor(codes, dtype=torch.uint8), "w:values": torch.ones(2)}
    digests.save_tensors(tmp_path / "w.safetensors", compact_file.KIND, parts, about)
    with pytest.raises(DamagedFile, match=r"w\.safetensors"):
        compact_file.load(tmp_path / "w.safetensors")
