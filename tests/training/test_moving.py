"""Masks that move while training: schedules by hand, exact at every step, a killed run goes on bit for bit."""

import copy
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epsd.masks import Mask, MaskError, prunable
from epsd.objectives import OBJECTIVES
from epsd.project.recipes import Recipe
from epsd.training.fit import fit
from epsd.training.moving import Gradual, Moving, Removing, RigL
from toys import Killed, ToyBatches, convnet, stop_after

NAMES = sorted(OBJECTIVES)
STEPS = 20  # 5 epochs of 4 steps
KINDS: dict[str, Moving] = {
    "gradual": Removing(Gradual(start=0.1, end=0.7, every=3), 0.9, {"keep_at_least_one": True}),
    "rigl": RigL(every=3, share=0.5, end=0.8),
}


def start(kind: str, model: nn.Module) -> Mask:
    magnitudes = {name: p.detach().abs() for name, p in prunable(model).items()}
    return Mask.dense(model) if kind == "gradual" else Mask.from_scores(magnitudes, 0.8, "erk")


class Watching:
    """Another's moves, with all that it saw."""

    def __init__(self, other: Moving) -> None:
        self.other, self.instead_of_step = other, other.instead_of_step  # type: ignore[misc]
        self.seen: list[tuple[Mask, dict[str, Tensor], Mask | None]] = []

    def moved(
        self, mask: Mask, step: int, steps: int, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> Mask | None:
        assert (step, steps) == (len(self.seen), STEPS)
        now = {name: weight.detach().clone() for name, weight in weights.items()}
        found = self.other.moved(mask, step, steps, weights, gradients)
        self.seen.append((mask, now, found))
        return found


def train(model: nn.Module, kind: str, objective: str, **options: Any) -> Mask:
    recipe = Recipe(epochs=5, lr=0.1, schedule="cosine", weight_decay=0.1)
    last: deque[Mask] = deque(maxlen=1)
    given: dict[str, Any] = {"moving": KINDS[kind], "mask": start(kind, model), "on_mask": last.append, **options}
    fit(model, ToyBatches(), objective=OBJECTIVES[objective](), recipe=recipe, **given)
    return last[0]


def test_the_cubic_schedule_by_hand() -> None:
    """Between the steps 10 and 50 of 100, every 10: 1 − (1 − t)³ at t = 0, 1/4, ..., 1."""
    schedule = Gradual(start=0.1, end=0.5, every=10)
    found = {step: schedule.share(step, 100) for step in range(100)}
    expected = {10: 0.0, 20: 37 / 64, 30: 7 / 8, 40: 63 / 64, 50: 1.0}
    assert {step: share for step, share in found.items() if share is not None} == pytest.approx(expected)
    assert Gradual(start=0.0, end=1.0, every=7).share(99, 100) == 1.0, "the last step at the latest"
    assert Gradual(start=0.5, end=0.5).share(50, 100) == 1.0


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_gradual_pruning_removes_the_smallest_and_meets_the_sparsity_exactly(sparsity: float) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(40, 30), "b": torch.randn(10, 40)}
    removing, mask = (
        Removing(Gradual(end=0.5, every=10), sparsity),
        Mask({n: w.bool() | True for n, w in weights.items()}),
    )
    for step in range(100):
        moved = removing.moved(mask, step, 100, weights, {})
        if moved is not None:
            wanted = sparsity * (1 - (1 - step / 50) ** 3)
            assert abs(moved.sparsity - wanted) <= 1 / mask.total
            mask = moved
    magnitudes = {name: weight.abs() for name, weight in weights.items()}
    assert mask == Mask.from_scores(magnitudes, sparsity)


def test_rigl_by_hand() -> None:
    """Half of four weights move: the two smallest go, the two largest gradients come, one of those just removed."""
    weight = torch.tensor([[5.0, -1.0, 2.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    gradient = torch.tensor([[9.0, 8.0, 0.0, 9.0], [1.0, -7.0, 2.0, 3.0]])
    mask = Mask({"w": weight != 0})
    rigl = RigL(every=10, share=1.0, end=1.0)  # (1 + cos(π/2)) / 2 of them at half time
    moved = rigl.moved(mask, 50, 100, {"w": weight}, {"w": gradient})
    assert moved is not None
    assert moved.keep["w"].tolist() == [[True, True, False, True], [False, True, False, False]]
    for step in (0, 55, 100):
        assert rigl.moved(mask, step, 100, {"w": weight}, {"w": gradient}) is None
    assert RigL(every=10, end=0.3).moved(mask, 30, 100, {"w": weight}, {"w": gradient}) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_exact_at_every_step(kind: str, name: str) -> None:
    model, watching = convnet(), Watching(KINDS[kind])
    last = train(model, kind, name, moving=watching)
    moves = [found for _, _, found in watching.seen if found is not None]
    assert len(moves) == {"gradual": 4, "rigl": 5}[kind]
    for mask, weights, _ in watching.seen:
        for layer, keep in mask.keep.items():
            assert not weights[layer][~keep].any()
            assert not torch.signbit(weights[layer][~keep]).any(), "+0: a file stores no value for it"
    assert last == moves[-1]
    assert all(not p[~last.keep[layer]].any() for layer, p in prunable(model).items())
    if kind == "rigl":
        begun = start(kind, convnet()).per_layer()
        assert all(mask.per_layer() == begun for mask, _, _ in watching.seen)
        assert len(set(moves)) > 1
    else:
        kept = [mask.kept for mask, _, _ in watching.seen]
        assert kept == sorted(kept, reverse=True) and last.kept == last.total - round(0.9 * last.total)


def test_a_step_that_moves_trains_nothing_and_newcomers_start_at_zero() -> None:
    watching = Watching(KINDS["rigl"])
    train(convnet(), "rigl", "cross_entropy", moving=watching)
    for (mask, before, moved), (_, after, _) in zip(watching.seen, watching.seen[1:], strict=False):
        for layer, keep in mask.keep.items():
            if moved is None:
                assert keep.sum() < 10 or not torch.equal(before[layer], after[layer])
            else:
                stayed = keep & moved.keep[layer]
                assert torch.equal(before[layer][stayed], after[layer][stayed])
                assert not after[layer][moved.keep[layer] & ~keep].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epochs", [1, 4])
def test_a_killed_training_goes_on_bit_for_bit(kind: str, epochs: int, tmp_path: Path) -> None:
    whole, resumed = convnet(), convnet()
    expected = train(whole, kind, "dlb")
    options: dict[str, Any] = {"checkpoint": tmp_path / "last.safetensors"}
    with pytest.raises(Killed):
        train(copy.deepcopy(resumed), kind, "dlb", on_epoch=stop_after(epochs), **options)
    found = train(resumed, kind, "dlb", **options)
    assert found == expected
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    again = convnet()
    assert train(again, kind, "dlb", **options) == expected, "a training that is over says what its last mask was"
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


def test_other_settings_do_not_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    from epsd.training.checkpoints import CheckpointError

    path = tmp_path / "last.safetensors"
    train(convnet(), "rigl", "cross_entropy", checkpoint=path)
    with pytest.raises(CheckpointError):
        train(convnet(), "rigl", "cross_entropy", checkpoint=path, moving=RigL(every=4))


def test_what_cannot_be_reached_is_said() -> None:
    removing = Removing(Gradual(end=0.0), 0.999, {})
    with pytest.raises(MaskError, match="fewer weights than layers"):
        train(convnet(), "gradual", "cross_entropy", moving=removing)
