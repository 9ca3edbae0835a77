"""Weights that exist, in the network of this run: which of them fit, whose head it is, which mask they bring."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from epsd.compute import networks
from epsd.compute.narrow import narrow_
from epsd.masks import Mask, prunable, shortened
from epsd.types import EpsdError

Head = Literal["auto", "keep", "new"]

_SHOWN = 3


class StartError(EpsdError):
    """Weights that do not go with the network or with what is asked of them."""


class Source(NamedTuple):
    """Weights from elsewhere. `name`: what the user calls them. `state`: tensors by name, on the CPU.

    key : of params.yaml, under which they were named.
    card : what is known of their network (`class_names`, `shapes`, ...); {} for a bare file.  mask : that they were
        trained under, by the same names; None where none lies beside them.
    """

    name: str
    state: Mapping[str, Tensor]
    card: Mapping[str, Any] = {}
    mask: Mask | None = None
    key: str = "start.weights"


class Taken(NamedTuple):
    """What became of a source: parameters that are in the network now, `adapted` ones among them; parameters that are
    drawn; tensors of the source that are left out. `share`: of the network's parameters that were taken, [0, 1].
    """

    source: Source
    taken: list[str]
    adapted: list[str]
    drawn: list[str]
    left: list[str]
    share: float

    def __str__(self) -> str:
        told = f"{self.share:.1%} of the parameters are from {self.source.name}"
        told += f"; other input channels: {shortened(self.adapted, _SHOWN)}" if self.adapted else ""
        told += f"; drawn: {shortened(self.drawn, _SHOWN)} ({1 - self.share:.1%})" if self.drawn else ""
        return told + (f"; left out of it: {shortened(self.left, _SHOWN)}" if self.left else "") + "."


def adapted(weight: Tensor, channels: int) -> Tensor:
    """The kernels (O, I, kh, kw) of a first convolution for images of other channels: (O, channels, kh, kw).

    As timm does it (`adapt_input_conv`): summed for one channel, else repeated in turn and scaled by I / channels.
    """
    inputs = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // inputs), 1, 1)[:, :channels] * (inputs / channels)


def narrow_as(model: nn.Module, source: Source) -> nn.Module:
    """`model` itself, as narrow as the network of `source`; its own classes and input channels stay."""
    own, place, first = model.state_dict(), f"{networks.head(model)}.", _first(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, given in source.card.get("shapes", {}).items():
        shape = list(given)
        if name in own and name.startswith(place):
            shape[0] = own[name].shape[0]
        if name in own and name == first:
            shape[1] = own[name].shape[1]
        shapes[name] = tuple(shape)
    try:
        return narrow_(model, shapes)
    except EpsdError as error:
        raise StartError(f"{source.key}: {source.name} is a narrow network: {error}") from None


def take_(model: nn.Module, source: Source, head: Head, class_names: list[str]) -> Taken:
    """Put the weights of `source` into `model`, in place, wherever they fit; the rest stays drawn.

    head : "keep" its classifier, draw a "new" one, or "auto": keep it where the classes are known to be the same, or
        nothing is known and its shape fits.  class_names : of this run.
    Names may begin with what a wrapper put there (`module.`, `model.`, ...). Raises StartError: nothing fits; a head to
    keep that does not; numbers that are not finite.
    """
    own = model.state_dict()
    source = _renamed(source, own)
    place, first = f"{networks.head(model)}.", _first(model)
    keeps = head == "keep" or (head == "auto" and source.card.get("class_names", class_names) == class_names)
    fits = [name for name, value in own.items() if name in source.state and source.state[name].shape == value.shape]
    turned = _turned(source.state.get(first), own.get(first))
    found = {name: source.state[name] for name in fits if keeps or not name.startswith(place)}
    found |= {} if turned is None else {first: turned}
    _check(model, source, found, head, place)
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    taken = [name for name in sizes if name in found]
    return Taken(
        source,
        taken,
        [first] if turned is not None else [],
        [name for name in sizes if name not in found],
        [name for name in source.state if name not in found],
        sum(sizes[name] for name in taken) / sum(sizes.values()),
    )


def mask_of(model: nn.Module, begun: Taken) -> Mask:
    """The mask that the weights came with, for `model`; where none lay beside them, that of their zeros.

    Layers that it did not cover stay uncovered, those that are drawn are whole. Raises StartError for a mask under
    which these weights were not trained.
    """
    source, keep = begun.source, {}
    for name, weight in prunable(model).items():
        if name not in begun.taken:
            keep[name] = torch.ones(weight.shape, dtype=torch.bool)
            continue
        given = _kept(source, name)
        if given is not None:
            keep[name] = given if given.shape == weight.shape else adapted(given.float(), weight.shape[1]) > 0
    return Mask(keep)


def _kept(source: Source, name: str) -> Tensor | None:
    if source.mask is None:
        return source.state[name] != 0
    given = source.mask.keep.get(name)
    if given is not None and (given.shape != source.state[name].shape or source.state[name][~given].any()):
        raise StartError(f"start.mask: keep: the mask beside {source.name} is not that of its weights ({name}).")
    return given


def _renamed(source: Source, own: Mapping[str, Tensor]) -> Source:
    """By the names that most of the tensors have in the network."""
    heads = {name[: len(name) - len(rest)] for name in source.state for rest in _ends(name) if rest in own}
    best = max(sorted({"", *heads}, key=len), key=lambda head: sum(head + name in source.state for name in own))

    def inner(name: str) -> str:
        return name.removeprefix(best)

    mask = None if source.mask is None else source.mask.renamed(inner)
    return source._replace(state={inner(name): value for name, value in source.state.items()}, mask=mask)


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[depth:]) for depth in range(min(3, len(parts)))]


def _first(model: nn.Module) -> str:
    return next((f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), "")


def _turned(given: Tensor | None, wanted: Tensor | None) -> Tensor | None:
    """The first kernels for this run's channels; None where these fit, or differ otherwise."""
    if given is None or wanted is None or given.dim() != 4 or given.shape == wanted.shape:
        return None
    if (given.shape[0], *given.shape[2:]) != (wanted.shape[0], *wanted.shape[2:]):
        return None
    return adapted(given, wanted.shape[1])


def _check(model: nn.Module, source: Source, found: Mapping[str, Tensor], head: Head, place: str) -> None:
    weights = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    if not any(name in found for name in weights if not name.startswith(place)):
        own = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
        raise StartError(
            f"{source.key}: {source.name} fits nowhere: it has {_shapes(source.state)}, the network {_shapes(own)}."
        )
    if head == "keep" and (gone := [name for name in weights if name.startswith(place) and name not in found]):
        its = _shape(source.state[gone[0]]) if gone[0] in source.state else "nothing of that name"
        raise StartError(
            f"start.head: keep: {gone[0]} does not fit: the network has {_shape(model.get_parameter(gone[0]))}, "
            f"{source.name} has {its}. Use auto or new."
        )
    if odd := [name for name, value in found.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise StartError(f"{source.key}: {source.name}: {odd[0]} holds numbers that are not finite.")
    if not any(found[name].any() for name in weights if name in found):
        raise StartError(f"{source.key}: {source.name}: all weights are zero.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    first = [f"{name} ({_shape(tensor)})" for name, tensor in tensors.items() if tensor.dim() > 1][:_SHOWN]
    return ", ".join(first) + ", ..." if first else "no weights"
