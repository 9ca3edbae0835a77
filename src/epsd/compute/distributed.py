"""Several processes that work as one, on one machine or several: torchrun's environment, PyTorch's DDP.

Every process draws the same global batch (its order and augmentation depend on (seed, epoch) alone) and takes its
slice of it, the r-th of W. DDP averages the gradients; BatchNorm takes its statistics over all slices and dropout
keeps the same units as on the whole batch (`epsd.compute.joint_layers`). So W processes give the weights of one, to
rounding, with any objective whose loss is a mean over the batch. One process alone takes none of these paths.

Noise drawn in other ways than by `F.dropout` (stochastic depth) is drawn alike on every slice.
"""

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from epsd.compute.devices import pick_device
from epsd.types import Batch, Batches, BatchNeeds, EpsdError


class ParallelError(EpsdError):
    """Processes, devices and batch sizes that do not fit each other; a process that is gone."""


class _Group(NamedTuple):
    """This process among the others. `store`: a small dictionary that all of them see."""

    rank: int
    world: int
    sync_batchnorm: bool
    store: Any


_ALONE = _Group(0, 1, False, None)
_group = _ALONE

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL error")

RENDEZVOUS = "EPSD_RENDEZVOUS"
"""Set by `epsd.pipeline.launch`: the file through which the processes of one machine find each other."""


def rank() -> int:
    """Which of the processes this is, from 0."""
    return _group.rank


def world() -> int:
    """How many processes work as one."""
    return _group.world


def is_main() -> bool:
    """True in the one process that writes files, tracks and talks; also where it is the only one."""
    return _group.rank == 0


def told() -> int:
    """How many processes the environment speaks of, before `start`; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def neighbours() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _group.world > 1 else 1


def told_rank() -> int:
    """Which of them this is to be."""
    return int(os.environ["RANK"]) if told() > 1 else 0


def start(device: str = "auto", sync_batchnorm: bool = True) -> None:
    """Join the other processes that torchrun (or `epsd.pipeline.launch`) started; nothing where there is one alone.

    device : as in params.yaml; on a GPU each process of a machine takes its own (nccl), on the CPU they talk by gloo.
    sync_batchnorm : BatchNorm takes its statistics over the whole batch, as one process does.

    Raises ParallelError: more processes on this machine than GPUs, or a device that they cannot share out.
    """
    global _group
    if told() == 1 or _group is not _ALONE:
        return
    gpu = on_gpus(device)
    check_devices(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    path = os.environ.get(RENDEZVOUS)
    store: Any = FileStore(path, told()) if path else next(rendezvous("env://"))[0]
    dist.init_process_group(backend, store=PrefixStore("epsd", store), rank=told_rank(), world_size=told())
    _group = _Group(dist.get_rank(), dist.get_world_size(), sync_batchnorm, store)


def stop() -> None:
    """Leave the others in peace, after the last common step."""
    global _group
    if _group is not _ALONE:
        torch.distributed.destroy_process_group()
        _group = _ALONE


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In this block every process works as if it were the only one."""
    global _group
    before, _group = _group, _ALONE
    try:
        yield
    finally:
        _group = before


def first_to_fail() -> bool:
    """True in the one process that may tell the user why all of them end; also where it is the only one.

    Before `start`, in one process of each machine.
    """
    if _group is _ALONE:
        return told() == 1 or os.environ.get("LOCAL_RANK") == "0"
    with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone: it has told
        return bool(_group.store.add("failed", 1) == 1)
    return False


def lost(error: BaseException) -> bool:
    """Whether `error` says no more than that another process is gone."""
    return _group is not _ALONE and isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)


def joint_statistics() -> bool:
    """Whether BatchNorm in train mode looks at the slices of all processes."""
    return _group.world > 1 and _group.sync_batchnorm


def on_gpus(device: str) -> bool:
    """Whether the processes compute on GPUs, where params.yaml says `device`."""
    return torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))


def check_devices(device: str, processes: int) -> None:
    """ParallelError where `processes` of this machine cannot each have a device."""
    if processes == 1:
        return
    if device not in ("auto", "cpu", "cuda"):
        raise ParallelError(f"device: '{device}' is one device; with {processes} processes use auto, cuda or cpu.")
    if device == "auto" and pick_device().type == "mps":
        raise ParallelError(f"device: {processes} processes cannot share the GPU of a Mac; set device: cpu.")
    count = torch.cuda.device_count() if on_gpus(device) else processes
    if processes > count:
        raise ParallelError(
            f"launch.processes: {processes} processes need a GPU each, this machine has {count}. "
            f"Use at most {count}, or auto."
        )


# --- tensors over processes -------------------------------------------------------------------------------------------


def sum_(tensors: Iterable[Tensor]) -> None:
    """Add up over the processes, in place, all tensors of a type in one message."""
    if _group.world == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in kinds.values():
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
        torch.distributed.all_reduce(flat)
        pieces = torch.split(flat, [tensor.numel() for tensor in group])
        with torch.no_grad():
            for tensor, piece in zip(group, pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))


def mean_(tensors: Iterable[Tensor]) -> None:
    """Average over the processes, in place."""
    if _group.world == 1:
        return
    tensors = list(tensors)
    sum_(tensors)
    with torch.no_grad():
        torch._foreach_div_(tensors, _group.world)


