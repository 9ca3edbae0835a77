"""The constants that decide whether a run dies for memory are those of the committed measurements, and no others.

Each test says what a constant foresees for a network that was measured (benchmarks/results), and holds it against the
peak that was found there; then that half of the constant, twice of it, or 1 would be noticed.
"""

import functools
import re
from typing import NamedTuple

import pytest
import torch

from conftest import ROOT
from epsd.architectures import ARCHITECTURES
from epsd.compute import shortage
from epsd.compute.memory import GIB
from epsd.objectives import OBJECTIVES
from epsd.project import presets
from epsd.project.params import parse
from epsd.pruning import look_ahead
from epsd.pruning.scoring import Following, scoring
from epsd.registry import choose
from epsd.types import Batch

MIB = 2**20
BATCH = 128
COPIES = 3
"""Of the weights, in training with momentum and a mask: gradients, momentum, mask."""


class Row(NamedTuple):
    """A preset in `memory-cpu.md`, in MiB: the process with the network, the peak of a step, what was foreseen."""

    alone: float
    peak: float
    foreseen: float


def table(file: str, header: str) -> list[list[str]]:
    """The cells of the first table below `header`, without its own two lines."""
    lines = (ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8").partition(header)[2].splitlines()[2:]
    rows = lines[: next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip().replace(",", "") for cell in row.strip("|").split("|")] for row in rows]


TRAINING = {
    name: Row(float(alone), float(peak), float(foreseen))
    for name, _, alone, _, peak, foreseen, *_ in table("memory-cpu.md", "| preset |")
    if name in ("cifar10-quick", "cifar10-resnet18", "cifar10-vgg19")  # measured at their own batch, and quick to build
}
SCORING = [
    (net, int(kept), float(extra), float(foreseen))
    for net, kept, extra, foreseen in table("scoring-cpu.md", "| net | graphs kept | extra MiB | foreseen |")
]


def four(partner: bool = True) -> Batch:
    images, numbers = torch.randn(4, 3, 32, 32), torch.arange(4)
    return Batch(images, numbers % 10, numbers, torch.randn(4, 3, 32, 32) if partner else None)


def foreseen(preset: str) -> float:
    """MiB of a training step in fp32, beyond the process and the network."""
    params = parse(presets.read(preset))
    model = choose(ARCHITECTURES, params.architecture)(10, (3, 32, 32)).to(memory_format=torch.channels_last)
    objective = choose(OBJECTIVES, params.objective)
    objective.begin("score", BATCH, 10)

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(images.contiguous(memory_format=torch.channels_last))
        return logits

    need = shortage.need(model, lambda batch: objective.loss(forward, batch, 1.0), four(), COPIES)
    return need.of(BATCH) / MIB


def near(found: float, wanted: float, share: float) -> bool:
    return abs(found / wanted - 1) <= share


@pytest.mark.parametrize("preset", TRAINING)
def test_a_training_step_is_foreseen_as_it_was_measured(preset: str) -> None:
    row = TRAINING[preset]
    found = row.alone + foreseen(preset)
    assert near(found, row.foreseen, 0.01), "run benchmarks/memory.py again: the committed estimate is another"
    assert near(found, row.peak, 0.15)


@pytest.mark.parametrize("value", [shortage.TRANSIENT / 2, 1.0, 2 * shortage.TRANSIENT])
def test_another_transient_is_noticed(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "TRANSIENT", value)
    row = TRAINING["cifar10-quick"]
    assert not near(row.alone + foreseen("cifar10-quick"), row.peak, 0.15)


@functools.cache
def look_ahead_of(net: str) -> look_ahead.Need:
    preset = parse(presets.read(f"cifar10-{net}"))
    model = choose(ARCHITECTURES, preset.architecture)(10, (3, 32, 32))
    objective = OBJECTIVES["cross_entropy"]()
    objective.begin("score", BATCH, 10)
    with scoring(model):
        return look_ahead.measured(model, Following(objective), four(), 3)


def misjudged() -> list[float]:
    """Foreseen / measured, of every row of the committed table, by the constants as they are now."""
    return [look_ahead_of(net).bytes(kept, BATCH, BATCH) / MIB / extra for net, kept, extra, _ in SCORING]


def test_a_score_is_foreseen_as_it_was_measured() -> None:
    assert len(SCORING) == 5
    for ratio, (net, kept, extra, committed) in zip(misjudged(), SCORING, strict=True):
        assert near(ratio * extra, committed, 0.01), f"{net}, {kept} kept: the committed estimate is another"
        assert near(ratio, 1, 0.065)


@pytest.mark.parametrize("name", ["_WORKING", "_COPIES"])
@pytest.mark.parametrize("factor", [0.5, 2.0, None])
def test_another_constant_of_scoring_is_noticed(
    name: str, factor: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look_ahead, name, 1.0 if factor is None else factor * getattr(look_ahead, name))
    assert not all(near(ratio, 1, 0.065) for ratio in misjudged())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scoring_takes_a_share_of_what_is_free_that_holds_its_peak(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU also what a process holds on to after it was freed. No more than a sixth is left unused beyond that."""
    text = (ROOT / "benchmarks" / "results" / "scoring-cpu.md").read_text(encoding="utf-8")
    peaks = re.search(r"peak (\d+) to (\d+) and (\d+) to (\d+) MiB", text)
    assert peaks
    few, kept, more, kept_more = map(int, peaks.groups())
    worst = 1 / min(misjudged()) * (max(kept / few, kept_more / more) if device == "cpu" else 1)
    monkeypatch.setattr(look_ahead, "free_bytes", lambda device: float(GIB))
    share = look_ahead._budget(torch.device(device)) / GIB
    assert 5 / 6 <= share * worst <= 1
