"""The look-ahead keeps to its memory, and its scores do not change by it."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from epsd.compute.cost import Meter
from epsd.compute.memory import GIB, Saved
from epsd.losses import as_objective, supervised
from epsd.masks import Mask
from epsd.objectives import OBJECTIVES
from epsd.pruning.look_ahead import Need, Plan, measured, planned
from epsd.pruning.scoring import Following, Means, MetaGradientError, calling, scoring, within
from epsd.pruning.unroll import gradient_of
from epsd.scores import SCORES
from epsd.types import Batch, BatchNeeds
from toys import ToyBatches, convnet, mlp

DATA = ToyBatches()
BATCHES = list(DATA.epoch(0))


def plan(model: nn.Module, memory: float, **settings: object) -> Plan:
    with within(Means(memory)), scoring(model):
        return planned(model, supervised, BATCHES[0], SCORES["epsd"](**settings))


def need(model: nn.Module, steps: int = 3) -> Need:
    with scoring(model):
        return measured(model, supervised, BATCHES[0], steps)


def test_the_measure_is_what_the_whole_batch_keeps() -> None:
    model, batch = convnet(), BATCHES[0]
    found = need(model)
    weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    with scoring(model), Saved([*weights.values(), batch.images]) as saved:
        total = supervised(calling(model, weights, counted=True), batch).total
        plain = saved.bytes
        gradient = gradient_of(total, weights, create_graph=True)
    assert len(gradient) == len(weights)
    assert found.fixed + found.per_image * len(batch.labels) == pytest.approx(saved.bytes, rel=0.02)
    assert found.plain * len(batch.labels) == pytest.approx(plain, rel=0.1)


def test_objectives_that_remember_a_batch_are_measured_with_it() -> None:
    """DLB sends the batch before through the net as well: its graph is larger than the first step's."""
    batch = next(iter(DATA.epoch(0, BatchNeeds("view"))))
    dlb = OBJECTIVES["dlb"]()
    dlb.begin("score", DATA.size, DATA.num_classes)
    model = convnet()
    with scoring(model):
        assert measured(model, Following(dlb), batch, 3).per_image > 1.5 * need(model).per_image
    assert dlb.last == {}


def test_graphs_are_kept_as_the_memory_allows() -> None:
    model, images = convnet(), len(BATCHES[0].labels)
    found = need(model)
    for kept in range(4):
        enough = found.bytes(kept, images, images)
        assert plan(model, enough).graphs_kept >= kept
        if kept > 1:
            assert plan(model, enough - 1).graphs_kept == kept - 1
    assert plan(model, 100 * GIB) == Plan(3, None)
    assert plan(model, 0, graphs_kept=2) == Plan(2, None)
    assert plan(model, 0, reading="first_order") == Plan(0, None)


def test_fewer_images_at_once_where_that_is_exact() -> None:
    model = mlp(16, dtype=torch.float32)
    found = need(model)
    memory = found.bytes(0, 12, 5)
    assert plan(model, memory).micro_batch == 5
    with within(Means(memory)):
        parts = SCORES["epsd"]()(model, iter(BATCHES), OBJECTIVES["cross_entropy"]())
    whole = SCORES["epsd"](graphs_kept=0)(model, iter(BATCHES), OBJECTIVES["cross_entropy"]())
    for name, score in whole.items():
        assert torch.allclose(parts[name], score, rtol=1e-4)


@pytest.mark.parametrize("mean", [True, False])
def test_a_loss_of_ones_own_is_taken_in_parts_only_where_it_is_a_mean(mean: bool) -> None:
    model = mlp(16, dtype=torch.float32)
    memory = 1.01 * need(model).bytes(0, 12, 5)  # a hair more for what other losses keep
    losses: list[Any] = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)]
    if not mean:
        losses = [nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]))]
    for loss in losses:
        objective = as_objective(loss)
        if mean:
            whole = SCORES["epsd"](graphs_kept=0)(model, iter(BATCHES), objective)
            with within(Means(memory)):
                parts = SCORES["epsd"]()(model, iter(BATCHES), objective)
            assert all(torch.allclose(parts[name], score, rtol=1e-4) for name, score in whole.items())
        else:
            with within(Means(memory)), pytest.raises(MetaGradientError, match=r"micro_batch: \d, with which the loss"):
                SCORES["epsd"]()(model, iter(BATCHES), objective)


def test_too_little_memory_names_the_batch_that_fits() -> None:
    model = convnet()
    memory = need(model).bytes(0, 12, 7)
    with pytest.raises(MetaGradientError, match=r"scoring 12 images .* Set prune\.batch_size: 7; or .*micro_batch: 7"):
        plan(model, memory)
    with pytest.raises(MetaGradientError, match=r"one image needs .* Raise prune\.memory"):
        plan(model, 0)


def test_the_plan_changes_neither_scores_nor_random_state_nor_counts() -> None:
    model = nn.Sequential(convnet()[:-1], nn.Dropout(0.5), convnet()[-1])
    found, states = [], []
    for kept in ("auto", 3):
        torch.manual_seed(4)
        with Meter().watching(model) as meter:
            found.append(SCORES["epsd"](graphs_kept=kept)(model, iter(BATCHES), OBJECTIVES["cross_entropy"]()))
        states.append(torch.get_rng_state())
        assert meter.images_forward == 4 * 12
    assert all(torch.equal(score, found[1][name]) for name, score in found[0].items())
    assert torch.equal(*states)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_lower_precision_gives_nearly_the_same_mask(objective: str) -> None:
    model, masks = convnet(), []
    state = copy.deepcopy(model.state_dict())
    for precision in (None, torch.bfloat16):
        sd = OBJECTIVES[objective]()
        sd.begin("score", DATA.size, DATA.num_classes)
        with within(Means(precision=precision)):
            scores = SCORES["epsd"]()(model, DATA.epoch(0, sd.needs), sd)
        assert all(score.dtype == torch.float32 for score in scores.values())
        masks.append(Mask.from_scores(scores, 0.6))
    assert 0.7 < masks[0].jaccard(masks[1]) < 1.0
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_precision_reaches_the_convolutions() -> None:
    seen: list[torch.dtype] = []
    model = convnet()
    model[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    batch: Batch = BATCHES[0]
    with within(Means(precision=torch.bfloat16)), scoring(model):
        assert calling(model, {})(batch.images).dtype == torch.float32
    with scoring(model):
        calling(model, {})(batch.images)
    assert seen == [torch.bfloat16, torch.float32]
