"""Distillation from a frozen teacher (Hinton et al., 2015): what EPSD does without, to be compared with."""

import torch
from torch import Tensor, nn

from epsd import losses
from epsd.compute.cost import Meter
from epsd.types import Batch, Forward, Loss, Objective


class Distillation(Objective):
    """alpha · T² · KL(softmax(teacher/T) ‖ softmax(student/T)) + (1 − alpha) · CE(student, labels), as an objective.

    The teacher sees the very images that the student sees, in evaluation mode and without gradient; it is never
    changed, only put in evaluation mode.

    Parameters
    ----------
    teacher : images (B, C, H, W) -> logits (B, K), on the device of the batches.
    temperature : T > 0. Default 10 ("Prune Your Model Before Distill It", Park and No, ECCV 2022, official code).
    alpha : [0, 1], weight of the distillation. Default 0.95 (likewise).
    precision : the type that the teacher computes in (autocast), None = its own.
    meter : counts the teacher's forward passes, beside the student's.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float = 10.0,
        alpha: float = 0.95,
        precision: torch.dtype | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.temperature, self.alpha = temperature, alpha
        self._teacher, self._precision = teacher.eval(), precision
        self._asked = (meter or Meter()).through(self._told)

    def loss(self, forward: Forward, batch: Batch, progress: float) -> Loss:
        """One pass of the student; one of the teacher, forwards only."""
        logits = forward(batch.images)
        with torch.no_grad():
            target = self._asked(batch.images)
        supervised = losses.cross_entropy(logits, batch.labels)
        distillation = losses.kl_divergence(target, logits, self.temperature)
        parts = {"supervised": (1 - self.alpha) * supervised, "distillation": self.alpha * distillation}
        terms = {"cross_entropy": supervised.detach(), "distillation": distillation.detach()}
        return Loss(parts["supervised"] + parts["distillation"], terms, logits.detach(), parts)

    def _told(self, images: Tensor) -> Tensor:
        if self._precision is None:
            logits: Tensor = self._teacher(images)
            return logits
        with torch.autocast(images.device.type, self._precision):
            logits = self._teacher(images)
        return logits.float()
