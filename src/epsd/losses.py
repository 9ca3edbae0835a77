"""Pure tensor maths of the objectives. One KL, one soft cross entropy; twice differentiable."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from epsd.types import Batch, BatchNeeds, Forward, Loss, Objective, Purpose


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy over the batch. `logits` (B, K), `labels` (B,) int64 -> scalar."""
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def kl_divergence(target_logits: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """T² · batch mean of KL(softmax(target/T) ‖ softmax(logits/T)).

    Both (B, K) -> scalar. The factor T² keeps the gradient's size independent of T (Hinton et al., 2015); CS-KD and DLB
    both carry it. No gradient flows into the target.
    """
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(target_logits.detach() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def soft_targets(labels: Tensor, past: Tensor, alpha: float) -> Tensor:
    """PS-KD's targets (1 − α)·onehot(labels) + α·past. `labels` (B,), `past` (B, K) -> (B, K), detached."""
    onehot = F.one_hot(labels, past.shape[1]).to(past.dtype)
    return torch.lerp(onehot, past, alpha).detach()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Batch mean of −Σ targets · log_softmax(logits). Both (B, K) -> scalar. No temperature (PS-KD has none)."""
    return F.cross_entropy(logits, targets)


def supervised(forward: Forward, batch: Batch) -> Loss:
    """Plain cross entropy as a `metagradients.LossFunction`: what SNIP, GraSP and ProsPr differentiate."""
    logits = forward(batch.images)
    total = cross_entropy(logits, batch.labels)
    return Loss(total, {"cross_entropy": total.detach()}, logits.detach(), {"supervised": total})


class PlainLoss:
    """A user's own `loss(logits, labels) -> scalar` as an objective: nothing is distilled, nothing remembered.

    `needs`: what its batches shall carry all the same, so that it can be compared with another objective on the same
    images.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], needs: BatchNeeds = BatchNeeds()) -> None:
        self._function = function
        self.needs = needs

    def begin(self, purpose: Purpose, train_size: int, num_classes: int) -> None:
        """Nothing to forget."""

    def loss(self, forward: Forward, batch: Batch, progress: float) -> Loss:
        """One forward pass."""
        logits = forward(batch.images)
        total = self._function(logits, batch.labels)
        return Loss(total, {"loss": total.detach()}, logits.detach(), {"supervised": total})

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def as_objective(loss: Objective | Callable[[Tensor, Tensor], Tensor]) -> Objective:
    """`loss` itself where it is an objective, else the plain function wrapped as one."""
    return loss if hasattr(loss, "begin") else PlainLoss(loss)  # type: ignore[return-value]
