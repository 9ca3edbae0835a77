"""The loss on a two-dimensional slice through weight space around a trained network (Li et al., NeurIPS 2018)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from epsd.compute.networks import in_mode
from epsd.compute.seeds import mix
from epsd.masks import Mask
from epsd.pruning.scoring import calling

REACH = 1.0
"""The slice is [−REACH, REACH]²: 1 is a step as long, filter by filter, as the weights themselves."""
NEAR = 0.5
"""Distance from the centre within which `rise` averages."""


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, except that batch normalisation takes the statistics of the batch at hand.

    Running statistics belong to the centre alone: away from it they would normalise activations of other weights, and
    the slice would show that mismatch. With the batch's own they follow the weights, as in training.
    """
    with in_mode(model):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.training = True
        yield


def direction(model: nn.Module, mask: Mask, seed: int) -> dict[str, Tensor]:
    """A random direction over the prunable weights, masked and filter-normalised.

    Normal random numbers that follow from `seed` and the parameter's name, so that two networks of one architecture get
    the same draw; zero where the weight was removed, so that the slice stays among networks of that mask; then each
    filter (output channel, row of a Linear) scaled to the norm of the network's own filter. Biases and normalisation
    parameters stand still, as in the authors' code.
    """
    weights = dict(model.named_parameters())
    found = {}
    for name, keep in mask.keep.items():
        weight = weights[name].detach()
        generator = torch.Generator().manual_seed(mix(seed, "direction", name))
        draw = torch.randn(weight.shape, generator=generator).to(weight) * keep.to(weight.device)
        norms = draw.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1)
        scale = torch.where(norms[0] > 0, norms[1] / norms[0].clamp(min=1e-12), 0.0)
        found[name] = draw * scale.view(-1, *[1] * (weight.dim() - 1))
    return found


def surface(model: nn.Module, mask: Mask, images: Tensor, labels: Tensor, *, points: int, seed: int) -> Tensor:
    """(points, points) float64: mean cross entropy in nats over `images` (B, C, H, W), one batch, on the slice.

    Row i, column j lie at (coordinates(points)[j], coordinates(points)[i]) along the two directions of `seed`; the
    centre is the network as it is. See `batch_statistics` for batch normalisation; the network is left as it is.
    """
    across, down = (direction(model, mask, mix(seed, axis)) for axis in ("x", "y"))
    weights = dict(model.named_parameters())
    places = coordinates(points)

    def loss(x: float, y: float) -> float:
        moved = {name: weights[name] + x * across[name] + y * down[name] for name in across}
        return float(F.cross_entropy(calling(model, moved)(images).double(), labels))

    with torch.no_grad(), batch_statistics(model):
        return torch.tensor([[loss(x, y) for x in places] for y in places], dtype=torch.float64)


def coordinates(points: int) -> list[float]:
    """Where the slice is evaluated along each direction; `points` is odd, so that the centre is among them."""
    return torch.linspace(-REACH, REACH, points, dtype=torch.float64).tolist()


def rise(values: Tensor) -> float:
    """Mean loss at distance up to NEAR of the centre, less the loss at the centre: nats; small = flat."""
    places = torch.tensor(coordinates(len(values)), dtype=torch.float64)
    distance = (places[:, None] ** 2 + places[None, :] ** 2).sqrt()
    centre = len(values) // 2
    around = values[(distance <= NEAR) & (distance > 0)]
    return float(around.mean() - values[centre, centre]) if len(around) else 0.0
