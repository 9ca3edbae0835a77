"""Distillation quality: how far apart are the predictions that the self-distillation methods pull together?"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from epsd.compute.devices import to_device
from epsd.compute.networks import in_mode
from epsd.losses import kl_divergence
from epsd.types import Batch, Batches, BatchNeeds

PROBE = 2048
"""Images of the validation split that are watched, at most."""

SAME_CLASS, VIEWS, EPOCHS = "kl_same_class", "kl_views", "kl_epochs"
QUANTITIES = (SAME_CLASS, VIEWS, EPOCHS)
CREATED_FOR = {"cskd": SAME_CLASS, "dlb": VIEWS, "pskd": EPOCHS}
"""Objective -> the quantity that it minimises, on other images."""


class Probe:
    """Watches a network's predictions on fixed validation images, in evaluation mode and at temperature 1.

    Parameters
    ----------
    plain : the validation split as it is. augmented : the same, augmented as for training.

    Each measure is the mean over images of KL(p ‖ q) in nats, small where the distillation has worked:

    * `kl_same_class`: p of another, fixed validation image of the same class, q of the image (what CS-KD distils).
    * `kl_views`: p of one augmentation of the image, q of another (what DLB distils, which moreover lets a step pass
      between the two). 0 where nothing is augmented.
    * `kl_epochs`: p of the image after the epoch before, q after this one (what PS-KD distils). Not in the first epoch.
    """

    def __init__(self, plain: Batches, augmented: Batches, device: torch.device) -> None:
        self._plain, self._augmented, self._device = plain, augmented, device
        self._before: Tensor | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The measures after one more epoch. Mode, buffers and random state of `model` stay as they are."""
        with torch.no_grad(), in_mode(model):
            now, same = self._predictions(model, self._plain, BatchNeeds("same_class"))
            first, second = self._predictions(model, self._augmented, BatchNeeds("view"))
        found = {SAME_CLASS: _kl(same, now), VIEWS: _kl(first, second)}
        if self._before is not None:
            found[EPOCHS] = _kl(self._before, now)
        self._before = now
        return found

    def _predictions(self, model: nn.Module, batches: Batches, needs: BatchNeeds) -> tuple[Tensor, Tensor]:
        """Logits (N, K) of the images and of their partners: the same images and partners at each call."""
        pairs = [
            (model(batch.images).float().cpu(), model(batch.partner).float().cpu())
            for batch in self._drawn(batches, needs)
            if batch.partner is not None
        ]
        images, partners = zip(*pairs, strict=True)
        return torch.cat(images), torch.cat(partners)

    def _drawn(self, batches: Batches, needs: BatchNeeds) -> Iterator[Batch]:
        drawn = 0
        for batch in batches.epoch(0, needs):
            yield to_device(batch, self._device)
            drawn += len(batch.labels)
            if drawn >= PROBE:
                return


def _kl(target: Tensor, logits: Tensor) -> float:
    return float(kl_divergence(target.double(), logits.double(), 1.0))
