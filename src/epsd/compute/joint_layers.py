"""Layers that look beyond a slice of the batch, or draw numbers for the whole of it, in several processes."""

import contextlib
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from epsd.compute import distributed
from epsd.compute.second_order import Instead, batch_norm


def together() -> contextlib.AbstractContextManager[Any]:
    """Around forward passes: as if this process's slice lay in the whole batch. Nothing where one works alone."""
    return contextlib.nullcontext() if distributed.world() == 1 else _Together()


def _batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    joint = distributed.joint_statistics()
    return batch_norm(*args, **kwargs, joint=True) if joint else F.batch_norm(*args, **kwargs)


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


class _Together(Instead):
    """Catches the two functions that look beyond, or are drawn over, the slice."""

    INSTEAD: ClassVar[dict[Any, Any]] = {F.batch_norm: _batch_norm, F.dropout: _dropout}
