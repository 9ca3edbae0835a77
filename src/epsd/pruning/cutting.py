"""Channels cut from a network before it is trained, in one call: the library's `cut_channels`."""

from torch import nn

from epsd.data.loaders import Source
from epsd.losses import cross_entropy
from epsd.pruning import channels, widths
from epsd.pruning.channels import Allocation, ChannelError
from epsd.pruning.prune import Average, LossLike, Stream, gates
from epsd.types import Score


def cut_channels(
    model: nn.Module,
    source: Source,
    *,
    score: Score,
    macs: float,
    objective: LossLike = cross_entropy,
    allocation: Allocation = "uniform",
    round_to: int = 8,
    floor: float = 0.5,
    batches: int = 1,
    average: Average = "absolute",
    seed: int = 0,
) -> nn.Module:
    """A narrow copy of `model`: its channels with the largest gates, with their weights; `model` is left as it is.

    Parameters
    ----------
    source, objective, batches, average : as of `prune`.
    score : whose derivative with respect to the gates ranks them: `Epsd`, `ProsPr` or `Snip`.
    macs : (0, 1], share of the multiply-adds that stays at most.
    allocation, round_to, floor, seed : see `widths.chosen`.

    Raises ChannelError: a network that cannot be cut, or not so far; no images. PruneError: a score without a
    derivative; and what `prune` raises.
    """
    first = next(Stream(source), None)
    if first is None:
        raise ChannelError("the data gave no images, whose shape decides what a channel costs.")
    shape = tuple(first.images.shape[1:])
    structure = channels.Structure(model, shape)
    ranked = gates(model, source, structure, score=score, objective=objective, batches=batches, average=average)
    kept = widths.chosen(structure, ranked, macs=macs, allocation=allocation, round_to=round_to, floor=floor, seed=seed)
    return channels.cut(model, shape, kept)
