"""Does a training step fit into the memory of its device? Estimated from a few images, before it is tried."""

import traceback
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from epsd.compute.memory import Saved, free_bytes, lines
from epsd.types import Batch, EpsdError

TRANSIENT = 1.3
"""Peak of a step / what its forward pass keeps: gradients on their way, work space of convolutions. With it the
estimate for ResNet-18 and ResNet-50 is within 15 % of the measured peak; a few hundred MB of work space that do not
grow with the batch are not in it (benchmarks/results/memory-cpu.md)."""
_SHORTAGES = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "Cannot allocate memory")


class OutOfMemory(EpsdError):
    """The batch is too large for the device. The message says which one would fit."""


class Need(NamedTuple):
    """Bytes that a step needs beyond what is allocated: `fixed`, and `each` per image."""

    fixed: int
    each: int

    def of(self, images: int) -> int:
        """Bytes for a batch of `images`."""
        return self.fixed + self.each * images

    def fitting(self, free: int) -> int:
        """The largest batch for `free` bytes: a multiple of 8 where that is above 8; 0 where none fits."""
        images = max(0, free - self.fixed) // max(1, self.each)
        return images - images % 8 if images > 8 else images


def kept(graph: Callable[[], object], model: nn.Module) -> int:
    """Bytes that `graph()` keeps for its backward pass, weights and buffers not counted."""
    with Saved([*model.parameters(), *model.buffers()]) as saved:
        alive = graph()
    del alive
    return saved.bytes


def need(model: nn.Module, graph: Callable[[Batch], object], sample: Batch, copies: int) -> Need:
    """Foreseen from a few images of `sample`, see `memory.lines`.

    graph : batch -> loss.  copies : of the weights that training adds (gradients, momentum, mask).
    """
    (line,) = lines(lambda part: [kept(partial(graph, part), model)], sample)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    pixels = 3 * sample.images[0].numel() * sample.images.element_size()
    return Need(round(line.fixed) + copies * weights, round(TRANSIENT * line.each) + pixels)


def parts(batch: Batch, count: int) -> list[Batch]:
    """A batch in `count` parts as equal as can be (fewer where there are fewer than two images for each)."""
    size = len(batch.labels)
    count = max(1, min(count, size // 2))
    ends = [size * number // count for number in range(count + 1)]
    return [batch.part(slice(ends[n], ends[n + 1])) for n in range(count)] if count > 1 else [batch]


def free(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where nobody knows."""
    return int(free_bytes(device)) if device.type in ("cpu", "cuda") else None


def is_shortage(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORTAGES)


def release(error: BaseException, device: torch.device) -> None:
    """Let go of what the failed step held, so that what is free can be told."""
    traceback.clear_frames(error.__traceback__)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def advice(
    batch_size: int, parts: int, needed: Need, free: int | None, device: torch.device, processes: int = 1
) -> str:
    """The one line for a batch that does not fit. `batch_size`, `needed` and `free`: of one of the `processes`."""
    size = -(-batch_size // parts)
    have = "" if free is None else f", {gigabytes(free)} are free"
    needs = gigabytes(needed.of(size))
    where = f"{device} by each process" if processes > 1 else f"{device}"
    say = f"out of memory: training on {size} images at a time needs about {needs} on {where}{have}."
    fits = min(needed.fitting(free), size - 1) if free is not None else size // 2
    if fits < 2:
        return f"{say} Not even a batch of {2 * processes} fits: take a smaller network, or free memory."
    return (
        f"{say} A batch of {fits * processes} would fit: lower train.batch_size (now {batch_size * processes}), or set "
        f"train.accumulate: {-(-batch_size // fits)} (or auto) to compute it in parts."
    )


def gigabytes(count: float) -> str:
    """`count` bytes in words."""
    return f"{count / 1e9:.2g} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"
