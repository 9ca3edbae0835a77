"""Channels: what belongs together, what a gate is worth, and that the cut network is the gated one."""

import copy
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from epsd.architectures.resnet import ResNet
from epsd.compute.narrow import NarrowError, narrow_, shapes_of
from epsd.evaluation.metrics import flops
from epsd.losses import supervised
from epsd.pruning.channels import ChannelError, Structure, cut
from epsd.pruning.metagradients import mask_gradient
from epsd.pruning.scoring import scoring
from epsd.pruning.widths import best
from epsd.types import Batch

SHAPE = (3, 8, 8)


class Separable(nn.Module):
    """Depthwise between two 1x1, squeeze and excitation, a residual sum, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.widen = nn.Conv2d(8, 16, 1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.middle = nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project = nn.Conv2d(16, 8, 1, bias=False)
        self.fc = nn.Linear(8 + 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        wide = self.middle(self.depthwise(self.widen(x))).relu()
        scale = self.excite(self.squeeze(wide.mean((2, 3), keepdim=True)).relu()).sigmoid()
        out = x + self.project(wide * scale)
        return self.fc(torch.cat([out, wide], 1).mean((2, 3)))


class Grouped(nn.Module):
    """A convolution of four groups, without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.third, self.fc = nn.Conv2d(24, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.third(self.second(self.first(x).relu()).relu()).relu().mean((2, 3)))


class Flattened(nn.Module):
    """Four pixels of each channel reach the classifier, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.adaptive_avg_pool2d(self.norm(self.first(x)).relu(), 2).flatten(1))


def residual() -> nn.Module:
    return ResNet(depth=8, width=0.5)(5, SHAPE)


NETS = {"residual": residual, "separable": Separable, "grouped": Grouped, "flattened": Flattened}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = NETS[request.param]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics and scales that are not those of a fresh layer
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    drawn = torch.Generator().manual_seed(3)
    images = torch.randn(count, 6, *SHAPE, generator=drawn, dtype=dtype)
    return [Batch(x, torch.arange(6) % 5, torch.arange(6)) for x in images]


def half(structure: Structure) -> dict[str, Tensor]:
    """Half of the channels of each group by lot: equally many of all blocks, in each block others."""
    drawn = torch.Generator().manual_seed(2)
    return {
        name: best(group, torch.rand(group.size, generator=drawn), group.size // 2)
        for name, group in structure.groups.items()
    }


def gated(model: nn.Module, structure: Structure, factors: dict[str, Tensor]) -> nn.Module:
    """A copy whose consumers see each channel times its factor: by their input slices, one entry at a time."""
    copied = copy.deepcopy(model)
    for name, group in structure.groups.items():
        for part in group.seen:
            module = copied.get_submodule(part.weight.removesuffix(".weight"))
            runs, factor = (
                getattr(module, "groups", 1),
                torch.ones(module.weight.shape[1] * getattr(module, "groups", 1)),
            )
            factor = factor.to(module.weight.dtype)
            factor[part.place] = factors[name].to(factor.dtype)[part.channel]
            weight = module.weight.data.view(runs, -1, *module.weight.shape[1:])
            weight *= factor.view(runs, 1, -1, *[1] * (module.weight.dim() - 2))
    return copied


# --- groups ---------------------------------------------------------------------------------------------------------


class Probe(nn.Module):
    """Stands for a convolution or linear layer: notes where NaN arrives, and sends out NaN in one channel or none."""

    def __init__(self, layer: nn.Module, sends: bool) -> None:
        super().__init__()
        self.layer, self.sends, self.arrived = layer, sends, None

    def forward(self, x: Tensor) -> Tensor:
        self.arrived = x.isnan().flatten(2).any(2) if x.dim() > 2 else x.isnan()
        out = self.layer(torch.nan_to_num(x) * 0 + 1) * 0 + 1
        if getattr(self.layer, "groups", 1) == x.shape[1] > 1:  # depthwise: hands its channels on
            out = out.masked_fill(self.arrived[:, :, None, None], torch.nan)
        if self.sends:
            probes = torch.arange(out.shape[1])
            out[probes, probes] = torch.nan
        return out


def probed(model: nn.Module) -> Iterator[tuple[str, int, frozenset[tuple[str, int]]]]:
    """(layer, its output channel, the (consumer, input) places that see it), by NaN instead of by a graph."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for sender, layer in layers.items():
        copied = copy.deepcopy(model).eval()
        for name in layers:
            parent, _, leaf = name.rpartition(".")
            setattr(copied.get_submodule(parent), leaf, Probe(copied.get_submodule(name), name == sender))
        channels = layer.weight.shape[0]
        copied(torch.ones(channels, *SHAPE))
        for channel in range(channels):
            yield (
                sender,
                channel,
                frozenset(
                    (name, place)
                    for name in layers
                    if getattr(layers[name], "groups", 1) in (1, 4)
                    for place in copied.get_submodule(name).arrived[channel].nonzero().flatten().tolist()
                ),
            )


