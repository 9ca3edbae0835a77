"""What every loop asks of a network: is it ready, which of its modules rest, in which type are its weights."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from epsd.types import EpsdError


class NetworkError(EpsdError):
    """A network that cannot be scored, trained or judged as it is."""


def check(model: nn.Module) -> None:
    """NetworkError where layers have no weights yet: an optimiser cannot hold them, and a test would draw them."""
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise NetworkError(f"the network has no weights yet ({lazy[0]}, ...): pass one batch through it first.")


LONELY = "as BatchNorm has no variance of one value (one image, or one in a part)"


def is_lonely(error: ValueError) -> bool:
    """Whether a BatchNorm in train mode refused a single value per channel."""
    return "Expected more than 1 value per channel" in str(error)


def as_weights(images: Tensor, model: nn.Module) -> Tensor:
    """Images in the type of the weights: a double network takes what a loader gives in single precision."""
    return images.to(weight_type(model)) if images.is_floating_point() else images


def weight_type(model: nn.Module) -> torch.dtype:
    """Of the first weights of a network."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def head(model: nn.Module) -> str:
    """Name of the layer that gives the logits: the last one with weights, in the order in which a network names them.

    NetworkError where no layer is linear or a convolution.
    """
    layers: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise NetworkError("the network has no linear layer and no convolution that could be its head.")
    return layers[-1]


def resting(model: nn.Module) -> list[nn.Module]:
    """Modules that stay in eval mode while the rest trains: the user put them there, and nothing in them is trainable.

    A BatchNorm that is frozen so goes on normalising by its running statistics. Of a module without parameters, such
    as dropout, the mode counts where the network itself is in train mode: else all of it was merely evaluated before.
    """

    def rests(module: nn.Module) -> bool:
        parameters = list(module.parameters())
        frozen = not any(parameter.requires_grad for parameter in parameters)
        return not module.training and frozen and (model.training or bool(parameters))

    return [module for module in model.modules() if module is not model and rests(module)]


def train_(model: nn.Module, rest: Iterable[nn.Module]) -> None:
    """Train mode, in place, for all modules but those that `rest`."""
    model.train()
    for module in rest:
        module.training = False


def evaluated(model: nn.Module, images: Tensor) -> Any:
    """What `model` gives in evaluation mode, without a graph; the mode of each module is what it was afterwards."""
    with in_mode(model), torch.no_grad():
        return model(images)


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Each function after every forward pass of its module, inside the block only."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention in the products that it consists of, without kernels that merge them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def in_mode(model: nn.Module, *, train: bool = False) -> Iterator[None]:
    """Train mode (but for what rests) or eval mode in the block; each module has its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        if train:
            train_(model, resting(model))
        else:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
