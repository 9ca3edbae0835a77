"""Pure tensor maths of the objectives. One KL, one soft cross entropy; twice differentiable."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from epsd.types import Batch, BatchNeeds, EpsdError, Forward, Loss, Objective

Metric = Callable[[Tensor, Tensor], float | Tensor]
"""All outputs (N, ...) and labels (N, ...) of a split -> one number."""

ClassWeights = Sequence[float] | Literal["auto"] | None


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, class_weights: ClassWeights = None
) -> Tensor:
    """Mean cross entropy over the batch. `logits` (B, K), `labels` (B,) int64 or probabilities (B, K) -> scalar.

    EpsdError unless K ≥ 2, and for labels that are neither classes nor probabilities.

    class_weights : K factors, as torch's `weight`; but the sum is divided by B, so that weights whose mean over the
        training images is 1 leave the loss as large as it is, and a batch is the mean of its parts.
    """
    if logits_of(logits).dim() != 2 or logits.shape[1] == 1:
        raise EpsdError(
            f"the network gives {_shape(logits)} for {len(labels)} images: cross entropy needs logits (B, K), an "
            "output for each class. For one output pass a loss of your own, such as binary cross entropy."
        )
    if not are_classes(labels):
        if not labels.is_floating_point() or labels.shape != logits.shape:
            kind = str(labels.dtype).removeprefix("torch.")
            raise EpsdError(
                f"the labels are {kind} {_shape(labels)} for logits {_shape(logits)}: cross entropy takes integers "
                "(B,) or probabilities (B, K). For other targets pass a loss of your own."
            )
        labels = labels.to(logits.dtype)
    return _entropy(logits, labels, label_smoothing, class_weights)


def _entropy(logits: Tensor, targets: Tensor, label_smoothing: float, class_weights: ClassWeights) -> Tensor:
    if class_weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if class_weights == "auto":
        raise EpsdError("objective.class_weights: auto is known from the labels of a data set: name the weights.")
    weight = torch.tensor(class_weights, dtype=logits.dtype, device=logits.device)
    return F.cross_entropy(logits, targets, weight, label_smoothing=label_smoothing, reduction="sum") / len(targets)


def are_classes(labels: Tensor) -> bool:
    """Whether labels are one integer per image, so that accuracy says something."""
    return labels.dim() == 1 and not labels.is_floating_point()


def class_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K) logits, K ≥ 2, of what a network gives for images with `labels` (B,).

    One output z per image, (B, 1) or (B,), is that of a binary task: it becomes (0, z), whose softmax is the sigmoid of
    z, so that class 1 is predicted above 0. EpsdError: one output and labels beyond 0 and 1 (accuracy says nothing of a
    regression); other shapes.
    """
    if logits.dim() == 2 and logits.shape[1] > 1:
        return logits
    if logits.numel() != len(labels):
        raise EpsdError(f"the network gives {_shape(logits)} for {len(labels)} images, not logits (B, K).")
    if len(labels) and int(labels.max()) > 1:
        raise EpsdError(
            f"the network has one output, and a label is {int(labels.max())}: top-1 is that of classes. A binary task "
            "has labels 0 and 1; a regression is not judged here."
        )
    one = logits.reshape(-1, 1)
    return torch.cat([torch.zeros_like(one), one], dim=1)


def named_logits(outputs: object) -> Tensor | None:
    """`outputs` where it is a tensor, else what of it is called `logits`; None where nothing is."""
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    return named if isinstance(named, Tensor) else None


def logits_of(outputs: object, named: bool = False) -> Tensor:
    """`outputs` itself where it is one tensor; with `named` also what of several is called `logits`. Else EpsdError."""
    logits = named_logits(outputs) if named else outputs
    if isinstance(logits, Tensor):
        return logits
    given = type(outputs).__name__
    raise EpsdError(f"the network gives {given}, not logits (B, K): wrap it in a module that returns them alone.")


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


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
    """PS-KD's targets (1 − α)·onehot(labels) + α·past. `labels` (B,) or probabilities (B, K), `past` (B, K) -> (B, K),
    detached.
    """
    return torch.lerp(probabilities(labels, past), past, alpha).detach()


