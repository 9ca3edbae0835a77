"""Fine-tuning: the mask holds under every option, a killed run goes on bit for bit, what is frozen does not move."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from epsd.masks import Mask, MaskError, prunable
from epsd.objectives import OBJECTIVES
from epsd.project.recipes import Recipe
from epsd.training.fit import fit
from epsd.training.groups import parameter_groups
from epsd.training.record import Record, TrainingError
from epsd.training.result import kept
from toys import Killed, ToyBatches, convnet, half, net_with_dropout, stop_after, timeless

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"optimiser": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "decay_norms": {"decay_norms": False, "weight_decay": 0.1},
    "head_lr": {"head_lr": 10.0},
    "freeze": {"freeze": ["0", "1"]},
    "freeze_epochs": {"freeze": ["[0-4]"], "freeze_epochs": 2},
    "ema": {"ema": 0.8},
    "best": {"keep": "best"},
    "all": {
        "optimiser": "adamw", "lr": 0.01, "decay_norms": False, "head_lr": 10.0, "freeze": ["0", "1"],
        "freeze_epochs": 3, "ema": 0.8, "keep": "best", "clip_norm": 1.0,
    },
}  # fmt: skip


def recipe(**options: Any) -> Recipe:
    return Recipe(**{"epochs": 5, "lr": 0.1, "warmup_epochs": 1, "schedule": "cosine"} | options)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_mask_is_exact_and_a_killed_training_goes_on_bit_for_bit(tmp_path: Path, option: str) -> None:
    start = net_with_dropout()
    mask = half(start)

    def train(model: nn.Module, **more: Any) -> list[Record]:
        looked = {"mask": mask, "recipe": recipe(**OPTIONS[option]), "validation": ToyBatches(), "seed": 4}
        return fit(model, ToyBatches(), objective=OBJECTIVES["dlb"](), **looked, **more)

    whole = copy.deepcopy(start)
    expected = train(whole)
    for key, weight in prunable(whole).items():
        assert not weight[~mask.keep[key]].any() and not torch.signbit(weight[~mask.keep[key]]).any()
        assert weight[mask.keep[key]].all()
    path = tmp_path / "last.safetensors"
    for killed_after in (1, 4):
        with pytest.raises(Killed):
            train(copy.deepcopy(start), checkpoint=path, mark="m", on_epoch=stop_after(killed_after))
    resumed = copy.deepcopy(start)
    assert timeless(train(resumed, checkpoint=path, mark="m")) == timeless(expected)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())
    assert all(parameter.requires_grad for parameter in resumed.parameters())


def states(model: nn.Module, **options: Any) -> list[dict[str, Tensor]]:
    """The network's state after each epoch."""
    seen: list[dict[str, Tensor]] = []
    fit(
        model, ToyBatches(), recipe=recipe(**options), on_epoch=lambda _: seen.append(copy.deepcopy(model.state_dict()))
    )
    return seen


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("more", [{}, {"ema": 0.8}, {"optimiser": "adamw", "weight_decay": 0.1}])
def test_frozen_stages_keep_weights_and_statistics(more: dict[str, Any]) -> None:
    """By any of their names; momentum, decay and a running mean leave them alone."""
    model = net_with_dropout()
    before = copy.deepcopy(model.state_dict())
    states(model, freeze=["0", "1.*"], **more)
    assert not {name for name in moved(before, model.state_dict()) if name.startswith(("0.", "1."))}
    assert len(moved(before, model.state_dict())) == 8


