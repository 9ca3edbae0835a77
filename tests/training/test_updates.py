"""The update that ends a step: the mask holds, the norm is that before clipping, a detector is updated alike."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epsd.masks import Mask
from epsd.project.recipes import DetectorRecipe, Recipe
from epsd.training.updates import Updates
from toys import mlp

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"epochs": 1, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def loss_of(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    first = next(model.parameters())
    return model(torch.randn(4, first.shape[1], dtype=first.dtype)).square().sum()


def made(recipe: Recipe | DetectorRecipe, update: Any = "loop") -> tuple[nn.Module, Updates, Mask]:
    torch.manual_seed(1)
    model = mlp()
    updates = Updates(model, recipe, update, CPU, scaled=False)
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    mask = Mask({name: torch.rand(p.shape) < 0.5 for name, p in weights.items()})
    updates.hold(mask)
    return model, updates, mask


def steps(model: nn.Module, updates: Updates, count: int = 3, **options: Any) -> Tensor:
    for _ in range(count):
        updates.forget()
        updates.backward(loss_of(model))
        norm = updates.take(0.1, **options)
    return norm


@pytest.mark.parametrize("update", ["loop", "foreach", "fused"])
def test_removed_weights_stay_zero_and_have_no_part_in_the_norm(update: Any) -> None:
    model, updates, mask = made(Recipe(**SETTINGS), update)
    steps(model, updates)
    updates.forget()
    updates.backward(loss_of(model))
    weights = dict(model.named_parameters())
    kept = [
        p.grad * mask.keep[name] if name in mask.keep else p.grad for name, p in weights.items() if p.grad is not None
    ]
    expected = torch.nn.utils.get_total_norm(kept)
    assert float(updates.take(0.1)) == pytest.approx(float(expected), rel=1e-6)
    assert all(
        (weights[name][~keep] == 0).all() and (weights[name][keep] != 0).all() for name, keep in mask.keep.items()
    )


def test_the_norm_is_that_before_clipping() -> None:
    norms = [steps(*made(Recipe(**SETTINGS, clip_norm=clip))[:2], count=1) for clip in (None, 1e-3)]
    assert torch.equal(*norms)


def test_a_detector_is_updated_as_a_classifier() -> None:
    first, updates, _ = made(Recipe(**SETTINGS, nesterov=False, clip_norm=0.5))
    steps(first, updates)
    second, others, _ = made(DetectorRecipe(**SETTINGS, batch_size=1, clip_norm=0.5))
    steps(second, others)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_where_the_mask_moved_no_weight_does() -> None:
    model, updates, _ = made(Recipe(**SETTINGS))
    before = copy.deepcopy(model.state_dict())
    steps(model, updates, moved=lambda: True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_momentum_goes_on_after_a_restart() -> None:
    model, updates, _ = made(Recipe(**SETTINGS))
    steps(model, updates, 2)
    again, others, _ = made(Recipe(**SETTINGS))
    again.load_state_dict(model.state_dict())
    others.load_state_dict(copy.deepcopy(updates.state_dict()))
    for each in ((model, updates), (again, others)):
        steps(*each, count=1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