def test_groups_are_those_that_nan_finds(net: nn.Module) -> None:
    """Two channels belong together where one place sees both. Found by sending NaN, without any graph."""
    structure = Structure(net, SHAPE)
    assert not structure.whole
    seen = defaultdict(set)
    for sender, channel, places in probed(net):
        for place in places:
            seen[place].add((sender, channel))
    for group in structure.groups.values():
        for channel in range(group.size):
            makers = {
                (p.weight[:-7], int(p.place[i])) for p in group.made for i in (p.channel == channel).nonzero()[:, 0]
            }
            consumers = {
                (p.weight[:-7], int(p.place[i])) for p in group.seen for i in (p.channel == channel).nonzero()[:, 0]
            }
            assert {place for place, by in seen.items() if by & makers} == consumers
            assert set.union(*(seen[place] for place in consumers)) - makers <= depthwise_outputs(net, makers)


def depthwise_outputs(model: nn.Module, makers: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Channels of depthwise layers and of gates, which scale what others make."""
    scaling = {n for n, m in model.named_modules() if getattr(m, "groups", 1) > 4 or n == "excite"}
    return {(name, channel) for name in scaling for _, channel in makers}


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_multiply_adds_are_those_of_the_counter(net: nn.Module, share: float) -> None:
    structure = Structure(net, SHAPE)
    kept = half(structure) if share < 1 else {n: torch.arange(g.size) for n, g in structure.groups.items()}
    counted = flops(cut(net, SHAPE, kept), SHAPE).dense / 2
    assert structure.macs({name: len(channels) for name, channels in kept.items()}) == counted


def test_what_one_channel_saves(net: nn.Module) -> None:
    structure = Structure(net, SHAPE)
    dense = structure.dense()
    for name, group in structure.groups.items():
        if group.blocks == 1:
            less = structure.macs(dense) - structure.macs(dense | {name: dense[name] - 1})
            assert structure.saved(name) == pytest.approx(less)


# --- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_gates_are_finite_differences(net: nn.Module, steps: int) -> None:
    net.double()
    structure, drawn = Structure(net, SHAPE), batches(steps + 1)
    with scoring(net):
        gradient = mask_gradient(net, supervised, drawn, structure.consumers(), lr=0.05).gradient
    gates = structure.gates(gradient)

    def outer(name: str, channel: int, change: float) -> float:
        """The loss after the steps, from a start whose one gate is 1 + change: plain SGD by autograd."""
        factors = {n: torch.ones(g.size, dtype=torch.float64) for n, g in structure.groups.items()}
        factors[name][channel] += change
        model = gated(net, structure, factors).train()
        weights = dict(model.named_parameters())
        for batch in drawn:
            logits = functional_call(model, weights, (batch.images,))
            loss = nn.functional.cross_entropy(logits, batch.labels)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            weights = {
                n: (w - 0.05 * g).detach().requires_grad_() if g is not None else w
                for (n, w), g in zip(weights.items(), found, strict=True)
            }
        return float(loss.detach())

    largest = max(float(gate.abs().max()) for gate in gates.values())
    for name, gate in gates.items():
        channel = int(gate.abs().argmax())
        slope = (outer(name, channel, 1e-5) - outer(name, channel, -1e-5)) / 2e-5
        assert float(gate[channel]) == pytest.approx(slope, rel=1e-4, abs=1e-6 * largest)
        assert float(gate[channel]) != 0


@pytest.mark.parametrize("training", [True, False])
def test_gated_is_cut(net: nn.Module, training: bool) -> None:
    structure = Structure(net, SHAPE)
    kept = half(structure)
    factors = {name: torch.zeros(group.size) for name, group in structure.groups.items()}
    for name, channels in kept.items():
        factors[name][channels] = 1
    (batch,) = batches(1, torch.float32)
    whole = gated(net, structure, factors).train(training)
    narrow = cut(net, SHAPE, kept).train(training)
    assert torch.allclose(whole(batch.images), narrow(batch.images), atol=1e-5)
    assert {n: len(k) for n, k in kept.items()} == {n: narrow.get_submodule(n).weight.shape[0] for n in kept}


def test_a_filters_own_mask_says_nothing_in_front_of_batchnorm() -> None:
    """Why the gate is used: the loss does not depend on the scale of what BatchNorm normalises."""
    torch.manual_seed(0)
    model = residual().double()
    structure = Structure(model, SHAPE)
    group = structure.groups["layer1.0.conv1"]
    with scoring(model):
        gradient = mask_gradient(model, supervised, batches(1), [*structure.consumers(), group.made[0].weight]).gradient
    own = gradient[group.made[0].weight].flatten(1).sum(1).abs().max()
    assert own < 1e-4 * structure.gates(gradient)[group.name].abs().max()


# --- cutting --------------------------------------------------------------------------------------------------------


def test_cut_leaves_the_network_and_the_random_state_alone(net: nn.Module) -> None:
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    net.stem_training = net.training
    structure = Structure(net, SHAPE)
    cut(net, SHAPE, half(structure))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert net.training


def test_kept_weights_are_the_networks_own() -> None:
    torch.manual_seed(0)
    model = residual()
    structure = Structure(model, SHAPE)
    kept = {name: torch.arange(group.size) for name, group in structure.groups.items()}
    kept["layer1.0.conv1"] = torch.tensor([1, 4, 6])
    narrow = cut(model, SHAPE, kept)
    assert torch.equal(narrow.layer1[0].conv1.weight, model.layer1[0].conv1.weight[[1, 4, 6]])
    assert torch.equal(narrow.layer1[0].conv2.weight, model.layer1[0].conv2.weight[:, [1, 4, 6]])
    assert torch.equal(narrow.layer1[0].bn1.running_var, model.layer1[0].bn1.running_var[[1, 4, 6]])


def test_frozen_layers_are_cut_too() -> None:
    model = residual()
    model.layer1.requires_grad_(False)
    structure = Structure(model, SHAPE)
    assert list(structure.groups) == list(Structure(residual(), SHAPE).groups)
    narrow = cut(model, SHAPE, half(structure))
    assert not narrow.layer1[0].conv1.weight.requires_grad and narrow.fc.weight.requires_grad


def test_layers_that_cannot_be_narrower_are_named() -> None:
    model = ResNet(depth=8, width=0.5, shortcut="padding")(5, SHAPE)
    structure = Structure(model, SHAPE)
    assert list(structure.whole) == ["conv1"]  # the shortcut pads by fixed numbers of channels
    assert structure.groups


def test_nothing_to_cut_is_one_line() -> None:
    with pytest.raises(ChannelError, match="no channels of this network can be cut"):
        Structure(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), SHAPE)


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(ChannelError, match=r"no group of channels 'nowhere'\. There are: conv1, "):
        cut(residual(), SHAPE, {"nowhere": torch.arange(2)})


# --- building narrow ------------------------------------------------------------------------------------------------


def test_narrow_networks_are_built_from_their_shapes(net: nn.Module) -> None:
    narrow = cut(net, SHAPE, half(Structure(net, SHAPE)))
    built = narrow_(copy.deepcopy(net), shapes_of(narrow, net))
    built.load_state_dict(narrow.state_dict())
    (batch,) = batches(1, torch.float32)
    assert torch.equal(built.eval()(batch.images), narrow.eval()(batch.images))


@pytest.mark.parametrize("shapes", [{"fc.weight": (99, 32)}, {"nothing": (2,)}, {"fc.weight": (5,)}])
def test_impossible_shapes_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(NarrowError, match="cannot have the shape"):
        narrow_(residual(), shapes)
