"""CS-KD: class-wise self-distillation (Yun et al., CVPR 2020; official code alinlab/cs-kd)."""

import torch

from epsd import losses
from epsd.project.settings import ClassWeights, NonNegative, Positive, Share
from epsd.registry import stateful_variant
from epsd.types import Batch, BatchNeeds, Forward, Loss, Objective


@stateful_variant
class CsKd(Objective):
    """CE(anchors) + weight · T² · KL(softmax(partner/T) ‖ softmax(anchor/T)), the partner without gradient.

    The partner is a random training image of the same class, in a forward pass of its own, so that BatchNorm
    normalises each half by its own statistics and updates its running statistics twice, as the official code does.
    The method is stateless, so scoring and training see the same loss; at initialisation both outputs are near
    uniform and the KL gradient is small (see the prune report).

    temperature : T > 0. Default 4 (official command line).
    weight : λ ≥ 0. Default 1 (official command line); the authors use 3 on CUB.
    label_smoothing : [0, 1) of the cross entropy. Default 0 (official code has none).
    class_weights : a factor on the loss of each class, in their order; "auto": by how rare it is, N / (K · N_k).
        Default null: 1 each.
    """

    temperature: Positive = 4.0
    weight: NonNegative = 1.0
    label_smoothing: Share = 0.0
    class_weights: ClassWeights = None

    @property
    def needs(self) -> BatchNeeds:
        """A partner of the same class per image."""
        return BatchNeeds(partner="same_class")

    def loss(self, forward: Forward, batch: Batch, progress: float) -> Loss:
        """Anchors first, then partners: the order in which the official code updates running statistics."""
        partner = losses.partner_of(batch)
        logits = forward(batch.images)
        with torch.no_grad():
            target = forward(partner)
        supervised = losses.cross_entropy(logits, batch.labels, self.label_smoothing, self.class_weights)
        distillation = losses.kl_divergence(target, logits, self.temperature)
        return losses.distilling(logits, supervised, distillation, self.weight)
