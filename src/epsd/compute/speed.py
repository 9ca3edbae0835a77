"""What makes a training step fast on the device at hand: how weights are updated, compilation, who keeps memory."""

import contextlib
import ctypes
import importlib.util
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from epsd.types import EpsdError

if TYPE_CHECKING:
    from epsd.project.recipes import Compile, Optimiser, Update

_FUSING = {"cpu", "cuda", "mps"}
_MODES = {"kernels": "default", "graphs": "reduce-overhead"}


class AccelerationError(EpsdError):
    """This machine cannot do what `train.update` or `train.compile` asks for."""


def pick_update(name: "Update", device: torch.device) -> "Update":
    """How the optimiser and the mask go over all parameters of a step.

    "fused" : one kernel reads and writes each weight once.  "foreach" : one call per operation for all weights.
    "loop" : one call per operation and weight.  "auto" : fused where torch has such a kernel (cpu, cuda, mps), else
    foreach. All compute the same update; the last bits may differ.

    Raises AccelerationError where the device has no fused kernel.
    """
    if name == "auto":
        return "fused" if device.type in _FUSING else "foreach"
    if name == "fused" and device.type not in _FUSING:
        raise AccelerationError(f"train.update: torch has no fused kernel for {device.type}; use foreach or auto.")
    return name


def _unwrapped(kind: type[torch.optim.Optimizer]) -> Any:
    """An optimiser without torch's wrappers for compiled ones: the first call of any of them imports the compiler,
    which takes a second and is used by nothing here (`train.compile` compiles the network, never the optimiser).
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


_OPTIMISERS = {"sgd": _unwrapped(torch.optim.SGD), "adamw": _unwrapped(torch.optim.AdamW)}


def optimiser(name: "Optimiser", groups: Iterable[Any], update: "Update", **settings: Any) -> torch.optim.Optimizer:
    """torch's SGD or AdamW over parameters or groups of them. `update` : "fused", "foreach" or "loop"."""
    fused = update == "fused"
    made: torch.optim.Optimizer = _OPTIMISERS[name](
        groups, **settings, fused=fused, foreach=None if fused else update == "foreach"
    )
    return made


def lay_out_(model: nn.Module, layout: torch.memory_format) -> None:
    """Put the convolution weights of `model` into a memory format, in place.

    `nn.Module.to` would turn every parameter of four dimensions, also one that is no kernel.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.to(memory_format=layout)


def align_(optimiser: torch.optim.Optimizer) -> None:
    """Lay the optimiser's tensors out in memory as their parameters are.

    A checkpoint holds them contiguous; a fused kernel reads parameter and momentum side by side, in memory order.
    """
    for parameter, state in optimiser.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def compiled(model: nn.Module, choice: "Compile", device: torch.device) -> nn.Module:
    """`model` itself, or a compiled stand-in that shares its weights, buffers and mode.

    "kernels" : operations are merged into kernels of their own (a minute of work at the first step).  "graphs" : also
    recorded as CUDA graphs, so that no step waits for Python.  "auto" : "none" here; a training of an hour or more
    tries "kernels" (`epsd.training.autotune`). On a CPU compilation costs half a minute and gains nothing over
    channels_last with bf16 (benchmarks/results/training-cpu.md).

    Raises AccelerationError where the compiler is missing, or for "graphs" without a CUDA device.
    """
    if choice in ("auto", "none"):
        return model
    if choice == "graphs" and device.type != "cuda":
        raise AccelerationError(f"train.compile: CUDA graphs need a CUDA device, this is {device.type}. Use kernels.")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise AccelerationError("train.compile: on a GPU this needs the package triton. Install it, or use none.")
    result: nn.Module = torch.compile(model, mode=_MODES[choice])  # type: ignore[assignment]
    return result


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep what it frees instead of handing it back to the system, which clears every page of it anew.

    A training step on a CPU frees and takes its activations again and again: measured for ResNet-18, 6 % of a step in
    bf16 and 13 % in fp32, for a peak up to a tenth higher, and a third of the time of EPSD's score, for a peak up to a
    sixth higher. `keep` False: about as a process starts. Needs the C library of GNU; False where there is another.
    """
    top_of_heap, blocks_of_their_own = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trimmed, mapped = (2**31 - 1, 0) if keep else (2**26, 2**16)
        return bool(mallopt(top_of_heap, trimmed) and mallopt(blocks_of_their_own, mapped))
    return False


def resident() -> int:
    """Bytes of memory that this process holds."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def give_back(above: float) -> None:
    """Hand freed memory back to the system where this process holds more than `above` bytes.

    What is kept (`keep_freed_memory`) grows where tensors of many shapes come and go: few fit into the gaps of others.
    Needs the C library of GNU; nothing happens where there is another.
    """
    if resident() > above:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
