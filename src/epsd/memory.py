"""How much memory a device has free, and how much a computation keeps for its backward pass."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIB = 2**30
_CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> float:
    """What can be had without swapping: on a GPU what nobody holds, else the system's or its container's share."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + held)
    import psutil

    return min(float(psutil.virtual_memory().available), container_bytes(_CGROUPS))


def container_bytes(root: Path) -> float:
    """What the control group mounted at `root` leaves to this process; infinite without a limit.

    File pages that the kernel would give up at once do not count as used.
    """
    for limit, used, cached, folder in (
        ("memory.max", "memory.current", "inactive_file", root),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", root / "memory"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most = int((folder / limit).read_text(encoding="utf-8"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
            return float(most - int((folder / used).read_text(encoding="utf-8")) + int(stat.get(cached, 0)))
    return float("inf")


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
