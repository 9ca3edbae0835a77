"""Cross entropy: the objective that distils nothing. The baseline of every comparison."""

from epsd import losses
from epsd.project.settings import ClassWeights, Share
from epsd.registry import stateful_variant
from epsd.types import Batch, Forward, Loss, Objective


@stateful_variant
class CrossEntropy(Objective):
    """Mean cross entropy over the batch.

    label_smoothing : [0, 1) share of the target spread over all classes. Default 0, as in all official codes
        compared here.
    class_weights : a factor on the loss of each class, in their order; "auto": by how rare it is, N / (K · N_k).
        Default null: 1 each.
    """

    label_smoothing: Share = 0.0
    class_weights: ClassWeights = None

    def loss(self, forward: Forward, batch: Batch, progress: float) -> Loss:
        """One forward pass."""
        logits = forward(batch.images)
        total = losses.cross_entropy(logits, batch.labels, self.label_smoothing, self.class_weights)
        return Loss(total, {"cross_entropy": total.detach()}, logits.detach(), {"supervised": total})
