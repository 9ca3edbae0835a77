"""Layers that look beyond a slice of the batch, or draw numbers for the whole of it, in several processes."""

import contextlib
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from epsd.compute import distributed
from epsd.compute.second_order import joint_batch_norm


def together() -> contextlib.AbstractContextManager[Any]:
    """Around forward passes: as if this process's slice lay in the whole batch. Nothing where one works alone."""
    return contextlib.nullcontext() if distributed.world() == 1 else _Together()


def _batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    return joint_batch_norm(*args, **kwargs) if distributed.joint_statistics() else F.batch_norm(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`F.dropout` with this slice's part of the units that the whole batch would lose."""
    if not training or not 0 < p < 1:
        return F.dropout(input, p, training, inplace)
    whole = input.new_ones(len(input) * distributed.world(), *input.shape[1:])
    if input.ndim == 4 and not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        whole = whole.contiguous(memory_format=torch.channels_last)  # the units are drawn in the order of memory
    kept = torch.native_dropout(whole, p, True)[0]
    result = input * kept[distributed.share(len(kept))]
    return input.copy_(result) if inplace else result


class _Together(TorchFunctionMode):
    """Catches the two functions that look beyond, or are drawn over, the slice."""

    _JOINT: ClassVar[dict[Any, Any]] = {F.batch_norm: _batch_norm, F.dropout: _dropout}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._JOINT.get(func, func)(*args, **(kwargs or {}))