def gather(tensor: Tensor) -> Tensor:
    """(b, ...) of every process, equal shapes -> (W · b, ...) in the order of the global batch."""
    if _group.world == 1:
        return tensor
    mine = tensor.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in range(_group.world)]
    torch.distributed.all_gather(parts, mine)
    return torch.cat(parts)


def least(number: float) -> float:
    """The smallest of the processes' numbers, in all of them."""
    return (
        number
        if _group.world == 1
        else float(gather(torch.tensor([number], dtype=torch.float64, device=_device())).min())
    )


def interleaved(items: list[Any]) -> list[Any]:
    """Of lists whose n-th item belongs to place rank + n · W of the whole: the whole, in every process."""
    if _group.world == 1:
        return items
    lists: list[Any] = [None] * _group.world
    torch.distributed.all_gather_object(lists, items)
    return [lists[place % _group.world][place // _group.world] for place in range(sum(map(len, lists)))]


def share(count: int) -> slice:
    """This process's positions in a global batch of `count`."""
    return slice(count * _group.rank // _group.world, count * (_group.rank + 1) // _group.world)


def part(batch: Batch) -> Batch:
    """This process's slice of a global batch."""
    return batch.part(share(len(batch.labels)))


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Give every process the tensors of the main one, in place."""
    if _group.world > 1:
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            torch.distributed.broadcast(sent, 0)
            with torch.no_grad():
                tensor.copy_(sent)


def agree(number: int) -> bool:
    """Whether all processes came with the same number."""
    if _group.world == 1:
        return True
    numbers = gather(torch.tensor([number], device=_device()))
    return bool((numbers == number).all())


def _device() -> torch.device:
    gpu = "nccl" in torch.distributed.get_backend()
    return torch.device("cuda" if gpu else "cpu")


# --- batches ----------------------------------------------------------------------------------------------------------


def check_batch(size: int, key: str, processes: int) -> None:
    """ParallelError where a batch of `size` (the parameter `key`) cannot be split evenly."""
    if size % processes:
        raise ParallelError(
            f"{key}: {size} cannot be split evenly over {processes} processes. Use a multiple of {processes}."
        )


def shard(batches: Batches, *, even: bool = False) -> Batches:
    """This process's slice of every batch; `size` and length stay those of the whole.

    `even`: every slice must have the same length, as a mean over slices demands. Raises ParallelError where they have
    not.
    """
    if _group.world == 1:
        return batches
    for length in batches.lengths() if even and hasattr(batches, "lengths") else ():
        check_batch(length, "the batch size", _group.world)
    if not hasattr(batches, "shard"):
        return _Slices(batches, even)
    sharded: Batches = batches.shard(share)
    return sharded


class _Slices:
    """Slices of batches that are drawn whole."""

    def __init__(self, whole: Batches, even: bool) -> None:
        self._whole, self._even = whole, even
        self.size, self.num_classes = whole.size, whole.num_classes

    def __len__(self) -> int:
        return len(self._whole)

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        """See `epsd.types.Batches`."""
        for count, batch in enumerate(self._whole.epoch(number, needs)):
            if not count and not agree(int(batch.indices.sum())):
                raise ParallelError(
                    "the processes drew different batches. Each needs the same DataLoader, without a "
                    "DistributedSampler: it takes its share of every batch by itself."
                )
            if self._even:
                check_batch(len(batch.labels), "a batch of the DataLoader", _group.world)
            mine = part(batch)
            if len(mine.labels):
                yield mine


# --- networks ---------------------------------------------------------------------------------------------------------


def wrapped(model: nn.Module) -> nn.Module:
    """`model` as DDP calls it: gradients are averaged over the processes while the backward pass goes on.

    All processes start from the main one's weights. The model itself alone.
    """
    if _group.world == 1:
        return model
    kind: Any = nn.parallel.DistributedDataParallel
    if isinstance(model, kind):
        model = model.module  # other weights are trained from here on
    name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in inspect.signature(kind).parameters)
    wrapper: nn.Module = kind(model, **{name: False})
    return wrapper


def check_used(model: nn.Module) -> None:
    """After a backward pass: ParallelError where a weight took no part in the loss, which DDP would wait for."""
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if _group.world > 1 and unused:
        others = f", nor do {len(unused) - 1} others" if len(unused) > 1 else ""
        raise ParallelError(
            f"launch.processes: {unused[0]} takes no part in the loss{others}. Several processes need every "
            "trainable weight in it: freeze such weights (requires_grad_(False)), or use one process."
        )


def unsynced(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Around a pass through `wrapped` whose gradients wait for the next one's before they are averaged."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def settle_buffers(model: nn.Module) -> None:
    """Average running statistics that each process kept for itself (without sync_batchnorm)."""
    if _group.world > 1 and not _group.sync_batchnorm:
        mean_([buffer for buffer in model.buffers() if buffer.is_floating_point()])


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """While training on GPUs, plain BatchNorm layers run as `nn.SyncBatchNorm`, whose kernels are fused.

    Other kinds (with an activation inside), and all of them on a CPU, are caught by `epsd.compute.joint_layers`.
    """
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    swapped: list[tuple[nn.Module, type]] = []
    if _group.world > 1 and _group.sync_batchnorm and next(model.parameters()).is_cuda:
        swapped = [(module, type(module)) for module in model.modules() if type(module) in plain]
    for module, _ in swapped:
        module.__class__ = nn.SyncBatchNorm
        module.process_group = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind in swapped:
            del module.process_group
            module.__class__ = kind