def test_stages_are_frozen_for_the_first_epochs_only() -> None:
    model = convnet()
    first, *_, last = [copy.deepcopy(model.state_dict()), *states(model, freeze=["0", "1"], freeze_epochs=4)]
    assert {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.num_batches_tracked"} <= moved(first, last)
    model = convnet()
    seen = states(model, freeze=["0", "1"], freeze_epochs=4)
    assert not {name for name in moved(first, seen[3]) if name.startswith(("0.", "1."))}


def test_what_is_frozen_in_part_stays_in_train_mode() -> None:
    """Statistics of a BatchNorm go on while its bias learns."""
    model = convnet()
    before = copy.deepcopy(model.state_dict())
    assert {"1.running_mean", "1.bias"} <= moved(before, states(model, freeze=["1.weight"])[-1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"freeze": ["layer1"]}, MaskError, r"train\.freeze: no parameter fits 'layer1'\. Parameters: 0\.weight, "),
        ({"freeze": ["*"]}, TrainingError, r"train\.freeze: names every trainable parameter"),
        ({"keep": "best"}, TrainingError, r"train\.keep: best is told by validation.*use last"),
        ({"freeze_epochs": 1}, ValidationError, r"freeze_epochs: freeze names nothing"),
        ({"optimiser": "adam"}, ValidationError, r"'sgd' or 'adamw'"),
        ({"ema": 1.0}, ValidationError, r"less than 1"),
    ],
)
def test_what_cannot_be_done_is_told(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = convnet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        fit(model, ToyBatches(), recipe=recipe(**options))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not moved(before, model.state_dict())


def test_decay_and_learning_rate_fall_on_what_they_are_for() -> None:
    model = convnet()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        (group["factor"], group.get("weight_decay")): {names[id(p)] for p in group["params"]}
        for group in parameter_groups(model, 10.0, decay_norms=False)
    }
    assert found == {
        (1.0, None): {"0.weight", "3.weight"},
        (1.0, 0.0): {"1.weight", "1.bias", "4.weight", "4.bias"},
        (10.0, None): {"8.weight"},
        (10.0, 0.0): {"8.bias"},
    }
    assert len(parameter_groups(model)) == 1


def test_the_running_mean_is_that_of_the_steps_and_is_what_is_judged() -> None:
    model, seen = convnet(), list[dict[str, Tensor]]()

    class Watched(ToyBatches):
        def epoch(self, number, needs=None):  # type: ignore[no-untyped-def, override]
            for batch in super().epoch(number, *([] if needs is None else [needs])):
                yield batch
                seen.append(copy.deepcopy(model.state_dict()))

    plain = copy.deepcopy(model)
    history = fit(model, Watched(), recipe=recipe(epochs=2, ema=0.7), validation=ToyBatches())
    mean = seen[0]
    for state in seen[1:]:
        mean = {name: torch.lerp(value, state[name], 0.3) for name, value in mean.items() if value.is_floating_point()}
    for name, value in mean.items():
        torch.testing.assert_close(model.state_dict()[name], value)
    judged = fit(plain, ToyBatches(), recipe=recipe(epochs=2), validation=ToyBatches())
    assert [r["train/loss"] for r in judged] == [r["train/loss"] for r in history], "training itself is the same"
    assert [r["val/nll"] for r in judged] != [r["val/nll"] for r in history]


def test_the_best_epoch_is_kept() -> None:
    """A network that learns the opposite of what validation asks has its best epoch first."""

    class Opposite(ToyBatches):
        def epoch(self, number, needs=None):  # type: ignore[no-untyped-def, override]
            for batch in super().epoch(number, *([] if needs is None else [needs])):
                yield batch._replace(labels=(batch.labels + 1) % 3)

    model, after = convnet(), list[dict[str, Tensor]]()
    history = fit(
        model,
        ToyBatches(),
        recipe=recipe(keep="best", warmup_epochs=0),
        validation=Opposite(),
        on_epoch=lambda _: after.append(copy.deepcopy(model.state_dict())),
    )
    best = max(history, key=lambda record: (record["val/top1"], -record["val/nll"]))
    assert kept(history, "best") is best is not history[-1]
    assert not moved(after[int(best["epoch"]) - 1], model.state_dict())


def test_a_mask_that_moves_is_exact_in_the_mean() -> None:
    from epsd.training.moving import RigL

    model, masks = convnet(), list[Mask]()
    mask = half(model)
    options = recipe(optimiser="adamw", lr=0.01, ema=0.5)
    fit(model, ToyBatches(), mask=mask, moving=RigL(every=3), recipe=options, on_mask=masks.append)
    assert len(masks) > 3
    assert all(not p[~masks[-1].keep[name]].any() for name, p in prunable(model).items())