def probabilities(labels: Tensor, like: Tensor) -> Tensor:
    """`labels` (B,) as one-hot rows, or (B, K) as they are, in the type of `like` (B, K)."""
    return (F.one_hot(labels, like.shape[1]) if are_classes(labels) else labels).to(like.dtype)


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights: ClassWeights = None
) -> Tensor:
    """Batch mean of −Σ targets · log_softmax(logits). Both (B, K) -> scalar. No temperature (PS-KD has none).

    label_smoothing : share of the targets spread over all classes.  class_weights : as of `cross_entropy`.
    """
    return _entropy(logits, targets, label_smoothing, class_weights)


def partner_of(batch: Batch) -> Tensor:
    """(B, C, H, W) second images. EpsdError where the batch has none."""
    if batch.partner is None:
        raise EpsdError(
            "this objective needs a partner for every image (Batch.partner): use a DataLoader or prepared batches, "
            "which bring one, or objective cross_entropy."
        )
    return batch.partner


def distilling(logits: Tensor, supervised: Tensor, distillation: Tensor, weight: float) -> Loss:
    """supervised + weight · distillation, as the loss of `logits` (B, K)."""
    parts = {"supervised": supervised, "distillation": weight * distillation}
    terms = {"cross_entropy": supervised.detach(), "distillation": distillation.detach()}
    return Loss(parts["supervised"] + parts["distillation"], terms, logits.detach(), parts)


def supervised(forward: Forward, batch: Batch) -> Loss:
    """Plain cross entropy as a `pruning.scoring.LossFunction`: what SNIP, GraSP and ProsPr differentiate."""
    logits = forward(batch.images)
    total = cross_entropy(logits, batch.labels)
    return Loss(total, {"cross_entropy": total.detach()}, logits.detach(), {"supervised": total})


class PlainLoss(Objective):
    """A user's own `loss(logits, labels) -> scalar` as an objective: nothing is distilled, nothing remembered.

    In training it gets what the network gives, several tensors, too. Of those, what is named `logits` is judged.

    `needs`: what its batches shall carry all the same, so that it can be compared with another objective on the same
    images.
    """

    needs = BatchNeeds()

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], needs: BatchNeeds = BatchNeeds()) -> None:
        self.function = function
        self.needs = needs

    def averages(self, labels: Tensor, shape: Sequence[int]) -> bool:
        """Whether the loss of a batch is the mean of its halves', tried on logits of its own, `shape` for an image."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(len(labels), *shape, generator=generator).to(labels.device)
        half = len(labels) // 2
        with torch.no_grad():
            first, second = (self.function(logits[part], labels[part]) for part in (slice(half), slice(half, None)))
            mean = (half * first + (len(labels) - half) * second) / len(labels)
            return bool(torch.isclose(self.function(logits, labels), mean, rtol=1e-4))

    def loss(self, forward: Forward, batch: Batch, progress: float) -> Loss:
        """One forward pass."""
        outputs = forward(batch.images)
        logits = named_logits(outputs)
        total = self.function(outputs, of_type(batch.labels, logits))
        if not isinstance(total, Tensor) or total.dim():
            given = f"a tensor {_shape(total)}" if isinstance(total, Tensor) else type(total).__name__
            raise EpsdError(f"the loss function gives {given}, not one number in a tensor: take a mean over the batch.")
        judged = None if logits is None else logits.detach()
        return Loss(total, {"loss": total.detach()}, judged, {"supervised": total})


def of_type(labels: Tensor, outputs: Tensor | None) -> Tensor:
    """Targets that are no integers in the type of the outputs, as losses want them."""
    return labels.to(outputs.dtype) if outputs is not None and labels.is_floating_point() else labels


_NO_SUCH_CLASS = re.compile(r"Target (-?\d+) is out of bounds|Class values must be smaller than num_classes")


def no_such_class(error: Exception) -> str:
    """What to say where a loss failed because the network has no output for a label; "" where it did not."""
    found = _NO_SUCH_CLASS.search(str(error))
    if found is None:
        return ""
    return f"a label is {found[1] or 'too large'}: the network has no output for it."


def as_objective(loss: Objective | Callable[[Tensor, Tensor], Tensor]) -> Objective:
    """`loss` itself where it is an objective, else the plain function wrapped as one. EpsdError where it is neither."""
    if isinstance(loss, type) or not (hasattr(loss, "begin") or callable(loss)):
        named = f"the class {loss.__name__}: make one, {loss.__name__}()" if isinstance(loss, type) else repr(loss)
        raise EpsdError(f"objective: expected a method such as CsKd() or a function loss(logits, labels), got {named}.")
    return loss if hasattr(loss, "begin") else PlainLoss(loss)  # type: ignore[return-value]
