"""What a detector takes over from its classifier: the mask of the backbone."""

from torch import nn

from epsd.masks import Mask
from epsd.types import EpsdError


class DetectionError(EpsdError):
    """A detector that cannot be trained or scored: a loss that is no number, a test split without objects."""


def follow(mask: Mask, model: nn.Module, detector: nn.Module) -> Mask:
    """The part of a classifier's mask that its backbone took along, under the detector's parameter names.

    Goes by identity, not by name: `detector` was built from the very parameters of `model`. DetectionError when it
    holds none of the masked ones.
    """
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    moved = {name: names[id(p)] for name, p in model.named_parameters() if id(p) in names and name in mask.keep}
    if not moved:
        raise DetectionError("the detector holds none of the classifier's masked weights.")
    return mask.restricted(moved).renamed(moved.__getitem__)


def sparsity(detector: nn.Module, mask: Mask) -> float:
    """Share of the weights under `mask` (by the detector's names) that are exactly 0, recounted."""
    weights = dict(detector.named_parameters())
    return 1 - sum(int(weights[name].count_nonzero()) for name in mask.keep) / mask.total
