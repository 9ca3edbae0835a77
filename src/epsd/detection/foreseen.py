"""What a training of a detector will take, seen on two pictures before it begins: memory and time."""

from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from epsd.compute import distributed, shortage
from epsd.compute.memory import Saved, share
from epsd.detection.pictures import Pictures, Sample, moved_to
from epsd.project.runtime import note

PICTURES = 2
"""Pictures of the trial: batch normalisation wants more than one. The largest ones count."""
PEAK = 2.2
"""Peak of a step / what its forward pass keeps, beyond 0.15 GB: measured for Faster R-CNN around a ResNet-8 on eight
pictures of 320x240 (1.1 GB). A whole stage on pictures of many sizes peaks higher (of the same at 5.5 GB)."""
LONG = 600.0
"""Seconds of training from which it is told how long it will take."""
LARGE = 0.5
"""Share of the free memory from which it is told how much a step needs."""


class Trial(NamedTuple):
    """Of one picture, forwards and backwards: bytes kept for the backward pass, seconds."""

    bytes: float
    seconds: float


def tried(detector: nn.Module, samples: Sequence[Sample], device: torch.device, precision: torch.dtype | None) -> Trial:
    """One pass. Nothing of it stays: neither statistics nor gradients nor drawn random numbers."""
    images, targets = moved_to(samples, device)
    buffers = [(buffer, buffer.clone()) for buffer in detector.buffers()]
    gpus = [device] if device.type == "cuda" else []
    started = perf_counter()
    try:
        with torch.random.fork_rng(gpus), Saved([*detector.parameters(), *detector.buffers()]) as saved:
            with torch.autocast(device.type, precision, enabled=precision is not None):
                losses: dict[str, Tensor] = detector(images, targets)
            torch.stack(list(losses.values())).float().sum().backward()  # type: ignore[no-untyped-call]
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        detector.zero_grad(set_to_none=True)
    return Trial(saved.bytes / len(samples), (perf_counter() - started) / len(samples))


def check(
    detector: nn.Module,
    pictures: Pictures,
    device: torch.device,
    precision: torch.dtype | None,
    *,
    batch_size: int,
    passes: int,
) -> None:
    """Tell what training will take where that is much. `passes`: of single pictures, in all.

    Raises OutOfMemory on a CPU, which gives no second chance, where a step will not fit into memory.
    """
    count = min(PICTURES, batch_size, len(pictures))
    largest = sorted(range(len(pictures)), key=lambda at: -pictures.scenes[at].width * pictures.scenes[at].height)
    samples = [pictures[at] for at in largest[:count]]
    processes = distributed.world()
    mine = -(-batch_size // processes)
    with distributed.alone():
        trial = tried(detector, samples, device, precision)
        if trial.seconds * passes / processes > LONG:  # a first pass is slow
            trial = trial._replace(seconds=tried(detector, samples, device, precision).seconds)
    bytes_, seconds = trial.bytes * PEAK * mine, trial.seconds * passes / processes
    free = shortage.free(device)
    room = None if free is None else share(free, device)
    told = f"a step on {mine} pictures needs about {shortage.gigabytes(bytes_)}" + (
        f", {shortage.gigabytes(room)} are free" if room is not None else ""
    )
    if room is not None and bytes_ > room and device.type == "cpu":
        raise shortage.OutOfMemory(f"detect: out of memory: {told}. {ADVICE}")
    if distributed.is_main() and (seconds > LONG or (room is not None and bytes_ > LARGE * room)):
        note(f"detect: foreseen: {trial.seconds * mine:.2g} s for a step, {duration(seconds)} in all; {told}.")


ADVICE = (
    "Lower detect.batch_size or detect.detector.size, or take a coarser detect.detector.finest_stride (auto goes by "
    "the boxes)."
)
"""What to do about a step that does not fit into memory."""


def duration(seconds: float) -> str:
    """In words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
