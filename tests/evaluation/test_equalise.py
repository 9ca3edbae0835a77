"""Equalised channels: the network says the same in fp32, whatever it is made of, and loses less in int8."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from epsd.architectures import ARCHITECTURES
from epsd.evaluation import deploy
from epsd.evaluation.equalise import equalise_, groups
from epsd.files.onnx_file import CARD, OnnxFile, save, words_of
from epsd.registry import choose


class Branches(nn.Module):
    """A sum after grouped and depthwise layers, none of them normalised."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 8, 3, padding=1), activation()
        self.grouped, self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.last, self.fc = nn.Conv2d(8, 12, 1), nn.Linear(12, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(images))
        x = self.act(x + self.grouped(x))
        x = nn.functional.max_pool2d(self.act(self.depthwise(x)), 2)
        logits: torch.Tensor = self.fc(self.act(self.last(x)).mean((2, 3)))
        return logits


class Beside(nn.Module):
    """One layer is used twice, another's channels are strung together, those of a third are broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.last = nn.Conv2d(8, 1, 1), nn.Conv2d(16, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.first(images).relu()).relu()).relu()
        strung = torch.cat([x, (x + self.one(x)).relu()], 1)
        logits: torch.Tensor = self.last(strung).flatten(2).amax(2)
        return logits


def resnet(**settings: object) -> nn.Module:
    """With statistics of its own."""
    net = choose(ARCHITECTURES, {"name": "resnet", "depth": 8, **settings}, "architecture")(3, (3, 16, 16))
    net(torch.randn(32, 3, 16, 16))
    return net


def uneven(net: nn.Module) -> nn.Module:
    """Channels of very different size, as a BatchNorm folded into a layer leaves them."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                scales = torch.logspace(-2, 1, module.out_channels)
                module.weight *= scales.view(-1, 1, 1, 1)
                if module.bias is not None:
                    module.bias *= scales
    return net


def exported(net: nn.Module, folder: Path) -> Path:
    deploy.export(net.eval(), torch.randn(2, 3, 16, 16), ("batch",), folder / "net.onnx", {CARD: "{}"})
    return folder / "net.onnx"


IMAGES = np.random.default_rng(0).standard_normal((48, 3, 16, 16), dtype=np.float32)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (resnet, 6),  # three streams, and inside three blocks
        (lambda: resnet(shortcut="padding"), 3),  # inside blocks: the streams are padded
        (Branches, 3),
        (lambda: Branches(nn.ReLU6), 0),
        (lambda: Branches(nn.SiLU), 0),
        (Beside, 0),
    ],
    ids=["resnet", "padding", "branches", "relu6", "silu", "beside"],
)
def test_the_network_says_the_same(make: Callable[[], nn.Module], found: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = exported(uneven(make()), tmp_path)
    model = onnx.load(path)
    before = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    words = words_of(model)
    assert len(equalise_(model, IMAGES[:32], 16)) == found == len(groups(model.graph))
    changed = [t for t in model.graph.initializer if not np.array_equal(before[t.name], onnx.numpy_helper.to_array(t))]
    assert bool(changed) == bool(found)
    save(model, tmp_path / "same.onnx", words)
    said, says = (OnnxFile(tmp_path / name)(IMAGES) for name in ("net.onnx", "same.onnx"))
    assert np.abs(says - said).max() <= 1e-5 * np.abs(said).max()


def shuffled(path: Path, seed: int) -> Path:
    """The same network with the weights of each output in another order: as uneven as before."""
    model, drawn = onnx.load(path), np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim > 1:
            mixed = drawn.permuted(values.reshape(len(values), -1), axis=1).reshape(values.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(mixed, tensor.name))
    save(model, path.with_name(f"{seed}.onnx"), words_of(model))
    return path.with_name(f"{seed}.onnx")


@pytest.mark.parametrize("make", [resnet, Branches])
def test_int8_loses_less(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """In the mean over networks: one alone may lose more, with seven bits (no VNNI) as with eight."""
    torch.manual_seed(0)
    path, ratios = exported(uneven(make()), tmp_path), []
    for seed in range(6):
        mixed, lost = shuffled(path, seed), {}
        exact = OnnxFile(mixed)(IMAGES)
        for bits in (8, None):  # as training rounded them: as they are; None: equalised
            deploy.quantise(mixed, tmp_path / "int8.onnx", IMAGES, bits)
            lost[bits] = np.abs(OnnxFile(tmp_path / "int8.onnx")(IMAGES) - exact).mean()
        ratios.append(lost[None] / lost[8])
    assert np.exp(np.log(ratios).mean()) < 0.9, ratios
