"""What scores need of a network: its mode, its evaluation with other weights, what they may use, batches to draw."""

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from epsd.compute import networks
from epsd.compute.devices import to_device
from epsd.compute.joint_layers import together
from epsd.compute.random_state import keeping_random_state
from epsd.compute.second_order import TwiceDifferentiable
from epsd.losses import PlainLoss, logits_of, supervised
from epsd.types import Batch, EpsdError, Forward, Loss, Objective, Scores

LossFunction = Callable[[Forward, Batch], Loss]
"""A loss that may carry state from call to call; `copy.copy` of it is a snapshot."""

Vector = dict[str, Tensor]


class MetaGradientError(EpsdError):
    """The loss or the model cannot be differentiated as asked."""


class Following:
    """An objective as a loss function: its state goes from step to step, and a copy is a snapshot of it."""

    def __init__(self, objective: Objective) -> None:
        self.objective = copy.copy(objective)

    def __call__(self, forward: Forward, batch: Batch) -> Loss:
        """One evaluation; the state moves on."""
        return self.objective.loss(forward, batch, 1.0)

    def __copy__(self) -> "Following":
        return Following(self.objective)


def of_labels(objective: Objective) -> LossFunction:
    """What SNIP, GraSP and ProsPr differentiate: cross entropy, whatever distils; a user's own plain loss itself."""
    return Following(objective) if isinstance(objective, PlainLoss) else supervised


@dataclass(frozen=True)
class Means:
    """What scores may use. memory : bytes, None = most of what the device has free when a score begins.
    precision : the autocast type, None = that of the weights.  signed : the saliency itself is wanted, to be averaged.
    """

    memory: float | None = None
    precision: torch.dtype | None = None
    signed: bool = False


_WITHIN: ContextVar[Means | None] = ContextVar("means", default=None)


def means() -> Means:
    """What the score that runs now may use."""
    return _WITHIN.get() or Means()


@contextmanager
def within(allowed: Means) -> Iterator[None]:
    """Scores computed in the block keep to `allowed`."""
    token = _WITHIN.set(allowed)
    try:
        yield
    finally:
        _WITHIN.reset(token)


@contextmanager
def scoring(model: nn.Module, train: bool = True) -> Iterator[None]:
    """Put `model` in train or eval mode for a score; restore every module's mode and the random states afterwards.

    In train mode what is frozen in eval mode stays so (`networks.resting`).
    Meanwhile gradients are on, layers run in a form that is cheap to differentiate twice (`epsd.compute.second_order`),
    attention in its plain one, and what is compiled as it was written: compiled code has no second derivative.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with (
        networks.in_mode(model, train=train),
        torch.inference_mode(False),
        torch.enable_grad(),
        _uncompiled(),
        keeping_random_state(device),
        networks.plain_attention(),
        TwiceDifferentiable(),
    ):
        yield


def _uncompiled() -> AbstractContextManager[Any]:
    """Nothing where the compiler was never loaded: no module can be compiled then, and loading it takes a second."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


_HOOKED = (
    "this network sets hooks on what it saves for the backward pass (activation checkpointing, save_on_cpu), which "
    "scores that evaluate it with other weights cannot follow. Switch that off while pruning, as by "
    "model.set_grad_checkpointing(False)."
)


def calling(model: nn.Module, weights: Vector, counted: bool = False) -> Forward:
    """`model` called with `weights` (or buffers) in place of its own; other buffers are copied, never changed.

    In the precision of `Means`; images are taken in that of the weights, and logits given in the wider one of the two,
    so that losses are exact. `counted`: what is saved for the backward pass is being counted (`memory.Saved`), by such
    hooks as are refused otherwise.

    When called, MetaGradientError: the network checkpoints activations. EpsdError: it gives no logits.
    """
    lower = means().precision
    own = next(iter(weights.values()), next(model.parameters())).dtype

    def forward(images: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with together(), torch.autocast(images.device.type, dtype=lower, enabled=lower is not None):
            logits = _called(model, {**buffers, **weights}, images.to(own), counted)
        return logits.to(torch.promote_types(images.dtype, own))

    return forward


def _called(model: nn.Module, weights: Vector, images: Tensor, counted: bool) -> Tensor:
    try:
        with nullcontext() if counted else torch.autograd.graph.disable_saved_tensors_hooks(_HOOKED):
            logits = functional_call(model, weights, (images,))
    except RuntimeError as error:
        if _HOOKED not in str(error):
            raise
        raise MetaGradientError(_HOOKED) from None
    except ValueError as error:
        if not networks.is_lonely(error):
            raise
        raise MetaGradientError(f"a scoring batch cannot be used, {networks.LONELY}: use drop_last=True.") from None
    return logits_of(logits)


def wide(tensor: Tensor) -> Tensor:
    """At least single precision: a saliency is a product of small numbers, which half precision would round to 0."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def draw(batches: Iterable[Batch], count: int, who: str, device: torch.device) -> list[Batch]:
    """The first `count` batches, on `device`. MetaGradientError says how many are needed when there are fewer."""
    drawn = [to_device(batch, device) for batch in itertools.islice(batches, count)]
    if not drawn:
        raise MetaGradientError(f"{who} needs {count} batches, the data gave none.")
    if len(drawn) < count:
        raise MetaGradientError(
            f"{who} needs {count} batches, the data gave {len(drawn)}. Use a smaller prune.batch_size, fewer "
            "steps, or restart=True (begin the data again when they are used up)."
        )
    return drawn


def normalised(saliency: Vector) -> Scores:
    """|saliency| / Σ |saliency| over all weights, the sum in float64. Changes no ranking.

    The saliency as it is where `Means.signed` says that it will be averaged first.
    """
    if means().signed:
        return {name: tensor.detach() for name, tensor in saliency.items()}
    scores = {name: tensor.detach().abs() for name, tensor in saliency.items()}
    total = sum(float(score.sum(dtype=torch.float64)) for score in scores.values())
    return {name: score / total for name, score in scores.items()} if 0 < total < math.inf else scores
