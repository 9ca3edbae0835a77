"""A torchvision detector that learns from slices of a batch, one in each process, as if it saw the whole batch.

Detectors look beyond the single picture in three places: they pad the pictures of a batch to one size, they draw
anchors and proposals for the loss from one stream of random numbers, and they divide by the number drawn (or matched).
`Whole` ties all three to the whole batch, so that the weights do not depend on the number of processes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from epsd.compute import distributed
from epsd.compute.devices import reseed
from epsd.compute.seeds import mix

_DRAWN = {"rpn": ("loss_objectness", "loss_rpn_box_reg"), "roi_heads": ("loss_classifier", "loss_box_reg")}
"""The parts of Faster R-CNN that draw samples, and the losses that are divided by their number."""
_MATCHED = ("bbox_regression", "classification")
"""The losses of SSD, divided by the number of matched default boxes."""

Masks = list[Tensor]


class Whole:
    """While entered, `detector` pads, draws and divides as it would on the whole batch.

    Every picture's samples are drawn from random numbers of its own, in one process too.
    """

    def __init__(self, detector: nn.Module) -> None:
        self._detector: Any = detector
        self._before: list[tuple[Any, str, Any]] = []
        self._seed = self._first = 0
        self._counts: dict[tuple[str, ...], Tensor] = {}

    def __enter__(self) -> Self:
        for name, losses in _DRAWN.items():
            part: Any = getattr(self._detector, name, None)
            if hasattr(part, "fg_bg_sampler"):
                self._replace(part, "fg_bg_sampler", self._drawing(name, losses, part.fg_bg_sampler))
        if distributed.world() > 1 and hasattr(self._detector, "transform"):
            self._replace(self._detector.transform, "max_by_axis", _common_shape)
        if distributed.world() > 1 and hasattr(self._detector, "neg_to_pos_ratio"):  # SSD
            self._replace(self._detector, "compute_loss", self._counting(self._detector.compute_loss))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, before in self._before:
            delattr(owner, name)  # a method of the class comes to light again
            if before is not None:
                setattr(owner, name, before)
        self._before.clear()

    def _replace(self, owner: Any, name: str, value: Callable[..., Any]) -> None:
        self._before.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    def begin(self, seed: int, first: int) -> None:
        """A step whose random numbers follow from `seed`; `first`: place of this slice's first picture in the batch."""
        reseed(seed)
        self._seed, self._first = seed, first
        self._counts.clear()

    def weighed(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of this slice, such that their mean over the processes is the loss of the whole batch."""
        for names, own in self._counts.items() if distributed.world() > 1 else ():
            own, total = own.clamp(min=1).double(), own.double()
            distributed.sum_([total])
            factor = own * distributed.world() / total.clamp(min=1)
            losses = losses | {name: losses[name] * factor.to(losses[name].dtype) for name in names}
        return losses

    def _drawing(self, part: str, losses: tuple[str, ...], inner: Callable[[Masks], tuple[Masks, Masks]]) -> Any:
        """`inner` asked for one picture at a time, and the samples counted."""

        def sampler(matched: Masks) -> tuple[Masks, Masks]:
            positive, negative = Masks(), Masks()
            for number, one in enumerate(matched):
                reseed(mix(self._seed, part, self._first + number))
                (chosen,), (rest,) = inner([one])
                positive.append(chosen)
                negative.append(rest)
            self._counts[losses] = torch.stack([chosen.sum() for chosen in positive + negative]).sum()
            return positive, negative

        return sampler

    def _counting(self, inner: Callable[..., dict[str, Tensor]]) -> Any:
        """SSD's `compute_loss`, and the matched default boxes counted."""

        def compute_loss(targets: Any, outputs: Any, anchors: Any, matched: Masks) -> dict[str, Tensor]:
            self._counts[_MATCHED] = torch.stack([(one >= 0).sum() for one in matched]).sum()
            return inner(targets, outputs, anchors, matched)

        return compute_loss


def _common_shape(shapes: Sequence[Sequence[int]]) -> list[int]:
    """The largest extent of all pictures of the batch along each axis."""
    return [round(-distributed.least(-max(extents))) for extents in zip(*shapes, strict=True)]
