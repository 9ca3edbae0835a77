"""PS-KD: targets softened by past predictions (Kim et al., ICCV 2021; official code lgcnsai/PS-KD-Pytorch)."""

import tempfile
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from epsd import losses
from epsd.compute import distributed
from epsd.project.settings import ClassWeights, Share
from epsd.registry import stateful_variant
from epsd.types import Batch, BatchNeeds, Forward, Loss, Purpose

_HALF_ABOVE = 2**28
"""Bytes of single-precision memory above which `memory: auto` stores halves (67 million entries)."""
_MAPPED_ABOVE = 2**33
"""Bytes above which the memory is a file mapped into the address space instead of allocated."""


@stateful_variant
class PsKd:
    """Soft cross entropy towards (1 − α_t)·onehot + α_t·p_past, α_t = alpha · (epoch + 1) / epochs. No temperature,
    no KL.

    Training: p_past is the softmax of the previous epoch's training forward pass of that very image, kept in a
    memory of (training images, classes) and written right after each loss. An image never seen before has its
    one-hot label there, so epoch 0 is plain cross entropy, whatever α. Of several processes each holds the whole
    memory and hears what the others' images got, since an image meets another process in another epoch.

    Scoring: taken literally that makes PS-KD's loss equal cross entropy for any number of steps (epoch 0 only).
    `score: live`, the default, takes as past prediction what the net said of the same images before the previous
    look-ahead step, at the full α; with no previous step, what it says now. `score: literal` is the official loss.

    alpha : α_T in [0, 1]. Default 0.8 (official; 0.3 reported for ImageNet).
    score : "live" | "literal" (see above).
    memory : "auto" | "float32" | "float16". auto: the logits' precision, halves above 256 MiB, mapped to a file
        above 8 GiB.
    label_smoothing : [0, 1) share of the targets spread over all classes. Default 0 (official code has none).
    class_weights : a factor on the loss of each class, in their order; "auto": by how rare it is, N / (K · N_k).
        Default null: 1 each.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.8
    score: Literal["live", "literal"] = "live"
    memory: Literal["auto", "float32", "float16"] = "auto"
    label_smoothing: Share = 0.0
    class_weights: ClassWeights = None
    past: Tensor | None = field(default=None, init=False, repr=False)
    seen: Tensor | None = field(default=None, init=False, repr=False)
    purpose: Purpose = field(default="train", init=False, repr=False)
    train_size: int = field(default=0, init=False, repr=False)
    before: Forward | None = field(default=None, init=False, repr=False)

    @property
    def needs(self) -> BatchNeeds:
        """Each image's position in the training split."""
        return BatchNeeds(indices=True)

    def begin(self, purpose: Purpose, train_size: int, num_classes: int) -> None:
        """Forget all predictions. The memory itself is allocated at the first loss, beside the logits."""
        self.purpose, self.train_size = purpose, train_size
        self.past = self.seen = self.before = None

    def loss(self, forward: Forward, batch: Batch, progress: float) -> Loss:
        """`progress` is (epoch + 1) / epochs, so α reaches `alpha` in the last epoch."""
        if self.purpose == "score" and self.score == "live":
            return self._live(forward, batch)
        logits = forward(batch.images)
        past = self._recalled(batch, logits)
        alpha = self.alpha * progress
        if self.purpose == "train":
            self._remember(batch.indices, logits)
        return self._towards(past, alpha, logits, batch)

    def _live(self, forward: Forward, batch: Batch) -> Loss:
        before, self.before = self.before or forward, forward
        with torch.no_grad():
            past = F.softmax(before(batch.images), dim=1)
        return self._towards(past, self.alpha, forward(batch.images), batch)

    def _towards(self, past: Tensor, alpha: float, logits: Tensor, batch: Batch) -> Loss:
        """The loss, and its summands (1 − α)·CE and α·H(past, ·)."""
        how = self.label_smoothing, self.class_weights
        total = losses.soft_cross_entropy(logits, losses.soft_targets(batch.labels, past, alpha), *how)
        supervised = losses.cross_entropy(logits, batch.labels, *how)
        distillation = losses.soft_cross_entropy(logits, past, *how)
        terms = {"cross_entropy": supervised.detach(), "distillation": distillation.detach()}
        parts = {"supervised": (1 - alpha) * supervised, "distillation": alpha * distillation}
        return Loss(total, terms, logits.detach(), parts)

    def _recalled(self, batch: Batch, logits: Tensor) -> Tensor:
        onehot = losses.probabilities(batch.labels, logits)
        if self.past is None or self.seen is None:
            return onehot
        rows = batch.indices.to(self.past.device)
        past = self.past[rows].to(logits.device, logits.dtype)
        return torch.where(self.seen[rows].to(logits.device)[:, None], past, onehot)

    def _remember(self, indices: Tensor, logits: Tensor) -> None:
        if self.past is None or self.seen is None:
            self.past, self.seen = self._allocated(logits)
        rows = distributed.gather(indices).to(self.past.device)
        said = distributed.gather(F.softmax(logits.detach(), dim=1).to(self.past.dtype))
        self.past[rows] = said.to(self.past.device)
        self.seen[rows] = True

    def _allocated(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        entries = self.train_size * logits.shape[1]
        wide = logits.dtype if logits.dtype in (torch.float32, torch.float64) else torch.float32
        halve = self.memory == "float16" or (self.memory == "auto" and entries * 4 > _HALF_ABOVE)
        dtype = torch.float16 if halve else torch.float32 if self.memory == "float32" else wide
        shape = self.train_size, logits.shape[1]
        if entries * dtype.itemsize > _MAPPED_ABOVE:
            with tempfile.NamedTemporaryFile(prefix="epsd-pskd-") as file:
                past = torch.from_file(file.name, shared=True, size=entries, dtype=dtype).view(shape)
        else:
            past = torch.zeros(shape, dtype=dtype, device=logits.device)
        return past, torch.zeros(self.train_size, dtype=torch.bool, device=past.device)

    def state_dict(self) -> dict[str, Any]:
        """The memory and which rows of it are filled."""
        return {} if self.past is None else {"past": self.past, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the predictions in `state`."""
        self.past, self.seen = state.get("past"), state.get("seen")
