"""What a score cannot see: it is left out of the count, or named, before anything is selected."""

import warnings
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from epsd.compute.cost import Meter
from epsd.masks import Mask, MaskError, covered, prunable
from epsd.objectives import OBJECTIVES
from epsd.pruning.blind_spots import blind_spots
from epsd.pruning.prune import prune, scored, selected
from epsd.scores import SCORES
from toys import ToyBatches, convnet

DATA = ToyBatches()
NAMES = sorted(SCORES)


def score(name: str) -> object:
    return SCORES[name](**({"samples_per_class": 2} if name == "grasp" else {}))


def told(record: Iterable[warnings.WarningMessage]) -> str:
    return "\n".join(str(each.message) for each in record)


class Heads(nn.Module):
    """A network with a layer that is never called, one that trains with it only, one whose output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.forgotten, self.aside = convnet(), nn.Linear(30, 40), nn.Linear(8, 5)
        self.drilled = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body[:8](images)
        self.aside(features)
        logits = self.body[8](features)
        return self.drilled(logits) if self.training else logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounds", [1, 2])
def test_weights_that_the_output_does_not_depend_on_are_not_counted(name: str, rounds: int) -> None:
    """By no score, those without data included, whatever their number; a layer of one mode is used."""
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"does not depend on it: forgotten\.weight, aside\.weight\."):
        mask = prune(Heads(), DATA, score=score(name), sparsity=0.4, rounds=rounds)
    assert list(mask.keep) == ["body.0.weight", "body.3.weight", "body.8.weight", "drilled.weight"]
    assert mask.total - mask.kept == round(0.4 * mask.total)


def test_what_is_tried_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, meter, random_state = Heads(), Meter(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with meter.watching(model):
        spots = blind_spots(model, DATA.images[:4])
    assert spots.unused == ["forgotten.weight", "aside.weight"]
    assert not spots.silent and not spots.zeros
    assert meter.images_forward == meter.images_backward == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Branch(nn.Module):
    """x + α · end(conv(x)), α = 0 at the start (ReZero) or absent."""

    def __init__(self, end: nn.Module, gate: bool = False) -> None:
        super().__init__()
        self.inner, self.end = nn.Conv2d(6, 6, 3, padding=1), end
        self.alpha = nn.Parameter(torch.zeros(())) if gate else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.end(self.inner(x))


def with_branch(end: nn.Module, gate: bool = False) -> nn.Module:
    """The toy network with a branch in it, and with biases that start at zero, as usual."""
    torch.manual_seed(0)
    model = convnet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Linear):
            nn.init.zeros_(module.bias)
    return model[:3].append(Branch(end, gate)).extend(model[3:])


def silenced(kind: str) -> nn.Module:
    """A network whose layer 3.inner is silent at the start."""
    if kind == "gate":
        return with_branch(nn.Identity(), gate=True)
    norm = nn.GroupNorm(2, 6) if kind == "group" else nn.BatchNorm2d(6)
    nn.init.zeros_(norm.weight)
    return with_branch(norm.requires_grad_(kind != "frozen"))


@pytest.mark.parametrize("kind", ["batch", "group", "gate", "frozen"])
@pytest.mark.parametrize("name", NAMES)
def test_a_branch_that_starts_scaled_by_zero_is_named(kind: str, name: str) -> None:
    """With its cause, and by the scores alone that look at gradients; the sparsity is not blamed for it."""
    layer, cause = "3.inner.weight", "3.alpha" if kind == "gate" else "3.end.weight"
    model = silenced(kind)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        mask = prune(model, DATA, score=score(name), sparsity=0.7)
    if name in ("magnitude", "random"):
        assert not record
        return
    assert f"no gradient reaches {layer} at the start, as {cause} scale by zero" in told(record)
    if name in ("snip", "synflow"):  # the others see a little of it some steps ahead, or rank by the sign, too
        assert layer in mask.dead_layers()
        assert layer not in told(record).partition("no weight survives")[2]


def test_a_layer_without_scores_for_another_reason_is_named() -> None:
    model = with_branch(nn.ReLU())
    nn.init.constant_(model[3].inner.bias, -100.0)
    with pytest.warns(UserWarning, match=r"no gradient reaches 3\.inner\.weight at the start: look there"):
        prune(model, DATA, score=score("snip"), sparsity=0.05)


class Reader(nn.Module):
    """A convolution, an LSTM over the rows, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rows, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.LSTM(16, 32), nn.Linear(32, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images).flatten(2).transpose(1, 2).reshape(len(images), 4, 16)
        return self.head(self.rows(maps.transpose(0, 1))[0][-1])


def test_the_share_of_parameters_that_no_mask_covers_is_told() -> None:
    share = r"98\.0% of the parameters .* no mask covers them \(rows\): the sparsity is a share of the other 2\.0%"
    with pytest.warns(UserWarning, match=share):
        prune(Reader(), DATA, score=score("snip"), sparsity=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(convnet(), DATA, score=score("snip"), sparsity=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_excluding_a_layer_changes_no_other_score(name: str) -> None:
    """Unlike freezing it. By parameter, by module or by pattern; the sparsity is a share of the layers that remain."""
    settings = {"score": score(name), "objective": OBJECTIVES["cskd"]()}
    torch.manual_seed(1)
    scores = scored(convnet(), DATA, **settings)
    for layers in ("3.weight", "3", "3.*", ["3"]):
        torch.manual_seed(1)
        mask = prune(convnet(), DATA, sparsity=0.6, exclude=layers, **settings)
        others = {layer: found for layer, found in scores.items() if layer != "3.weight"}
        assert mask == Mask.from_scores(others, 0.6) == selected(others, sparsity=0.6)
        assert mask.total - mask.kept == round(0.6 * mask.total)
    torch.manual_seed(1)
    assert prune(convnet(), DATA, sparsity=0.6, include=["0", "8"], **settings) == mask
    torch.manual_seed(1)
    assert list(scored(convnet(), DATA, exclude=["3"], **settings)) == list(mask.keep)


def test_names_that_fit_nothing_are_refused() -> None:
    weights = prunable(convnet())
    for given, message in (
        ({"exclude": ["head"]}, r"exclude: no layer fits 'head'. Layers: 0\.weight, 3\.weight, 8\.weight"),
        ({"include": ["0", "1"]}, "include: no layer fits '1'"),
        ({"exclude": ["*"]}, "exclude: no prunable weight is left"),
    ):
        with pytest.raises(MaskError, match=message):
            covered(weights, **given)
    assert list(covered(weights, include=["*.weight"], exclude="8")) == ["0.weight", "3.weight"]
