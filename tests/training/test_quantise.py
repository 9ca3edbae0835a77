"""Training with rounded weights: what is judged is what is left, masks hold, a killed run goes on bit for bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from epsd.compute import quantise
from epsd.masks import Mask, prunable
from epsd.objectives import OBJECTIVES
from epsd.project.recipes import Quantise, Recipe
from epsd.training.fit import fit
from epsd.training.record import Record, TrainingError
from toys import Killed, ToyBatches, convnet, half, net_with_dropout, stop_after, timeless

NAMES = sorted(OBJECTIVES)


def recipe(bits: int = 4, from_epoch: int = 0, **settings: Any) -> Recipe:
    return Recipe(**{"epochs": 3, "lr": 0.1, "schedule": "cosine", "precision": "fp32"} | settings,
                  quantise=Quantise(bits=bits, from_epoch=from_epoch))  # fmt: skip


def on_grid(model: torch.nn.Module, bits: int = 4) -> bool:
    return all(torch.allclose(p, quantise.rounded(p, bits), rtol=1e-6) for p in prunable(model).values())


@pytest.mark.parametrize("name", NAMES)
def test_what_was_judged_is_left_and_the_mask_holds(name: str) -> None:
    model, held, seen = convnet(), ToyBatches(size=24), list[bool]()
    mask = half(model)
    history = fit(
        model, ToyBatches(), objective=OBJECTIVES[name](), mask=mask, recipe=recipe(), validation=held,
        on_epoch=lambda record: seen.append(on_grid(model)),
    )  # fmt: skip
    assert on_grid(model) and not any(seen), "while it trains, the weights keep their full precision"
    assert all(not p[~mask.keep[key]].any() for key, p in prunable(model).items())
    with torch.no_grad():
        logits = model(held.images)
    assert history[-1]["val/nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, held.labels)))


def test_the_first_epochs_round_nothing() -> None:
    def losses(made: Recipe) -> list[float]:
        return [record["train/loss"] for record in fit(convnet(), ToyBatches(), recipe=made)]

    plain, late, early = (
        losses(one) for one in (recipe().model_copy(update={"quantise": None}), recipe(4, 2), recipe())
    )
    assert late[:2] == plain[:2] and late[2] != plain[2] and early[0] != plain[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_a_killed_training_goes_on_to_bit_identical_weights(tmp_path: Path, name: str, killed_after: int) -> None:
    """Before, at and after the epoch from which weights are rounded."""
    start = net_with_dropout()
    common = {"mask": half(start), "recipe": recipe(4, 2, epochs=4), "validation": ToyBatches(size=24), "seed": 4}

    def train(model: torch.nn.Module, **more: Any) -> list[Record]:
        return fit(model, ToyBatches(), objective=OBJECTIVES[name](), **common, **more)

    whole, broken, resumed = (copy.deepcopy(start) for _ in range(3))
    expected, path = train(whole), tmp_path / "last.safetensors"
    with pytest.raises(Killed):
        train(broken, checkpoint=path, mark="m", on_epoch=stop_after(killed_after))
    assert timeless(train(resumed, checkpoint=path, mark="m")) == timeless(expected)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_a_training_that_was_over_leaves_the_same_weights_again(tmp_path: Path) -> None:
    first, again = convnet(), convnet()
    for model in (first, again):
        fit(model, ToyBatches(), recipe=recipe(), checkpoint=tmp_path / "last.safetensors", mark="m")
    assert on_grid(again)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"accumulate": 2}, {"update": "loop"}])
def test_it_learns_in_every_way_of_computing(settings: dict[str, Any]) -> None:
    data, model = ToyBatches(size=96), convnet()
    history = fit(model, data, recipe=recipe(epochs=12, lr=0.05, **settings), validation=data)
    assert history[-1]["val/top1"] > 0.9 and on_grid(model)
    assert Mask.dense(model).keep.keys() == prunable(model).keys()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"bits": 3}, "8 or 4"), ({"bits": 8, "from_epoch": -1}, "greater than or equal to 0"),
     ({"bits": 8, "from_epoch": 5}, r"quantise\.from_epoch: 5 is not before the end \(epochs: 5\)"),
     ({"from_epoch": 1}, "bits"), ({"bits": 4, "from": 1}, "from_epoch")],
)  # fmt: skip
def test_other_settings_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Recipe(epochs=5, quantise=settings)


@pytest.mark.parametrize("choice", ["kernels", "graphs"])
def test_rounded_weights_are_not_compiled(choice: str) -> None:
    with pytest.raises(TrainingError, match=r"^train\.compile: rounded weights run uncompiled; use none, or"):
        fit(convnet(), ToyBatches(), recipe=recipe(compile=choice))
