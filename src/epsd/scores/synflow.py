"""SynFlow: synaptic flow, without data (Tanaka et al., NeurIPS 2020; official code ganguli-lab/Synaptic-Flow)."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from epsd.compute.second_order import laid_out, weights_laid_out
from epsd.masks import prunable
from epsd.pruning.scoring import Means, calling, draw, scoring, within
from epsd.registry import variant
from epsd.types import Batch, Objective, Scores

_SAFE = 1e-25, 1e30
"""Where the largest activation, gradient and score of every layer must lie for single precision: what is up to 10¹³
times smaller than the layer's largest is then still a normal number. A layer without any flow has none to lose."""
_SAFE_WEIGHTS = 1e-10, 1e10
"""Where the largest weight of a layer must lie, so that no single layer leads from the range above to 0 or ∞."""


@variant
class SynFlow:
    """| |w| ⊙ ∂R/∂|w| |, R the summed output of the net with every tensor of its state replaced by its absolute value,
    for one image of ones.

    Use `prune.rounds: 100`, as the paper does (the official command line defaults to 1). In eval mode, so BatchNorm
    stays at its initial statistics. A layer that subtracts (GroupNorm, LayerNorm, attention) makes half of the
    derivatives negative, for which the official code takes the outer absolute value; without one all are positive.

    Computed in the precision of the weights while nothing cancels and the flow through every layer keeps well inside
    its range, else again in double precision: single precision over- or underflows in deep nets (official issue).
    """

    follows_objective: ClassVar[bool] = False
    follows_data: ClassVar[bool] = False

    def __call__(self, model: nn.Module, batches: Iterable[Batch], objective: Objective) -> Scores:
        """Draws one batch, for the shape of an image alone, where none has been drawn before."""
        names = list(prunable(model))
        if not names:
            return {}
        device = next(model.parameters()).device
        seen: Tensor | None = getattr(batches, "images", None)  # an endless source remembers the last ones
        image = draw(batches, 1, "score synflow", device)[0].images[:1] if seen is None else seen[:1].to(device)
        with within(Means()), scoring(model, train=False):
            dtype = model.get_parameter(names[0]).dtype
            safe = dtype != torch.float64 and device.type != "mps"  # which has no double precision
            scores = _scores(model, names, torch.ones_like(image, dtype=dtype), safe)
            return scores or _scores(model, names, torch.ones_like(image, dtype=torch.float64), safe=False) or {}


def _scores(model: nn.Module, names: list[str], image: Tensor, safe: bool) -> Scores | None:
    """In the precision of `image`; None where that is not enough and `safe` asks for more."""
    weights = {n: w.abs().requires_grad_() for n, w in weights_laid_out(model, image.dtype).items()}
    floating = {n: b.to(image.dtype) for n, b in model.named_buffers() if b.is_floating_point()}
    state = model.state_dict()  # what is not in there, a mask of −∞ say, stays as it is, as in the official code
    buffers = {n: b.abs() if n in state else b for n, b in floating.items()}
    with _Range() as flow:
        total = calling(model, {**weights, **buffers})(laid_out(image, model)).sum()
    gradients = torch.autograd.grad(total, [weights[name] for name in names], materialize_grads=True)
    scores = {name: weights[name].detach() * g.abs() for name, g in zip(names, gradients, strict=True)}
    if not safe:
        return scores
    cancelling = torch.stack([g.amin() for g in gradients]).amin() < 0  # up to 10⁻⁴ of a score with many norms
    flowing = flow.holds(list(scores.values())) and _within(list(weights.values()), _SAFE_WEIGHTS)
    return scores if flowing and not cancelling else None


def _within(tensors: list[Tensor], ends: tuple[float, float]) -> bool:
    """Whether the largest of each tensor lies between `ends`, or is 0."""
    largest = torch.stack([tensor.detach().abs().amax() for tensor in tensors])
    return bool(((largest == 0) | ((largest > ends[0]) & (largest < ends[1]))).all())


class _Range(TorchFunctionMode):
    """Notes the largest activation of every operation, and the largest gradient that comes back to it."""

    def __init__(self) -> None:
        super().__init__()
        self._largest: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.requires_grad:
            self._note(result.detach())
            result.register_hook(self._note)  # type: ignore[no-untyped-call]
        return result

    def _note(self, tensor: Tensor) -> None:
        self._largest.append(tensor.abs().amax())

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether all that was noted, and the largest of each of `tensors`, lies where nothing is lost."""
        return _within([*self._largest, *tensors], _SAFE)
