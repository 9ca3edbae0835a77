"""The small, fully specified problems of the oracle files: nets, batches, cases."""

import functools
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conftest import SHARED
from epsd.masks import Mask
from epsd.types import Batch

FOLDER = SHARED / "oracles"
PRESENT = (FOLDER / "index.json").exists()
REASON = "needs the project's shared oracles (set EPSD_SHARED to the folder that holds oracles/)"


@functools.cache
def index() -> dict[str, Any]:
    """The index, or one without cases where the files are absent."""
    return json.loads((FOLDER / "index.json").read_text()) if PRESENT else {"cases": [], "layout": {}}


@functools.cache
def arrays(file: str) -> dict[str, np.ndarray]:
    """Every array of a file, by key."""
    with np.load(FOLDER / file) as content:
        return {key: content[key] for key in content.files}


def cases(*kinds: str) -> list[dict[str, Any]]:
    """The cases of these kinds."""
    return [case for case in index()["cases"] if case["kind"] in kinds]


def array(case: dict[str, Any], name: str) -> Tensor:
    """One reference array of a case."""
    return torch.from_numpy(arrays(case["file"])[f"{case['id']}/{name}"])


class Cnn(nn.Module):
    """Two convolutions, optional BatchNorm, mean pooling, one linear layer."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.fc = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(images)))
        return self.fc(torch.relu(self.bn2(self.conv2(hidden))).mean((2, 3)))


class Mlp(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(48, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(images.flatten(1))))))


class LayerNorms(nn.Module):
    """Patches of 2x2, one residual block behind a LayerNorm, mean over positions, LayerNorm, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 2, stride=2)
        self.ln1, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.ln2, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv1(images).flatten(2).transpose(1, 2)
        tokens = tokens + self.fc2(nn.functional.gelu(self.fc1(self.ln1(tokens))))
        return self.fc(self.ln2(tokens.mean(1)))


class GroupNorms(Cnn):
    """`Cnn` with GroupNorm."""

    def __init__(self) -> None:
        super().__init__(False)
        self.gn1, self.gn2 = nn.GroupNorm(4, 8), nn.GroupNorm(4, 16)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.gn1(self.conv1(images)))
        return self.fc(torch.relu(self.gn2(self.conv2(hidden))).mean((2, 3)))


def norm_cases() -> list[dict[str, Any]]:
    """SynFlow with norms that subtract: one case per net, [] where the files are absent."""
    file = FOLDER / "synflow_norms.json"
    return json.loads(file.read_text())["cases"] if file.exists() else []


def norm_arrays(name: str) -> dict[str, Tensor]:
    """Every array of one of those nets, its state by `state/<name>`."""
    start, content = f"{name}/", arrays("synflow_norms.npz")
    return {key.removeprefix(start): torch.from_numpy(a) for key, a in content.items() if key.startswith(start)}


def norm_net(name: str) -> nn.Module:
    """One of those nets in its initial state, in eval mode."""
    model = {"gn": GroupNorms, "ln": LayerNorms}[name]().double().eval()
    given = norm_arrays(name)
    model.load_state_dict({key.removeprefix("state/"): a for key, a in given.items() if key.startswith("state/")})
    return model


def net(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A net of the oracles in its initial state."""
    model = {"cnn": lambda: Cnn(False), "cnn_bn": lambda: Cnn(True), "mlp": Mlp}[name]().to(dtype)
    start = f"{name}/state/"
    state = {key.removeprefix(start): value for key, value in arrays("nets.npz").items() if key.startswith(start)}
    model.load_state_dict({key: torch.from_numpy(np.asarray(value)) for key, value in state.items()})
    return model


def data(name: str, what: str) -> Tensor:
    """`x`, `y`, `x_view1`, `past`, ... of a net, batch axis first."""
    return torch.from_numpy(arrays("nets.npz")[f"{name}/{what}"])


def batch(name: str, number: int, partner: str = "none", dtype: torch.dtype = torch.float64) -> Batch:
    """Batch `number`, whole, or as anchors with the partners that the oracle defines."""
    x, y = data(name, "x")[number].to(dtype), data(name, "y")[number]
    indices = torch.arange(len(y)) + number * len(y)
    half = len(y) // 2
    if partner == "same_class":
        return Batch(x[:half], y[:half], indices[:half], x[half:])
    return Batch(x, y, indices, data(name, "x_view1")[number].to(dtype) if partner == "view" else None)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """The oracles' flat vector."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def unflat(vector: Tensor, name: str) -> dict[str, Tensor]:
    """A flat vector by parameter name."""
    layers = index()["layout"][name]["layers"]
    return {
        layer["name"]: vector[layer["offset"] : layer["offset"] + layer["numel"]].view(layer["shape"])
        for layer in layers
    }


def assert_close(ours: Tensor, reference: Tensor, tolerance: float = 1e-9) -> None:
    """Within `tolerance` of the reference array's maximum: the oracles' own measure."""
    scale = reference.abs().max().clamp_min(1e-300)
    worst = (ours.to(reference.dtype) - reference).abs().max()
    assert worst <= tolerance * scale, f"off by {worst / scale:.3g} of the maximum"


def kept_like(scores: dict[str, Tensor], kept: int, reference: Tensor) -> None:
    """The highest `kept` by our selection rule are exactly the reference's set (uint8, 1 = keep)."""
    total = sum(score.numel() for score in scores.values())
    mask = Mask.from_scores(scores, 1 - kept / total)
    assert mask.kept == kept
    assert torch.equal(flat(mask.keep), reference.bool())


def kept_as_ranking(scores: dict[str, Tensor], sparsity: float, reference: Tensor) -> None:
    """Where the official rule keeps one weight more or fewer: ours, exact in number, is nested with that set."""
    mask = Mask.from_scores(scores, sparsity)
    assert mask.kept == mask.total - round(sparsity * mask.total)
    ours, theirs = flat(mask.keep), reference.bool()
    assert abs(int(ours.sum()) - int(theirs.sum())) <= 2
    smaller, larger = (ours, theirs) if ours.sum() <= theirs.sum() else (theirs, ours)
    assert not (smaller & ~larger).any()
