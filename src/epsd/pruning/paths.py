"""What a mask leaves that can do anything: weights on a path from input to output, live channels, how even they are.

*Effective sparsity* (Vysogorets & Kempe, JMLR 2023) counts a weight as removed that survives where nothing comes in or
nothing goes on. At the extreme it is the honest axis: a mask may keep every weight asked for and half of them in vain.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from epsd.compute.networks import hooked
from epsd.masks import Mask, erk_ranked
from epsd.pruning.scoring import Means, calling, scoring, within

LOST = 0.1
"""Share of the kept weights on no path from which on a warning is due."""

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_ADDED = ("bias", "embed", "token", "table")
"""What is in the names of parameters that are added to activations, and not multiplied with them."""


def on_path(model: nn.Module, mask: Mask, image_shape: tuple[int, ...]) -> Mask:
    """The kept weights that lie on a path from input to output of `model`, which is left as it is.

    One forward and backward pass of one image (1, *image_shape) in double precision: kept weights are positive, those
    of a filter add up to 1; nothing is added to an activation but other activations; normalisation layers only rescale.
    A weight lies on a path exactly where the derivative with respect to it is not 0.
    """
    values = _positive(model, mask)
    kept = [values[name].requires_grad_() for name in mask.keep]
    device = kept[0].device
    image = torch.linspace(0.5, 1.0, torch.Size(image_shape).numel(), dtype=torch.float64).view(1, *image_shape)
    buffers = {name: b.double() for name, b in model.named_buffers() if b.is_floating_point()}
    with within(Means()), scoring(model, train=False), hooked(_opening(model)):
        output = calling(model, {**buffers, **values})(image.to(device)).sum()
        flows = torch.autograd.grad(output, kept, materialize_grads=True)
    return Mask({name: (flow != 0).cpu() & keep for (name, keep), flow in zip(mask.keep.items(), flows, strict=True)})


def _positive(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Every parameter in float64, as `on_path` wants it. Frozen weights that are 0 are no path either."""
    layers = {id(m.weight): m for m in model.modules() if isinstance(m, _ConvNd | nn.Linear)}
    found = {}
    for name, parameter in model.named_parameters():
        if name in mask.keep or id(parameter) in layers:
            kept = mask.keep[name].to(parameter.device) if name in mask.keep else parameter.detach() != 0
            found[name] = kept.double() / kept.flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (kept.dim() - 1))
        else:
            multiplied = not any(word in name.rpartition(".")[2] for word in _ADDED)
            found[name] = torch.full_like(parameter.detach(), float(multiplied), dtype=torch.float64)
    return found


def _opening(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Normalisation layers divide by the largest activation, and shift nothing; pooling lets all of them through."""
    for module in model.modules():
        if isinstance(module, _NORMS) or type(module).__name__ == "FrozenBatchNorm2d":
            yield module, _rescaled
        elif isinstance(module, nn.modules.pooling._MaxPoolNd | nn.modules.pooling._AdaptiveMaxPoolNd):
            yield module, _pooled


def _rescaled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    largest = inputs[0].detach().abs().amax()
    return inputs[0] / torch.where(largest > 0, largest, 1.0)


def _pooled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The largest alone would pass, and of a padded window only what of a kernel meets it: instead the mean passes."""
    images, size = inputs[0], output.shape[2:]
    pool: Any = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(size)]
    pooled: Tensor = pool(images, size)  # every activation is in one window at least
    return pooled


class Layer(NamedTuple):
    """How a mask treats one layer.

    on_path : kept weights on a path.  channels : outputs.  live : those with a weight on a path.  gini : of the kept
    weights over the channels, 0 = all have as many, (channels − 1) / channels = one has all; None where none is kept.
    """

    kept: int
    total: int
    on_path: int
    channels: int
    live: int
    gini: float | None

    def figures(self, prefix: str) -> dict[str, Any]:
        """Density, and what of it is in effect, by name after `prefix`."""
        found = {"density": self.kept / self.total, **self._asdict()}
        return {f"{prefix}{name}": found[name] for name in ("density", "on_path", "channels", "live", "gini")}


def layers(mask: Mask, effective: Mask) -> dict[str, Layer]:
    """Every layer of `mask`; `effective`: its `on_path`."""
    found = {}
    for name, keep in mask.keep.items():
        flows = effective.keep[name].flatten(1)
        size = int(keep.sum()), keep.numel(), int(flows.sum())
        found[name] = Layer(*size, len(keep), int(flows.any(1).sum()), gini(keep.flatten(1).sum(1)))
    return found


def gini(counts: Tensor) -> float | None:
    """Gini coefficient of counts (n,): Σ_i Σ_j |x_i − x_j| / (2 n Σ x); None where all are 0."""
    ordered, size = counts.sort().values.double(), len(counts)
    total = float(ordered.sum())
    if not total:
        return None
    ranks = torch.arange(1, size + 1, dtype=torch.float64, device=counts.device)
    return float((2 * ranks - size - 1) @ ordered) / (size * total)


def chance(mask: Mask, seed: int) -> Mask:
    """A random mask of ERK densities that keeps as many weights."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: erk_ranked(keep.shape)[torch.randperm(keep.numel(), generator=generator)].view(keep.shape)
        for name, keep in mask.keep.items()
    }
    return Mask.from_scores(scores, mask.sparsity)


class Examined(NamedTuple):
    """Layers of a mask, and of a random one of ERK densities that keeps as many weights."""

    layers: dict[str, Layer]
    random: dict[str, Layer]

    def summary(self) -> dict[str, float]:
        """For the tracker: `effective_sparsity`, `on_path` (share of the kept weights), `live_channels` (share of all),
        `gini` (mean over layers that have a weight); and the same of the random mask, with `random_erk_` before it.
        """
        return _summary(self.layers) | {f"{_CHANCE}{name}": value for name, value in _summary(self.random).items()}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer, by column."""
        return [
            {"layer": name, "kept": own.kept, "total": own.total, **own.figures("")}
            | self.random[name].figures(_CHANCE)
            for name, own in self.layers.items()
        ]


_CHANCE = "random_erk_"


def _summary(found: dict[str, Layer]) -> dict[str, float]:
    kept, flowing, total, channels, live = (
        sum(int(getattr(layer, name)) for layer in found.values())
        for name in ("kept", "on_path", "total", "channels", "live")
    )
    uneven = [layer.gini for layer in found.values() if layer.gini is not None]
    return {
        "effective_sparsity": 1 - flowing / total,
        "on_path": flowing / kept,
        "live_channels": live / channels,
        "gini": sum(uneven) / len(uneven),
    }


def examined(
    model: nn.Module, mask: Mask, image_shape: tuple[int, ...], seed: int, random: dict[str, Layer] | None = None
) -> Examined:
    """`mask` beside a random one drawn from `seed`. `random`: that one's layers, where they are known."""
    if random is None:
        drawn = chance(mask, seed)
        random = layers(drawn, on_path(model, drawn, image_shape))
    return Examined(layers(mask, on_path(model, mask, image_shape)), random)


def warn_of_lost(found: Examined, warn: Callable[[str], None] = warnings.warn) -> None:
    """Where more than `LOST` of what is kept lies on no path."""
    figures = found.summary()
    if figures["on_path"] < 1 - LOST:
        warn(
            f"{1 - figures['on_path']:.1%} of the kept weights lie on no path from input to output (random weights of "
            f"ERK densities: {1 - figures[f'{_CHANCE}on_path']:.1%}): the sparsity in effect is "
            f"{figures['effective_sparsity']:.4f}. More prune.rounds, prune.scope: lamp or prune.channel_cap spread "
            "them."
        )
