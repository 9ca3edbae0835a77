"""Where and how torch computes: seeds, determinism, device, precision, layout in memory."""

import os
import random
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from epsd.types import Batch, EpsdError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {
    "auto": torch.channels_last,
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}


def reseed(seed: int) -> None:
    """Seed torch on the CPU and on the GPU in use, as `torch.manual_seed` does, within a microsecond.

    That function tells every backend there is, and notes for each from where it was called.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (every device) from one number in [0, 2^63)."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def determinism(enabled: bool = True) -> None:
    """Ask torch for the same bits each time where an operator can (the others run, without a warning each)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    # not `use_deterministic_algorithms`: that one also imports the compiler, a second of start-up for nothing here
    torch.set_deterministic_debug_mode("warn" if enabled else "default")
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (costs time, changes nothing)
    torch.backends.cudnn.benchmark = not enabled


def devices() -> list[str]:
    """The devices of this machine, best first: `cuda` (`cuda:0` ...), `mps`, `cpu`."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    names = ["cuda", *(f"cuda:{index}" for index in range(cuda))] if cuda else []
    return [*names, *(["mps"] if mps else []), "cpu"]


def pick_device(name: str = "auto") -> torch.device:
    """The device that `name` asks for; `auto` is the best one here (cuda, mps, cpu).

    Raises EpsdError for a device that this machine does not have, listing those it has.
    """
    found = devices()
    if name == "auto":
        return torch.device(found[0])
    if name not in found:
        raise EpsdError(f"device: '{name}' is not on this machine. Valid here: auto, {', '.join(found)}.")
    return torch.device(name)


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Machine:
    """What a run works with: decided once, when a stage, a trial, a cell or an analysis opens, and handed on.

    device : of tensors and networks.  threads : of torch, in this process.  workers : processes that decode images
    which are streamed.
    """

    device: torch.device = _CPU
    threads: int = 1
    workers: int = 0


def open_machine(device: str = "auto", threads: int | None = None, workers: int = 0) -> Machine:
    """The machine that the parameters `device`, `threads` (None: as torch has them) and `data.workers` ask for.

    From here on torch keeps to the threads and to `determinism`. Raises EpsdError as `pick_device` does.
    """
    found = pick_device(device)
    if threads:
        torch.set_num_threads(threads)
    determinism()
    return Machine(found, torch.get_num_threads(), workers)


def crowded(threads: int) -> str | None:
    """A line where other programs leave fewer cores than torch has `threads`, which then wait for each other."""
    import psutil

    cores = os.cpu_count() or 1
    busy = cores * psutil.cpu_percent(_A_LOOK) / 100
    free = max(1, round(cores - busy))
    if threads <= free:
        return None
    return f"other programs keep {busy:.1f} of {cores} cores busy: threads: {free} may be faster than {threads}."


_A_LOOK = 0.1
"""Seconds."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` on `device`; no copy where it is there already."""
    partner = None if batch.partner is None else batch.partner.to(device)
    return Batch(batch.images.to(device), batch.labels.to(device), batch.indices.to(device), partner)


def _computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: on a processor only with instructions of its own (AVX-512 BF16, AMX)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_memory_format(name: str, model: nn.Module, device: torch.device) -> torch.memory_format:
    """The layout of images and convolution weights in memory for `auto | channels_last | contiguous`.

    `auto` is channels_last: the convolutions of every device run faster on it, or as fast; contiguous for a network
    that must not be laid out so (`breaks_channels_last`). Raises EpsdError for another name, and where channels_last is
    asked for such a network.
    """
    if name not in MEMORY_FORMATS:
        raise EpsdError(f"memory_format: unknown '{name}'. Valid: {', '.join(MEMORY_FORMATS)}.")
    if device.type != "cpu" or (layer := breaks_channels_last(model)) is None:
        return MEMORY_FORMATS[name]
    if name == "channels_last":
        raise EpsdError(
            f"memory_format: with channels_last the processor's kernels would write past the memory of '{layer}', "
            f"a 1x1 convolution with a stride and under {_REGISTER} channels. Use auto or contiguous."
        )
    return torch.contiguous_format


def breaks_channels_last(model: nn.Module) -> str | None:
    """The first layer of `model` for whose weight's gradient a processor's kernel writes past its memory, if any.

    It does (oneDNN issue 6035, seen with AVX2 in torch 2.14.1: crashes, or wrong gradients) in channels_last where a
    1x1 kernel has a stride and fewer channels to read than a vector register has floats: 8 with AVX2, 16 with AVX-512.
    """
    kernels = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    pointwise = ((name, layer) for name, layer in kernels if set(layer.kernel_size) == {1} and max(layer.stride) > 1)
    return next((name for name, layer in pointwise if layer.in_channels < _REGISTER), None)


_REGISTER = 16


def pick_precision(name: str, device: torch.device, key: str = "precision") -> torch.dtype | None:
    """The autocast dtype for `auto | fp32 | bf16 | fp16`; None means plain fp32.

    `auto` is bf16 on a GPU or processor that computes in it, else fp32. Raises EpsdError, which begins with `key`,
    where the device has not the type.
    """
    if name == "auto":
        return torch.bfloat16 if _computes_in_bf16(device) else None
    if name not in PRECISIONS:
        raise EpsdError(f"{key}: unknown '{name}'. Valid: auto, {', '.join(PRECISIONS)}.")
    if name == "fp16" and device.type == "cpu":
        raise EpsdError(f"{key}: fp16 needs a GPU; on the CPU use auto, fp32 or bf16.")
    return PRECISIONS[name]
