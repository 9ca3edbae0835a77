"""How much memory a device has free, and how much a computation keeps for its backward pass."""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epsd.compute import distributed
from epsd.types import Batch

SAMPLE = 4
"""Images from which a need is foreseen: BatchNorm wants more than one in half of them."""
GIB = 2**30
_CGROUPS, _PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> float:
    """What can be had without swapping: on a GPU what nobody holds, else what the system has, within the limits
    of the container and of the process.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + held)
    import psutil

    there = float(psutil.virtual_memory().available)
    return min(there, container_bytes(_CGROUPS, _own_groups(_PROCESS)), _address_space())


def share(free: float, device: torch.device) -> float:
    """What each process may take of bytes that are free: all processes of a machine live on those of its CPU."""
    return 0.9 * free if device.type == "cuda" else free / distributed.neighbours()


def _address_space() -> float:
    """What the limit of this process's address space leaves."""
    if sys.platform == "win32":
        return math.inf
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return math.inf
    with contextlib.suppress(OSError, ValueError):
        return max(0.0, most - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def _own_groups(listing: Path) -> list[str]:
    """Paths of the control groups that a process is in, from its /proc/PID/cgroup; [""] where there is none."""
    with contextlib.suppress(OSError):
        return [line.split(":", 2)[2] for line in listing.read_text(encoding="utf-8").splitlines() if ":" in line]
    return [""]


def container_bytes(root: Path, groups: Iterable[str] = ("",)) -> float:
    """What the control groups mounted at `root` leave to this process; infinite without a limit.

    groups : the process's own, below `root`; those around them limit it too (a batch system's job, a service).
        In a container they are often not to be seen, and the mounted root is its own.
    File pages that the kernel would give up at once do not count as used.
    """
    least = float("inf")
    for limit, used, cached, top in (
        ("memory.max", "memory.current", "inactive_file", root),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", root / "memory"),
    ):
        folders = {top}
        for group in groups:
            inner = top / group.strip("/")
            folders |= {folder for folder in (inner, *inner.parents) if folder.is_relative_to(top)}
        for folder in folders:
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / limit).read_text(encoding="utf-8"))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
                left = most - int((folder / used).read_text(encoding="utf-8")) + int(stat.get(cached, 0))
                least = min(least, float(left))
    return least


class Saved:
    """Counts what is saved for a backward pass inside a `with` block.

    `bytes` : of all tensors saved so far, each storage once, those of `given` (weights, images) not at all. Exact
    while the graph is alive: a storage that is freed could be counted again.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in given}
        self._hooks: Any = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.bytes = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


class Line(NamedTuple):
    """Bytes that grow evenly with the images: `fixed`, and `each` per image."""

    fixed: float
    each: float


def lines(count: Callable[[Batch], Sequence[int]], batch: Batch) -> list[Line]:
    """What a computation keeps, foreseen for any number of images: each of the bytes that `count` finds, as a line
    through those of SAMPLE images of `batch` and of half as many.
    """
    small, large = batch.part(slice(SAMPLE // 2)), batch.part(slice(SAMPLE))
    few, many = len(small.labels), len(large.labels)
    pairs = zip(count(small), count(large), strict=True)
    slopes = [(high, max(0, high - low) / (many - few) if many > few else high / many) for low, high in pairs]
    return [Line(max(0.0, high - many * each), each) for high, each in slopes]
