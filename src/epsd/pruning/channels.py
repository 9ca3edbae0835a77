"""Channels that go before training: which stand or fall together, what each is worth and costs, and the cut.

A **group** is a set of channels that residual sums, norms and depthwise convolutions couple: one channel of it is an
output of one or several layers and an input of others, its **consumers**. Groups come from Torch-Pruning's dependency
graph (Fang et al., "DepGraph", CVPR 2023).

The **gate** g of a channel multiplies what its consumers see; at θ₀ that is the same as multiplying the consumers'
input slices. Its derivative through the look-ahead is the channel's score,

    |∂L_i/∂g_c| = |Σ over the consumers' input slices of channel c of θ_init ⊙ λ|,

with λ the adjoint of `epsd.pruning.metagradients`. The derivative with respect to a filter's own mask would be of no
use: in front of BatchNorm the loss does not depend on the filter's scale.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from epsd.compute.narrow import narrow_, shapes_of
from epsd.compute.networks import evaluated, hooked
from epsd.masks import shortened
from epsd.types import EpsdError, Scores

Allocation = Literal["uniform", "cost", "random"]
Kept = dict[str, Tensor]
"""Group -> positions of the channels that stay, ascending, int64."""


class ChannelError(EpsdError):
    """A network that cannot be cut, or not to the size that is asked for."""


class Slice(NamedTuple):
    """Where a group's channels lie along one dimension of a weight.

    weight : parameter name.  dim : 0 or 1.  place, channel : (n,) entry `place[i]` belongs to channel `channel[i]`.
    """

    weight: str
    dim: int
    place: Tensor
    channel: Tensor


@dataclass(frozen=True)
class Group:
    """Channels of one width. `name`: the first layer that makes them. `blocks`: they are kept in equal numbers from so
    many equal runs (grouped convolutions). `made`, `seen`: slices of the weights that make and that consume them.
    `normed`: a LayerNorm or GroupNorm runs over them, so that what stays is normalised by less: there, unlike behind a
    BatchNorm, the cut network is not quite the gated one.
    """

    name: str
    size: int
    blocks: int
    made: tuple[Slice, ...]
    seen: tuple[Slice, ...]
    normed: bool


class Structure:
    """The groups of a network and its multiply-adds as a function of their widths.

    Parameters
    ----------
    model : left as it is; a copy is traced.
    image_shape : (C, H, W) of its input, or another shape without the batch.

    `groups` : by name, in the order of the network. `whole` : layers that keep all their channels, and why.
    Raises ChannelError where nothing can be cut.
    """

    def __init__(self, model: nn.Module, image_shape: tuple[int, ...]) -> None:
        self._shape = image_shape
        self._weights = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._places = {name: place for place, name in enumerate(self._weights)}
        self._uses = _uses(model, image_shape)
        traced = _Traced(model, image_shape)
        found = [group for name in traced.roots() if (group := self._group(name, traced))]
        self.groups = {group.name: group for group in found}
        self.whole: dict[str, str] = {}
        for name, reason in self._failing(model).items():
            self.whole[name] = reason
            del self.groups[name]
        if not self.groups:
            told = self.left_whole() or "no layer feeds another"
            raise ChannelError(f"no channels of this network can be cut ({told}). Use prune.structure: weights.")

    def left_whole(self) -> str:
        """For a message: the layers that keep all their channels, by the reason why."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.whole.items():
            by_reason.setdefault(reason, []).append(name)
        return "; ".join(f"{shortened(names, 3)}: {reason}" for reason, names in by_reason.items())

    def _group(self, root: str, traced: "_Traced") -> Group | None:
        made: list[Slice] = []
        seen: list[Slice] = []
        blocks, normed = 1, False
        for dep, places, channels in traced.items(root):
            module = dep.target.module
            normed |= isinstance(module, nn.LayerNorm | nn.GroupNorm)
            if not isinstance(module, _MAKERS):
                continue
            weight = f"{traced.names[module]}.weight"
            depthwise, grouped = _grouping(module)
            inwards = traced.is_input(dep) and not depthwise
            dim = (1 if inwards else 0) if not isinstance(module, _TRANSPOSED) else (0 if inwards else 1)
            part = Slice(weight, dim, torch.tensor(places), torch.tensor(channels))
            (seen if inwards else made).append(part)
            blocks = math.lcm(blocks, grouped)
        if not seen:  # its channels are the network's outputs
            return None
        size = int(max(part.channel.max() for part in made)) + 1
        return Group(root, size, blocks, tuple(made), tuple(seen), normed)

    def _failing(self, model: nn.Module) -> dict[str, str]:
        """Groups that cannot be made narrower, with the reason; all are tried together first."""
        if self._tried(model, self.groups) is None:
            return {}
        return {name: reason for name, group in self.groups.items() if (reason := self._tried(model, {name: group}))}

    def _tried(self, model: nn.Module, groups: Mapping[str, Group]) -> str | None:
        """Why the network does not run with half of the channels of `groups`; None where it does."""
        kept = {name: torch.arange(group.size) for name, group in self.groups.items()}
        for name, group in groups.items():
            kept[name] = _first_of_blocks(group, max(1, group.size // group.blocks // 2))
        try:
            with torch.no_grad():
                images = torch.zeros(2, *self._shape)
                wanted, got = (_evaluated(net, images) for net in (model, cut(model, self._shape, kept)))
        except Exception as error:
            return f"made narrower, the network does not run ({' '.join(str(error).split())[:120]})"
        return None if got.shape == wanted.shape else "the number of the network's outputs follows it"

    def macs(self, widths: Mapping[str, int]) -> int:
        """Multiply-adds of one image in convolutions and linear layers, with so many channels in each group."""
        size = {name: list(shape) for name, shape in self._weights.items()}
        for name, group in self.groups.items():
            for part in (*group.made, *group.seen):
                each = len(part.place) // group.size
                size[part.weight][part.dim] -= _per_entry(each * (group.size - widths[name]), part, self._uses)
        return sum(use.positions * math.prod(size[name]) for name, use in self._uses.items())

    def dense(self) -> dict[str, int]:
        """The widths of the whole network."""
        return {name: group.size for name, group in self.groups.items()}

    def saved(self, name: str) -> float:
        """Multiply-adds that one channel of a group takes in the whole network."""
        group, found = self.groups[name], 0.0
        for part in (*group.made, *group.seen):
            if part.weight in self._uses:
                entries = math.prod(self._weights[part.weight]) / self._weights[part.weight][part.dim]
                each = _per_entry(len(part.place) / group.size, part, self._uses)
                found += self._uses[part.weight].positions * entries * each
        return found

    def gates(self, gradient: Mapping[str, Tensor]) -> Scores:
        """Signed ∂L/∂g of every channel, (size,) by group. `gradient`: signed ∂L/∂m of the consumers' weights."""
        found = {name: torch.zeros(group.size, dtype=torch.float64) for name, group in self.groups.items()}
        for name, group in self.groups.items():
            for part in (one for one in group.seen if one.weight in gradient):  # frozen weights have none
                by_input = _by_input(gradient[part.weight], part, self._uses[part.weight].groups)
                found[name].index_add_(0, part.channel, by_input[part.place])
        return found

    def consumers(self) -> list[str]:
        """The parameters whose mask gradient `gates` needs."""
        return sorted({part.weight for group in self.groups.values() for part in group.seen}, key=self._places.get)  # type: ignore[arg-type]


class _Use(NamedTuple):
    """positions : outputs of one image per output channel.  groups : of the convolution."""

    positions: int
    groups: int


_COUNTED = 2**24
"""Up to here single precision holds every whole number."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MAKERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


def _grouping(module: nn.Module) -> tuple[bool, int]:
    """(each channel by itself?, groups of a grouped convolution)."""
    groups = getattr(module, "groups", 1)
    depthwise = groups > 1 and groups == getattr(module, "in_channels", 0)
    return depthwise, 1 if depthwise else groups


def _per_entry(channels: Any, part: Slice, uses: Mapping[str, _Use]) -> Any:
    """Entries of the weight along `part.dim` for so many channels: a group of a convolution holds its share of them."""
    groups = uses[part.weight].groups if part.weight in uses and part.dim == 1 else 1
    return channels // groups if isinstance(channels, int) else channels / groups


def _by_input(gradient: Tensor, part: Slice, groups: int) -> Tensor:
    """(inputs,) sums over all else. A grouped convolution holds its inputs in as many runs as it has groups."""
    whole = gradient.detach().double().cpu().movedim(part.dim, -1)
    if part.dim == 0 or groups == 1:
        return whole.flatten(0, -2).sum(0)
    return whole.reshape(groups, -1, whole.shape[-1]).sum(1).flatten()


def _uses(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, _Use]:
    """By weight: how often each of its entries multiplies for one image."""
    found: dict[str, _Use] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            side = inputs[0] if isinstance(module, _TRANSPOSED) else output
            weight: Any = module.weight
            before = found.get(name, _Use(0, 1)).positions
            found[name] = _Use(before + side.numel() // len(side) // weight.shape[0], getattr(module, "groups", 1))

        return hook

    makers = {name: module for name, module in model.named_modules() if isinstance(module, _MAKERS)}
    with hooked((module, count(f"{name}.weight")) for name, module in makers.items()):
        _evaluated(model, torch.zeros(1, *image_shape))
    return found


def _evaluated(model: nn.Module, images: Tensor) -> Tensor:
    output: Tensor = evaluated(model, images.to(next(model.parameters())))
    return output


class _Traced:
    """A copy of a model under Torch-Pruning's dependency graph."""

    def __init__(self, model: nn.Module, image_shape: tuple[int, ...]) -> None:
        import torch_pruning

        self.model = copy.deepcopy(model).cpu().requires_grad_()  # frozen parameters would vanish from its groups
        self.names = {module: name for name, module in self.model.named_modules()}
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.graph = torch_pruning.DependencyGraph().build_dependency(
                    self.model, [torch.ones(2, *image_shape).to(next(self.model.parameters()))], verbose=False
                )
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise ChannelError(f"this network's channels cannot be followed ({reason}).") from None

    def roots(self) -> list[str]:
        """Of each group the first layer that makes its channels, in the order of the network."""
        places = {name: place for place, name in enumerate(self.names.values())}
        found = [
            min((self.names[dep.target.module] for dep, _ in group if self._makes(dep)), key=places.__getitem__)
            for group in self.graph.get_all_groups(root_module_types=_MAKERS)
        ]
        return sorted(found, key=places.__getitem__)

    def _makes(self, dep: Any) -> bool:
        return isinstance(dep.target.module, _MAKERS) and not self.is_input(dep)

    def _group(self, root: str, channels: Iterable[int]) -> Any:
        module = self.model.get_submodule(root)
        pruner = self.graph.get_pruner_of_module(module)
        return self.graph.get_pruning_group(module, pruner.prune_out_channels, list(channels))

    def size(self, root: str) -> int:
        """Channels of the group of `root`."""
        return int(self.graph.get_out_channels(self.model.get_submodule(root)))

    def items(self, root: str) -> list[tuple[Any, list[int], list[int]]]:
        """Of the group of `root`: dependency, positions in its layer, and the group's channel of each."""
        return [
            (item.dep, list(item.idxs), list(item.root_idxs))
            for item in self._group(root, range(self.size(root))).items
        ]

    def is_input(self, dep: Any) -> bool:
        """Whether the dependency takes channels from a layer's inputs alone."""
        taken = dep.handler
        return bool(self.graph.is_in_channel_pruning_fn(taken)) and not self.graph.is_out_channel_pruning_fn(taken)

    def runs(self, gone: Mapping[str, list[int]]) -> dict[str, Tensor]:
        """Of grouped convolutions the inputs that stay when the groups lose these channels, (convolution's groups,
        inputs each) by place in the convolution's group.

        Raises ChannelError: one group would have more of them than another.
        """
        lost: dict[str, set[int]] = {}
        some = any(_grouping(module)[1] > 1 for module in self.names)
        for root, channels in gone.items() if some else ():
            removed = set(channels)
            for dep, places, own in self.items(root) if removed else ():
                if self.is_input(dep) and _grouping(dep.target.module)[1] > 1:
                    found = lost.setdefault(self.names[dep.target.module], set())
                    found.update(place for place, channel in zip(places, own, strict=True) if channel in removed)
        runs = {}
        for name, lacking in lost.items():
            layer: Any = self.model.get_submodule(name)
            each = layer.in_channels // layer.groups
            inputs = [[c for c in range(each) if each * run + c not in lacking] for run in range(layer.groups)]
            if len({len(run) for run in inputs}) > 1:
                raise ChannelError(f"the groups of the convolution '{name}' would have unequal numbers of inputs.")
            runs[name] = torch.tensor(inputs)
        return runs

    def remove(self, root: str, channels: Iterable[int]) -> None:
        """Take these channels of the group of `root` out of the copy."""
        self._group(root, channels).prune()


def cut(model: nn.Module, image_shape: tuple[int, ...], kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` that has these channels alone, with their weights and statistics, on its device.

    Raises ChannelError: a group that is not there; a network that does not compute the same when it is built anew and
    made as narrow (`narrow_`), as later stages do.
    """
    traced = _Traced(model, image_shape)
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.dim()}
    if max(tensor.numel() for tensor in state.values()) > _COUNTED:
        traced.model.double()
    numbered = traced.model.state_dict()
    for name, tensor in state.items():  # every entry holds its own number: what is left says where it came from
        numbered[name].copy_(torch.arange(tensor.numel()).view_as(tensor))
    roots = traced.roots()
    gone = {}
    for name, channels in kept.items():
        if name not in roots:
            raise ChannelError(f"there is no group of channels '{name}'. There are: {', '.join(roots)}.")
        gone[name] = sorted({*range(traced.size(name))} - {*channels.tolist()})
    runs = traced.runs(gone)
    for name, removed in gone.items():
        if removed:
            traced.remove(name, removed)
    for name, inputs in runs.items():
        _regroup(traced.model.get_parameter(f"{name}.weight"), tuple(state[f"{name}.weight"].shape), inputs)
    narrow = narrow_(copy.deepcopy(model), shapes_of(traced.model, model))
    left, own = traced.model.state_dict(), narrow.state_dict()
    for name, tensor in state.items():
        own[name].copy_(tensor.flatten()[left[name].long().flatten().to(tensor.device)].view_as(own[name]))
    _compare(traced.model, narrow, image_shape)
    return narrow


@torch.no_grad()
def _regroup(numbered: Tensor, whole: tuple[int, ...], inputs: Tensor) -> None:
    """Number the entries of a grouped convolution anew, (out, in / groups, ...), so that every group has its own
    `inputs`: Torch-Pruning leaves each those of the first. `whole`: the weight's shape before the cut."""
    numbers = torch.arange(math.prod(whole)).view(whole)
    outputs = numbered.flatten(1)[:, 0].long() // math.prod(whole[1:])
    run = outputs // (whole[0] // len(inputs))
    numbered.copy_(numbers[outputs[:, None], inputs[run]])


def _compare(expected: nn.Module, narrow: nn.Module, image_shape: tuple[int, ...]) -> None:
    expected.load_state_dict(narrow.state_dict())
    images = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    wanted, got = _evaluated(expected, images), _evaluated(narrow, images)
    if not torch.allclose(wanted.double(), got.double().cpu(), rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
        raise ChannelError("the narrow network does not compute what it computes when it is built anew.")


def _first_of_blocks(group: Group, each: int) -> Tensor:
    """The first `each` channels of every block."""
    return torch.arange(group.size).view(group.blocks, -1)[:, :each].flatten()
