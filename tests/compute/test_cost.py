"""The meter counts what is executed: by hand for every objective and score, and against torch's own FLOP counter."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from epsd.compute.cost import Meter
from epsd.losses import cross_entropy
from epsd.masks import prunable
from epsd.objectives import OBJECTIVES
from epsd.project.recipes import Recipe
from epsd.pruning.metagradients import gradient_norms, mask_gradient
from epsd.pruning.prune import prune
from epsd.pruning.scoring import Following, scoring
from epsd.scores import SCORES
from epsd.training.fit import fit
from toys import ToyBatches, convnet, mlp

B = 12  # images in a batch of ToyBatches


def counts(meter: Meter) -> tuple[int, int, int]:
    return meter.images_forward, meter.images_backward, meter.images_second_order


def scored(name: str, objective: str = "cross_entropy", **settings: object) -> tuple[int, int, int]:
    model, meter = convnet(), Meter()
    with meter.watching(model):
        prune(model, ToyBatches(), score=SCORES[name](**settings), sparsity=0.5, objective=OBJECTIVES[objective]())
    return counts(meter)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("random", {}, (0, 0, 0)),
        ("magnitude", {}, (0, 0, 0)),
        ("snip", {}, (B, B, 0)),
        ("snip", {"batches": 3}, (3 * B, 3 * B, 0)),
        ("synflow", {}, (1, 1, 0)),
        ("grasp", {"samples_per_class": None, "batches": 2}, (4 * B, 4 * B, 2 * B)),
        ("prospr", {"steps": 3, "reading": "first_order"}, (4 * B, 4 * B, 0)),
        ("prospr", {"steps": 3}, (4 * B, 4 * B, 3 * B)),
        ("prospr", {"steps": 3, "graphs_kept": 1}, (6 * B, 6 * B, 3 * B)),
        ("prospr", {"steps": 3, "graphs_kept": 0}, (7 * B, 7 * B, 3 * B)),  # 3 gradients again for their curvature
        ("prospr", {"steps": 3, "micro_batch": 5}, (4 * B, 4 * B, 3 * B)),
    ],
)
def test_what_a_score_executes(name: str, settings: dict[str, object], expected: tuple[int, int, int]) -> None:
    assert scored(name, **settings) == expected


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("cross_entropy", (5, 5, 2)),
        ("cskd", (10, 5, 2)),  # the partner: forwards only
        ("pskd", (10, 5, 2)),  # the past prediction of the same images: forwards only
        ("dlb", (8, 8, 3)),  # 1 + 2 + 2, as every step but the first sends the batch before through too; then 2 + 1
    ],
)
def test_what_epsd_executes_under_each_objective(objective: str, expected: tuple[int, int, int]) -> None:
    """Two look-ahead steps, the outer loss, and the two steps again on the way back."""
    assert scored("epsd", objective, steps=2, graphs_kept=0) == tuple(B * each for each in expected)


@pytest.mark.parametrize(
    ("objective", "forward", "backward"),
    [("cross_entropy", 8, 8), ("cskd", 16, 8), ("pskd", 8, 8), ("dlb", 15, 15)],
)
def test_what_training_executes(objective: str, forward: int, backward: int) -> None:
    """Two epochs of four steps; the validation after each is not counted."""
    history = fit(
        convnet(),
        ToyBatches(),
        objective=OBJECTIVES[objective](),
        recipe=Recipe(epochs=2, lr=0.01),
        validation=ToyBatches(),
        meter=Meter(images_forward=1000),
    )
    assert history[-1]["cost/images_forward"] == 1000 + forward * B
    assert history[-1]["cost/images_backward"] == backward * B
    assert history[-1]["cost/image_passes"] == 1000 + (forward + 2 * backward) * B
    assert history[-1]["cost/seconds"] == pytest.approx(sum(record["time/epoch"] for record in history))


def test_a_gradient_taken_twice_of_one_graph_is_charged_twice() -> None:
    """As the comparison of the prune report does: the norm of each summand, one forward pass."""
    model, meter, batch = convnet(), Meter(), next(ToyBatches().epoch(0, OBJECTIVES["cskd"]().needs))
    with meter.watching(model), scoring(model):
        gradient_norms(model, Following(OBJECTIVES["cskd"]()), [batch])
    assert counts(meter) == (2 * B, 2 * B, 0)


def test_nothing_is_counted_after_the_block_and_in_another_network() -> None:
    model, other, meter = convnet(), convnet(), Meter()
    images = torch.zeros(2, 1, 4, 4)
    with meter.watching(model):
        other(images)
        copy.deepcopy(model)(images)
    model(images)
    assert counts(meter) == (2, 0, 0)


def test_counting_changes_no_result() -> None:
    model = convnet()
    batches = list(ToyBatches().epoch(0))[:3]
    found = []
    for watched in (False, True):
        with Meter().watching(model if watched else nn.Identity()), scoring(model):
            loss = Following(OBJECTIVES["cross_entropy"]())
            found.append(mask_gradient(model, loss, batches, list(prunable(model))).gradient)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_weights_of_the_passes_are_those_of_the_operations() -> None:
    """Forward 1, training step 3, Hessian-vector product 9: torch counts the products of the wide layers so."""
    width = 96
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(12)))
    images, labels = torch.randn(8, width), torch.arange(8)
    weights = list(model.parameters())

    def executed(work: Callable[[], object]) -> tuple[float, float]:
        """(products by torch's count, passes by ours), of one forward pass and of one image."""
        with Meter().watching(model) as meter, FlopCounterMode(display=False) as flops:
            work()
        return flops.get_total_flops() / one, meter.image_passes / len(images)

    with FlopCounterMode(display=False) as flops:
        model(images)
    one = flops.get_total_flops()

    def step() -> object:
        return torch.autograd.grad(cross_entropy(model(images), labels), weights)

    def product() -> object:
        gradient = torch.autograd.grad(cross_entropy(model(images), labels), weights, create_graph=True)
        return torch.autograd.grad(gradient, weights, [torch.randn_like(w) for w in weights])

    for work, passes in ((lambda: model(images), 1), (step, 3), (product, 9)):
        assert executed(work) == (pytest.approx(passes, rel=0.1), passes)


def test_a_meter_goes_on_where_another_stood() -> None:
    first = Meter(3, 2, 1, 0.5)
    assert first.figures("cost/")["cost/image_passes"] == 3 + 4 + 6
    assert Meter.of(first.figures("cost/"), "cost/") == first
    assert Meter.of({"sparsity": 0.5}) == Meter()
    second = Meter()
    second.stand_at(first)
    assert second == first


def test_a_plain_forward_can_be_counted() -> None:
    meter, model = Meter(), mlp()
    forward = meter.through(model)
    with torch.no_grad():
        forward(torch.zeros(5, 12, dtype=torch.float64))
    forward(torch.zeros(4, 12, dtype=torch.float64)).sum().backward()
    assert counts(meter) == (9, 4, 0)
