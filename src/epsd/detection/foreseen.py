"""What a training of a detector will take, seen on two pictures before it begins: memory and time."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from epsd.compute import distributed, shortage, timing
from epsd.compute.memory import Saved, share
from epsd.compute.speed import resident
from epsd.detection.pictures import Pictures, Sample, moved_to
from epsd.project.runtime import note
from epsd.voc.scenes import Scene

PEAK = 2.2
"""Peak of a step / what its forward pass keeps, beyond the pictures: measured for Faster R-CNN around a ResNet-8 on
pictures of 320 px (benchmarks/results/photos-cpu.md), as the next two."""
KEPT = 1.5
"""What a training on a CPU may hold between steps / peak of a step. Freed memory is kept, for two thirds of the time;
pictures of many shapes would let it grow without end (to 4 such peaks in 100 steps)."""
BEYOND = 1.0
"""What a step takes beyond that, likewise: at worst nothing of it fits into the gaps (4.5 GB of the same)."""
LONG = 600.0
"""Seconds of training from which it is told how long it will take."""
LARGE = 0.5
"""Share of the free memory from which it is told how much is needed."""
TRIALS = 3
"""Passes that are timed. The quickest counts: what else runs makes the others slower."""
BUSY = 0.1
"""Share of the processors' time that others take, from which it is told."""


class Trial(NamedTuple):
    """Of one picture, forwards and backwards: bytes kept for the backward pass, seconds."""

    bytes: float
    seconds: float


class Need(NamedTuple):
    """Bytes: what a step adds; on a CPU, what this process may hold between steps, and at its peak."""

    step: float
    kept: float
    peak: float

    @classmethod
    def of(cls, step: float, held: float, room: float | None) -> "Need":
        """Where `held` are held already, and `room` may be added."""
        between = KEPT * step if room is None else max(0.0, min(KEPT * step, room - BEYOND * step))
        return cls(step, held + between, held + between + BEYOND * step)


def tried(detector: nn.Module, samples: Sequence[Sample], device: torch.device, precision: torch.dtype | None) -> Trial:
    """One pass. Nothing of it stays: neither statistics nor gradients nor drawn random numbers.

    On one thread of a CPU the seconds are those of the processor (`epsd.compute.timing`).
    """
    images, targets = moved_to(samples, device)
    buffers = [(buffer, buffer.clone()) for buffer in detector.buffers()]
    gpus = [device] if device.type == "cuda" else []
    clock = timing.clock_for(torch.get_num_threads(), device)
    started = clock()
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
    return Trial(saved.bytes / len(samples), (clock() - started) / len(samples))


def extremes(scenes: Sequence[Scene]) -> list[int]:
    """Positions of the narrowest and of the widest picture: the batch that holds both is padded the most."""
    order = sorted(range(len(scenes)), key=lambda at: scenes[at].width / scenes[at].height)
    return list(dict.fromkeys([order[0], order[-1]]))


def check(
    detector: nn.Module,
    pictures: Pictures,
    device: torch.device,
    precision: torch.dtype | None,
    *,
    batch_size: int,
    passes: int,
) -> Need:
    """Tell what training will take where that is much. `passes`: of single pictures, in all.

    Raises OutOfMemory on a CPU, which gives no second chance, where a step will not fit into memory.
    """
    processes = distributed.world()
    mine = -(-batch_size // processes)
    held, free, load = resident(), shortage.free(device), timing.others_load()
    samples = [pictures[at] for at in extremes(pictures.scenes)[:batch_size]]
    with distributed.alone():
        trial = tried(detector, samples, device, precision)
        seconds = trial.seconds
        if seconds * passes / processes > LONG:  # a first pass is slow, and these pictures are the largest
            some = [pictures[0], pictures[len(pictures) // 2]][:batch_size]
            seconds = min(tried(detector, some, device, precision).seconds for _ in range(TRIALS))
    room = None if free is None else share(free, device)
    need = Need.of(mine * (trial.bytes * PEAK + pictures.largest), held + pictures.bytes, room)
    told = f"a step on {mine} pictures needs about {shortage.gigabytes(need.step)}"
    if device.type == "cpu":
        told += f", the whole stage up to {shortage.gigabytes(need.peak)}"
    if room is not None:
        told += f", {shortage.gigabytes(room)} are free"
    if room is not None and need.step > room and device.type == "cpu":
        raise shortage.OutOfMemory(f"detect: out of memory: {told}. {ADVICE}")
    total, taken = seconds * passes / processes, load()
    long = total > LONG * (1 - taken)
    if distributed.is_main() and (long or (room is not None and need.peak - held > LARGE * room)):
        others = f" (without the others, which take {taken:.0%} of the processors)" if taken > BUSY else ""
        note(f"detect: foreseen: {seconds * mine:.2g} s for a step, {duration(total)} in all{others}; {told}.")
    return need


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
