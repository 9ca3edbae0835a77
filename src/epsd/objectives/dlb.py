"""DLB: self-distillation from the last mini-batch (Shen et al., CVPR 2022; official code Meta-knowledge-Lab/DLB)."""

from dataclasses import field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epsd import losses
from epsd.compute import distributed
from epsd.project.settings import ClassWeights, NonNegative, Positive, Share
from epsd.registry import stateful_variant
from epsd.types import Batch, BatchNeeds, Forward, Loss, Purpose


class Last(NamedTuple):
    """Of the last batch: second views (B, C, H, W), labels (B,), and the logits (B, K) of the first views then."""

    images: Tensor
    labels: Tensor
    logits: Tensor


@stateful_variant
class Dlb:
    """CE of this batch and of the last one's second view, plus weight · T² · KL from the last batch's earlier logits.

    Step t: logits of batch t, view 0; logits of batch t−1, view 1, with the current weights, in a forward pass of
    its own; CE over both halves as one mean; KL pulls the second half towards what the net said of view 0 one step
    earlier (detached). State carries over the end of an epoch. The very first step is plain cross entropy, so
    scoring needs at least one look-ahead step for the distillation to be live. Of a batch computed in parts, each
    part looks back at the same part of the last batch: `part` says which one comes next, and of how many.

    temperature : T > 0. The official script has no default; 3 as its example tag "TP3" hints and a known
        re-implementation uses.
    weight : α ≥ 0. Default 1 (likewise).
    label_smoothing : [0, 1) of the cross entropy. Default 0 (official code has none).
    class_weights : a factor on the loss of each class, in their order; "auto": by how rare it is, N / (K · N_k).
        Default null: 1 each.
    """

    temperature: Positive = 3.0
    weight: NonNegative = 1.0
    label_smoothing: Share = 0.0
    class_weights: ClassWeights = None
    last: dict[int, Last] = field(default_factory=dict, init=False, repr=False)
    part: tuple[int, int] = field(default=(0, 1), init=False, repr=False)

    @property
    def needs(self) -> BatchNeeds:
        """A second augmentation per image."""
        return BatchNeeds(partner="view")

    def begin(self, purpose: Purpose, train_size: int, num_classes: int) -> None:
        """Forget the last batch."""
        self.last, self.part = {}, (0, 1)

    def loss(self, forward: Forward, batch: Batch, progress: float) -> Loss:
        """Current batch first, then the last one: the order in which the official code updates running statistics."""
        partner = losses.partner_of(batch)
        logits = forward(batch.images)
        last = self._swapped(Last(partner, batch.labels, logits.detach()))
        if last is None:
            supervised = losses.cross_entropy(logits, batch.labels, self.label_smoothing, self.class_weights)
            zero = torch.zeros_like(supervised)
            return losses.distilling(logits, supervised, zero, self.weight)._replace(total=supervised)
        again = forward(last.images)
        both = torch.cat([again, logits]), torch.cat([last.labels, batch.labels])
        supervised = losses.cross_entropy(*both, self.label_smoothing, self.class_weights)
        distillation = losses.kl_divergence(last.logits, again, self.temperature)
        return losses.distilling(logits, supervised, distillation, self.weight)

    def _swapped(self, now: Last) -> Last | None:
        """Remember this part of the batch, hand back what was remembered of the last one; None at first."""
        part, count = self.part
        last = self.last.get(part)
        kept = {**self.last, part: now}
        done = part + 1 == count  # what is left of a batch in more parts goes with it
        self.last = {number: seen for number, seen in kept.items() if number < count or not done}
        return last

    def state_dict(self) -> dict[str, Any]:
        """The last batch's second view, labels and logits by part; of several processes, of the whole batch."""
        named = {
            f"{name}.{part}": tensor for part, last in self.last.items() for name, tensor in last._asdict().items()
        }
        return {name: distributed.gather(tensor) for name, tensor in named.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch in `state`."""
        mine = {name: tensor[distributed.share(len(tensor))] for name, tensor in state.items()}
        parts = sorted({int(name.split(".")[1]) for name in mine})
        self.last = {part: Last(*(mine[f"{name}.{part}"] for name in Last._fields)) for part in parts}
