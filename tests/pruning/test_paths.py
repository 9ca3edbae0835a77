"""What of a mask is in effect: against paths that are followed one by one, and against what a network computes."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from epsd.architectures import ARCHITECTURES
from epsd.masks import Mask, prunable
from epsd.pruning import paths
from epsd.pruning.paths import chance, examined, gini, on_path
from epsd.scores import SCORES
from toys import convnet


def random_mask(model: nn.Module, sparsity: float, seed: int = 0) -> Mask:
    torch.manual_seed(seed)
    return Mask.from_scores({name: torch.rand_like(p) for name, p in prunable(model).items()}, sparsity)


@pytest.mark.parametrize("seed", range(4))
def test_against_every_path_of_a_perceptron(seed: int) -> None:
    sizes = (5, 6, 6, 3)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.GELU(), layers[2])
    mask = random_mask(model, 0.75, seed)
    keeps = list(mask.keep.values())
    found = [torch.zeros_like(keep) for keep in keeps]
    for nodes in itertools.product(*map(range, sizes)):
        steps = list(itertools.pairwise(nodes))
        if all(keep[end, start] for keep, (start, end) in zip(keeps, steps, strict=True)):
            for seen, (start, end) in zip(found, steps, strict=True):
                seen[end, start] = True
    effective = on_path(model, mask, (5,))
    assert all(torch.equal(keep, seen) for keep, seen in zip(effective.keep.values(), found, strict=True))
    assert 0 < effective.kept < mask.kept


def _logits(model: nn.Module, mask: Mask, images: Tensor) -> Tensor:
    weights = {name: keep * model.get_parameter(name) for name, keep in mask.keep.items()}
    with torch.no_grad():
        return torch.func.functional_call(model, weights, (images,))


def pooled() -> nn.Module:
    """Without shortcuts, so that what is cut is cut for good."""
    first, *others = (
        nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for channels in (3, 16, 16)
    )
    return nn.Sequential(first, *others, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(256, 10))


@pytest.mark.parametrize("build", [lambda: ARCHITECTURES["resnet"](depth=20, width=0.5)(10, (3, 16, 16)), pooled])
def test_what_lies_on_no_path_computes_nothing(build: Callable[[], nn.Module]) -> None:
    """Without it a network whose biases are 0 gives the same logits."""
    torch.manual_seed(0)
    model = build().double().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.zeros_(parameter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mask = random_mask(model, 0.97)
    effective = on_path(model, mask, (3, 16, 16))
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    full, less = _logits(model, mask, images), _logits(model, effective, images)
    assert 0.2 * mask.kept < effective.kept < mask.kept
    assert torch.allclose(full, less, rtol=1e-9, atol=1e-30) and full.any()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = on_path(model, effective, (3, 16, 16))
    assert again == effective, "what is left of them lies on a path"


def test_all_of_a_dense_network_lies_on_a_path_but_what_sees_the_border_alone() -> None:
    for depth in (20, 32):
        model = ARCHITECTURES["resnet"](depth=depth)(10, (1, 8, 8))
        assert on_path(model, Mask.dense(model), (1, 8, 8)).sparsity == 0
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 3, padding=1))
    effective = on_path(model, Mask.dense(model), (1, 5, 5))
    assert effective.per_layer() == {"0.weight": (36, 36), "2.weight": (8, 72)}, "one pixel meets the middle alone"


def test_pooling_and_attention_let_everything_through() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(8), nn.Conv2d(4, 2, 1), nn.Flatten())
    assert on_path(model, Mask.dense(model), (1, 8, 8)).sparsity == 0

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.norm = nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 2)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.norm(self.embed(images))
            return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))  # type: ignore[no-any-return]

    attending = Attending()
    assert on_path(attending, Mask.dense(attending), (5, 3)).sparsity == 0


def test_gini_by_hand() -> None:
    assert gini(torch.tensor([2, 2, 2])) == 0
    assert gini(torch.tensor([0, 0, 0, 9])) == pytest.approx(3 / 4)
    assert gini(torch.tensor([1, 3])) == pytest.approx(2 * 2 / (2 * 2 * 4))  # Σ|x_i − x_j| = 4, n = 2, Σx = 4
    assert gini(torch.tensor([0, 0])) is None


def test_layers_and_their_random_twins() -> None:
    model = convnet()
    mask = Mask.from_scores({n: p.detach().abs() for n, p in prunable(model).items()}, 0.8)
    found = examined(model, mask, (1, 4, 4), seed=3)
    effective = on_path(model, mask, (1, 4, 4))
    for name, layer in found.layers.items():
        keep = mask.keep[name].flatten(1)
        assert (layer.kept, layer.total) == mask.per_layer()[name]
        assert layer.on_path == int(effective.keep[name].sum())
        assert (layer.channels, layer.live) == (len(keep), int(effective.keep[name].flatten(1).any(1).sum()))
        assert layer.gini == gini(keep.sum(1))
    twin, expected = chance(mask, 3), Mask.from_scores(SCORES["random"](distribution="erk")(model, [], None), 0.8)
    assert twin.per_layer() == expected.per_layer() and twin != chance(mask, 4)
    assert {name: (layer.kept, layer.total) for name, layer in found.random.items()} == twin.per_layer()
    figures = found.summary()
    assert figures["effective_sparsity"] == pytest.approx(1 - effective.kept / mask.total)
    assert figures["on_path"] == pytest.approx(effective.kept / mask.kept)
    assert figures["random_erk_on_path"] == on_path(model, twin, (1, 4, 4)).kept / twin.kept
    assert [row["layer"] for row in found.rows()] == list(mask.keep)
    assert found.rows()[0]["density"] == mask.per_layer()["0.weight"][0] / 54


def test_a_tenth_on_no_path_is_warned_of() -> None:
    model, said = convnet(), list[str]()
    cut = {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(model).items()}
    paths.warn_of_lost(examined(model, Mask(cut), (1, 4, 4), 0), said.append)
    assert said == []
    for rows in (6, 7):  # 18 of 186 kept weights, then 21 of 132, read from nothing
        cut["3.weight"][:rows] = False
        paths.warn_of_lost(examined(model, Mask(cut), (1, 4, 4), 0), said.append)
    (line,) = said
    assert "15.9% of the kept weights lie on no path" in line and "\n" not in line
    dead = Mask({**cut, "3.weight": torch.zeros_like(cut["3.weight"])})
    found = examined(model, dead, (1, 4, 4), 0)
    assert found.summary()["on_path"] == 0 and found.layers["3.weight"].gini is None
