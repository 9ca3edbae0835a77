"""Widths: the budget kept and used, in steps that kernels like, and the channels that score highest."""

import copy

import pytest
import torch
from torch import Tensor

from epsd.architectures.resnet import ResNet
from epsd.pruning.channels import Allocation, ChannelError, Group, Structure
from epsd.pruning.widths import best, chosen, jaccard, shuffled, summary

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def structure() -> Structure:
    return Structure(ResNet(depth=14, width=2.0)(10, SHAPE), SHAPE)


def gates(structure: Structure, seed: int = 0) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {name: torch.randn(group.size, generator=drawn) for name, group in structure.groups.items()}


def sizes(kept: dict[str, Tensor]) -> dict[str, int]:
    return {name: len(channels) for name, channels in kept.items()}


@pytest.mark.parametrize("allocation", ["uniform", "cost", "random"])
@pytest.mark.parametrize(("macs", "round_to"), [(0.5, 8), (0.25, 8), (0.25, 4), (0.1, 1)])
def test_the_budget_is_kept_and_used(structure: Structure, allocation: Allocation, macs: float, round_to: int) -> None:
    kept = chosen(structure, gates(structure), macs=macs, allocation=allocation, round_to=round_to)
    share = structure.macs(sizes(kept)) / structure.macs(structure.dense())
    assert 0.9 * macs <= share <= macs
    fits = (4, *range(8, 999, 8)) if round_to == 4 else range(round_to, 999, round_to)
    assert all(width in fits for width in sizes(kept).values())
    assert summary(structure, kept)["macs"] == share
    for name, channels in kept.items():
        assert channels.tolist() == sorted({*channels.tolist()})
        assert channels[-1] < structure.groups[name].size


def test_all_of_the_budget_is_the_whole_network(structure: Structure) -> None:
    assert sizes(chosen(structure, gates(structure), macs=1.0)) == structure.dense()


def test_uniform_takes_the_same_share_everywhere(structure: Structure) -> None:
    kept = sizes(chosen(structure, gates(structure), macs=0.25, round_to=1))
    shares = [width / structure.groups[name].size for name, width in kept.items()]
    assert max(shares) - min(shares) <= 1 / 16  # a channel of the narrowest


def test_the_highest_gates_stay(structure: Structure) -> None:
    """Signs do not matter, and channels of equal value stay in their order."""
    values = gates(structure)
    for name, channels in chosen(structure, values, macs=0.25).items():
        stays = values[name].abs()[channels]
        goes = values[name].abs()[[c for c in range(len(values[name])) if c not in channels.tolist()]]
        assert not len(goes) or stays.min() >= goes.max()
    even = {name: torch.ones(group.size) for name, group in structure.groups.items()}
    assert all(k.tolist() == list(range(len(k))) for k in chosen(structure, even, macs=0.25).values())


def test_cost_spends_where_a_multiply_add_brings_most(structure: Structure) -> None:
    """A group whose gates are a hundred times as high keeps more than its uniform width, and none falls below the
    floor."""
    values, favoured = {n: v.abs() + 0.1 for n, v in gates(structure).items()}, "layer2.1.conv1"
    uniform = sizes(chosen(structure, values, macs=0.25, round_to=4))
    values[favoured] = 100 * values[favoured]
    found = sizes(chosen(structure, values, macs=0.25, allocation="cost", round_to=4, floor=0.5))
    assert found[favoured] > uniform[favoured]
    assert all(found[name] >= 0.5 * uniform[name] for name in found)


def test_lots_are_drawn_by_the_seed(structure: Structure) -> None:
    first, again, other = (
        chosen(structure, gates(structure), macs=0.25, allocation="random", seed=seed) for seed in (1, 1, 2)
    )
    assert jaccard(first, again) == 1 > jaccard(first, other)


def test_shuffled_keeps_the_widths_alone(structure: Structure) -> None:
    kept = chosen(structure, gates(structure), macs=0.25)
    mixed = shuffled(structure, kept, 0)
    assert sizes(mixed) == sizes(kept)
    assert jaccard(mixed, kept) < 0.6


def test_blocks_keep_equally_many() -> None:
    group = Group("a", 12, 3, (), (), normed=False)
    values = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4, 0, 0, 5, 0])
    assert best(group, values, 6).tolist() == [0, 1, 6, 7, 8, 10]


def test_a_budget_below_one_step_everywhere_is_one_line(structure: Structure) -> None:
    with pytest.raises(ChannelError, match=r"prune\.macs: 0\.001 is below 0\.\d+, the share that 8 channels"):
        chosen(structure, gates(structure), macs=0.001)


def test_scores_are_not_changed(structure: Structure) -> None:
    values = gates(structure)
    before = copy.deepcopy(values)
    chosen(structure, values, macs=0.5, allocation="cost")
    assert all(torch.equal(value, before[name]) for name, value in values.items())
