"""The state of every generator that a network may draw from: taken, put back, kept."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """Of every generator that a network may draw from: torch's on the CPU and on its device, Python's, numpy's."""

    cpu: Tensor
    device: Tensor | None
    python: Any
    numpy: Any


def random_state(device: torch.device) -> RandomState:
    """What dropout and stochastic depth on `device` will draw from."""
    kinds: dict[str, Callable[[], Tensor]] = {
        "cuda": lambda: torch.cuda.get_rng_state(device),
        "mps": torch.mps.get_rng_state,
    }
    own = kinds[device.type]() if device.type in kinds else None
    return RandomState(torch.get_rng_state(), own, random.getstate(), np.random.get_state())


def set_random_state(device: torch.device, state: RandomState) -> None:
    """Draw again what was drawn after `state` was taken."""
    torch.set_rng_state(state.cpu)
    if state.device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state.device, device)
    elif state.device is not None:
        torch.mps.set_rng_state(state.device)
    random.setstate(state.python)
    np.random.set_state(state.numpy)


@contextmanager
def keeping_random_state(device: torch.device) -> Iterator[None]:
    """What is drawn in the block leaves no trace."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(device, state)
