"""Which student a pruned teacher is distilled into, and how narrow the narrower one is."""

import math
from typing import Literal

import torch

from epsd.architectures import ARCHITECTURES, built
from epsd.data.prepared import Prepared
from epsd.masks import Mask
from epsd.project.params import Params
from epsd.project.settings import Choice
from epsd.registry import ParamsError, choose, settings_of

StudentKind = Literal["narrow", "rewound", "scored"]
"""narrow : the same architecture, dense, of the `width` at which it has as many parameters as the sparse network has
nonzero ones (the paper's student). rewound : the architecture itself from the initial weights of the run's seed, under
the mask that the teacher's rounds found. scored : the same under the mask of `prune.score`, so that it differs from
the run's own network in how it is trained alone."""

_WIDTH_STEPS = 14
"""Halvings of the interval in which the width is sought: to 1/16384 of the teacher's."""


def nonzero(params: Params, data: Prepared, mask: Mask) -> int:
    """Parameters of the network that `mask` leaves: the surviving weights, and all that is never pruned."""
    return parameters(params.architecture, data) - mask.total + mask.kept


def parameters(architecture: Choice, data: Prepared) -> int:
    """Of all kinds, of the network that `architecture` builds. Nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in built(architecture, data.num_classes, data.image_shape).parameters())


def narrowed(params: Params, data: Prepared, wanted: int) -> Choice:
    """The architecture with the `width` at which its number of parameters comes nearest to `wanted`."""
    full = float(vars(choose(ARCHITECTURES, params.architecture, "architecture"))["width"])

    def of(width: float) -> Choice:
        return {**params.architecture, "width": width}

    low, high = full * 2.0**-_WIDTH_STEPS, full
    while high - low > full * 2.0**-_WIDTH_STEPS:
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(of(middle), data) <= wanted else (low, middle)
    return min(of(low), of(high), key=lambda choice: math.fabs(parameters(choice, data) - wanted))


def has_width(params: Params) -> None:
    """Raises ParamsError where the architecture cannot be made narrower."""
    name = params.architecture["name"]
    if name in ARCHITECTURES and "width" not in settings_of(ARCHITECTURES[name]):
        able = ", ".join(key for key, entry in ARCHITECTURES.items() if "width" in settings_of(entry))
        raise ParamsError(
            f"student: 'narrow' needs an architecture with a setting `width` ({able}); '{name}' has none. "
            "Use student: rewound or scored."
        )
