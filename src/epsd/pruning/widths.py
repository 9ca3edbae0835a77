"""How many channels each group keeps, and which: a budget of multiply-adds, widths that kernels like."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from epsd.pruning.channels import Allocation, ChannelError, Group, Kept, Structure
from epsd.types import Scores

SMALL = 4
"""The one `round_to` below 8 that params.yaml takes."""
ENOUGH = 0.9
"""Share of the budget that widths in whole steps should reach; less is told."""


def chosen(
    structure: Structure,
    gates: Scores,
    *,
    macs: float,
    allocation: Allocation = "uniform",
    round_to: int = 8,
    floor: float = 0.5,
    seed: int = 0,
) -> Kept:
    """The channels that stay.

    Parameters
    ----------
    gates : group -> (size,) derivative with respect to each gate; its absolute value is the channel's score.
    macs : (0, 1], share of the whole network's multiply-adds that stays at most.
    allocation : "uniform", the same share of every group, the gate picks inside; "cost", channels of all groups compete
        by gate per multiply-add saved (undivided, deep layers would be cut to nothing); "random", they compete by lot.
    round_to : widths are multiples of it, since kernels are slow at others; narrower groups stay whole. 4 allows widths
        of 4 beside multiples of 8: at 12, 20, ... a convolution goes backward no faster than at the next multiple of 8.
    floor : of the uniform width, the least that a group keeps where channels compete.
    seed : of the lots.

    Raises ChannelError: the budget is below the narrowest network that these settings allow.
    """
    widths = Widths(structure, macs, round_to)
    values = {name: gate.detach().abs().double().cpu() for name, gate in gates.items()}
    if allocation == "random":
        drawn = torch.Generator().manual_seed(seed)
        values = {name: torch.rand(len(v), generator=drawn, dtype=torch.float64) for name, v in values.items()}
    elif allocation == "cost":
        values = {name: value / max(structure.saved(name), 1.0) for name, value in values.items()}
    found = widths.uniform() if allocation == "uniform" else widths.competing(values, floor)
    return {name: best(structure.groups[name], values[name], width) for name, width in found.items()}


def best(group: Group, values: Tensor, width: int) -> Tensor:
    """Positions of the `width` highest values, as many from each block, ties by position; ascending."""
    order = values.view(group.blocks, -1).sort(dim=1, descending=True, stable=True).indices[:, : width // group.blocks]
    first = torch.arange(group.blocks)[:, None] * (group.size // group.blocks)
    return (order + first).flatten().sort().values


def shuffled(structure: Structure, kept: Mapping[str, Tensor], seed: int) -> Kept:
    """As many channels of every group, drawn by lot: the control that asks whether it matters which."""
    drawn = torch.Generator().manual_seed(seed)
    return {
        name: best(structure.groups[name], torch.rand(structure.groups[name].size, generator=drawn), len(channels))
        for name, channels in kept.items()
    }


class Widths:
    """Widths within a budget, in steps of `round_to` channels (of 4, then 8). `least`: the narrowest network's."""

    def __init__(self, structure: Structure, macs: float, round_to: int) -> None:
        self._structure = structure
        self._narrowest = {name: math.lcm(round_to, group.blocks) for name, group in structure.groups.items()}
        step = 2 * round_to if round_to == SMALL else round_to
        self._steps = {name: math.lcm(step, group.blocks) for name, group in structure.groups.items()}
        self._most = structure.dense()
        self.least = {name: self._rounded(name, 0.0) for name in self._most}
        self._budget = macs * structure.macs(self._most)
        if structure.macs(self.least) > self._budget:
            whole = structure.macs(self._most)
            raise ChannelError(
                f"prune.macs: {macs:g} is below {structure.macs(self.least) / whole:.3g}, the share that {round_to} "
                "channels in every group take. Raise it, or lower prune.round_to."
            )

    def _rounded(self, name: str, width: float) -> int:
        """The next multiple below, at least the narrowest; a group that is narrower stays whole."""
        step, most = self._steps[name], self._most[name]
        return min(max(self._narrowest[name], int(width) // step * step), most)

    def _wider(self, name: str, width: int) -> int:
        """One step more."""
        step = self._steps[name]
        return min(width // step * step + step, self._most[name])

    def _fits(self, widths: Mapping[str, int]) -> bool:
        return self._structure.macs(widths) <= self._budget

    def uniform(self) -> dict[str, int]:
        """The same share of every group; what rounding leaves over goes where most was rounded off."""

        def at(share: float) -> dict[str, int]:
            return {name: self._rounded(name, share * most) for name, most in self._most.items()}

        share = self._largest(lambda share: self._structure.macs(self._exact(share)) <= self._budget, 0.0, 1.0)
        widths = at(share)
        if not self._fits(widths):
            widths = at(self._largest(lambda share: self._fits(at(share)), 0.0, 1.0))
        return self._filled(widths, {name: share * most - widths[name] for name, most in self._most.items()})

    def _exact(self, share: float) -> dict[str, int]:
        return {name: max(1, round(share * most)) for name, most in self._most.items()}

    def competing(self, values: Mapping[str, Tensor], floor: float) -> dict[str, int]:
        """Channels of all groups by value, each group with at least `floor` of its uniform width."""
        uniform = self.uniform()
        least = {name: self._up(name, floor * width) for name, width in uniform.items()}

        def at(threshold: float) -> dict[str, int]:
            above = {name: int((value >= threshold).sum()) for name, value in values.items()}
            return {name: max(least[name], self._rounded(name, above[name])) for name in values}

        thresholds = torch.cat(list(values.values())).sort().values.tolist()
        low, high = 0, len(thresholds)  # the lowest threshold whose network fits
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(at(thresholds[middle])) else (middle + 1, high)
        widths = at(thresholds[low]) if low < len(thresholds) else least
        return self._filled(widths, {name: self._next(name, widths[name], value) for name, value in values.items()})

    def _up(self, name: str, width: float) -> int:
        step, least = self._steps[name], self._narrowest[name]
        return self._rounded(name, least if width <= least else math.ceil(width / step) * step)

    def _next(self, name: str, width: int, value: Tensor) -> float:
        """Mean value of the channels that one more step would add."""
        after = value.sort(descending=True).values[width : self._wider(name, width)]
        return float(after.mean()) if len(after) else -math.inf

    def _filled(self, widths: dict[str, int], wish: Mapping[str, float]) -> dict[str, int]:
        """One step more for each group that the budget has room for, the strongest wish first; again while much is
        left."""
        before: dict[str, int] = {}
        while before != widths and (not before or self._structure.macs(widths) < ENOUGH * self._budget):
            before = widths
            for name in sorted(widths, key=lambda name: -wish[name]):
                wider = widths | {name: self._wider(name, widths[name])}
                widths = wider if self._fits(wider) else widths
        return widths

    @staticmethod
    def _largest(holds: Callable[[float], bool], low: float, high: float) -> float:
        """The largest number at which `holds`, to 2^-20 of the interval; `low` where none does."""
        if holds(high):
            return high
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low


def summary(structure: Structure, kept: Mapping[str, Tensor]) -> dict[str, float]:
    """For the report: macs (share of the whole network's multiply-adds), channels kept and in all."""
    sizes = {name: len(channels) for name, channels in kept.items()}
    share = structure.macs(sizes) / structure.macs(structure.dense())
    return {"macs": share, "channels": sum(sizes.values()), "channels_total": sum(structure.dense().values())}


def jaccard(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Overlap |A ∩ B| / |A ∪ B| of the channels kept, [0, 1]."""
    one, two = ({(name, c) for name, kept in each.items() for c in kept.tolist()} for each in (first, second))
    return len(one & two) / len(one | two)
