"""The adjoint recursion against unrolled autograd and finite differences, and that it leaves the model alone."""

import copy
import random
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from epsd.losses import supervised
from epsd.masks import prunable
from epsd.objectives import OBJECTIVES
from epsd.pruning.metagradients import gradient_norms, mask_gradient
from epsd.pruning.scoring import Following, MetaGradientError, normalised, scoring
from epsd.pruning.unroll import Unroll
from epsd.types import Batch, EpsdError, Forward, Loss
from toys import ToyBatches, convnet, mlp

DOUBLE = torch.float64


def draw(count: int, dtype: torch.dtype = DOUBLE, partner: str = "none") -> list[Batch]:
    from epsd.types import BatchNeeds

    return list(ToyBatches(dtype=dtype, size=96, shape=(1, 4, 3)).epoch(0, BatchNeeds(partner)))[:count]


def unrolled(
    model: nn.Module, batches: list[Batch], lr: float, momentum: float, detach_first: bool = False
) -> dict[str, Tensor]:
    """Plain automatic differentiation through all steps: the definition, at the cost of every graph."""
    names = list(prunable(model))
    start = {name: p.detach() for name, p in model.named_parameters()}
    masks = {name: torch.ones_like(start[name]).requires_grad_() for name in names}
    theta = {name: (w * masks[name] if name in masks else w.clone().requires_grad_()) for name, w in start.items()}
    velocity: list[Tensor] | None = None

    def loss(batch: Batch) -> Tensor:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return F.cross_entropy(functional_call(model, {**theta, **buffers}, (batch.images,)), batch.labels)

    for batch in batches[:-1]:
        gradient = torch.autograd.grad(loss(batch), list(theta.values()), create_graph=True)
        if velocity is None:
            velocity = [g.detach() for g in gradient] if detach_first and momentum else list(gradient)
        else:
            velocity = [momentum * v + g for v, g in zip(velocity, gradient, strict=True)]
        theta = {name: w - lr * v for (name, w), v in zip(theta.items(), velocity, strict=True)}
    return dict(zip(names, torch.autograd.grad(loss(batches[-1]), list(masks.values())), strict=True))


def assert_same(ours: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for name, expected in reference.items():
        assert (ours[name] - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-30), name


@pytest.mark.parametrize("graphs_kept", [0, 1, 99])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("make", [mlp, lambda: convnet(dtype=DOUBLE)], ids=["mlp", "convnet"])
def test_full_equals_unrolled_autograd(
    make: Callable[[], nn.Module], steps: int, momentum: float, graphs_kept: int
) -> None:
    model, batches = make(), draw(steps + 1)
    with scoring(model):
        ours = mask_gradient(
            model, supervised, batches, list(prunable(model)), lr=0.3, momentum=momentum, graphs_kept=graphs_kept
        )
        assert_same(ours.gradient, unrolled(model, batches, 0.3, momentum))


def test_the_official_detached_first_buffer() -> None:
    model, batches = mlp(), draw(4)
    names = list(prunable(model))
    with scoring(model):
        official = mask_gradient(model, supervised, batches, names, lr=0.3, momentum=0.9, detach_first_step=True)
        exact = mask_gradient(model, supervised, batches, names, lr=0.3, momentum=0.9)
        assert_same(official.gradient, unrolled(model, batches, 0.3, 0.9, detach_first=True))
    assert not torch.allclose(official.gradient["1.weight"], exact.gradient["1.weight"], rtol=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_full_equals_finite_differences(momentum: float) -> None:
    """Identity 10: perturb one mask entry, run the steps again."""
    model, batches = mlp(), draw(4)
    with scoring(model):
        gradient = mask_gradient(model, supervised, batches, ["1.weight"], lr=0.2, momentum=momentum).gradient[
            "1.weight"
        ]

    def outer(change: float) -> float:
        work = copy.deepcopy(model)
        with torch.no_grad():
            work[1].weight[2, 5] *= 1 + change
        velocity = [torch.zeros_like(p) for p in work.parameters()]
        for batch in batches[:-1]:
            loss = F.cross_entropy(work(batch.images), batch.labels)
            with torch.no_grad():
                for p, v, g in zip(
                    work.parameters(), velocity, torch.autograd.grad(loss, list(work.parameters())), strict=True
                ):
                    v.mul_(momentum).add_(g)
                    p -= 0.2 * v
        return F.cross_entropy(work(batches[-1].images), batches[-1].labels).item()

    step = 1e-5
    assert float(gradient[2, 5]) == pytest.approx((outer(step) - outer(-step)) / (2 * step), rel=1e-6, abs=1e-10)


def test_readings_agree_without_steps_and_differ_with_them() -> None:
    model = mlp()
    names = list(prunable(model))
    with scoring(model):
        none = [mask_gradient(model, supervised, draw(1), names, reading=r).gradient for r in _READINGS]
        some = [mask_gradient(model, supervised, draw(4), names, lr=0.3, reading=r).gradient for r in _READINGS]
    assert_same(none[1], none[0])
    assert_same(none[2], none[0])
    assert not torch.allclose(some[0]["1.weight"], some[1]["1.weight"], rtol=1e-3)
    assert not torch.allclose(some[1]["1.weight"], some[2]["1.weight"], rtol=1e-3)


_READINGS = ("full", "first_order", "local")


def test_first_order_is_the_last_gradient_times_the_initial_weights() -> None:
    """Identity 10, second half: against SGD steps taken by torch's own optimiser."""
    model, batches = mlp(), draw(4)
    with scoring(model):
        first = mask_gradient(model, supervised, batches, ["1.weight"], lr=0.2, momentum=0.9, reading="first_order")
        local = mask_gradient(model, supervised, batches, ["1.weight"], lr=0.2, momentum=0.9, reading="local")
    work = copy.deepcopy(model)
    optimiser = torch.optim.SGD(work.parameters(), lr=0.2, momentum=0.9)
    for batch in batches[:-1]:
        optimiser.zero_grad()
        F.cross_entropy(work(batch.images), batch.labels).backward()
        optimiser.step()
    work.zero_grad()
    F.cross_entropy(work(batches[-1].images), batches[-1].labels).backward()
    assert_same(first.gradient, {"1.weight": work[1].weight.grad * model[1].weight.detach()})
    assert_same(local.gradient, {"1.weight": work[1].weight.grad * work[1].weight.detach()})


def test_one_step_full_is_the_curvature_formula() -> None:
    """i = 1 without momentum: θ_init ⊙ (I − η H₀) g₁, H₀ written out."""
    model, batches = mlp(), draw(2)
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(vector: Tensor, batch: Batch) -> Tensor:
        pieces = torch.split(vector, [s.numel() for s in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, weights, (batch.images,)), batch.labels)

    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(lambda v: loss(v, batches[0]), start)
    first = torch.autograd.functional.jacobian(lambda v: loss(v, batches[0]), start)
    second = torch.autograd.functional.jacobian(lambda v: loss(v, batches[1]), start - 0.3 * first)
    expected = start * (second - 0.3 * hessian @ second)
    with scoring(model):
        ours = mask_gradient(model, supervised, batches, names, lr=0.3).gradient
    assert_same({"all": torch.cat([ours[name].flatten() for name in names])}, {"all": expected}, 1e-10)


@pytest.mark.parametrize("objective", ["cskd", "dlb", "pskd"])
@pytest.mark.parametrize("graphs_kept", [0, 9])
def test_stateful_objectives_give_the_same_in_both_ways_of_going_back(objective: str, graphs_kept: int) -> None:
    model = convnet(dtype=DOUBLE)
    sd = OBJECTIVES[objective]()
    batches = draw(4, partner=sd.needs.partner)
    sd.begin("score", 96, 3)
    with scoring(model):
        one = mask_gradient(model, Following(sd), batches, list(prunable(model)), lr=0.3)
        sd.begin("score", 96, 3)
        two = mask_gradient(model, Following(sd), batches, list(prunable(model)), lr=0.3, graphs_kept=graphs_kept)
    assert_same(two.gradient, one.gradient)


@pytest.mark.parametrize("objective", ["cross_entropy", "cskd", "dlb", "pskd"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_micro_batches_are_exact_without_batch_statistics(objective: str, momentum: float) -> None:
    model = mlp()
    sd = OBJECTIVES[objective]()
    sd.begin("score", 96, 3)
    batches = draw(4, partner=sd.needs.partner)
    with scoring(model):
        whole = mask_gradient(model, Following(sd), batches, list(prunable(model)), lr=0.3, momentum=momentum)
        parts = mask_gradient(
            model, Following(sd), batches, list(prunable(model)), lr=0.3, momentum=momentum, micro_batch=4
        )
    assert_same(parts.gradient, whole.gradient, 1e-11)
    assert parts.losses == pytest.approx(whole.losses)


def test_dropout_sees_the_same_noise_forwards_and_backwards() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3)).double()
    batches = draw(4)
    results = []
    for graphs_kept in (0, 9):
        torch.manual_seed(5)
        with scoring(model):
            results.append(mask_gradient(model, supervised, batches, list(prunable(model)), graphs_kept=graphs_kept))
    assert_same(results[0].gradient, results[1].gradient)
    torch.manual_seed(5)
    with scoring(model):
        assert_same(results[0].gradient, unrolled(model, batches, 0.1, 0.0))


class Custom(nn.Module):
    """Tied weights, a bare parameter, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 12)
        self.again = nn.Linear(12, 12)
        self.again.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(12))
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.last = nn.Linear(12, 3)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(images.flatten(1))) * self.scale
        return self.last(torch.tanh(self.frozen(torch.tanh(self.again(hidden)))))


def test_tied_bare_and_frozen_parameters() -> None:
    model, batches = Custom(), draw(3)
    names = list(prunable(model))
    assert names == ["first.weight", "last.weight"]
    with scoring(model):
        gradient = mask_gradient(model, supervised, batches, names, lr=0.3).gradient

    def outer(change: float) -> float:
        work = copy.deepcopy(model)
        with torch.no_grad():
            work.first.weight[3, 4] *= 1 + change
        optimiser = torch.optim.SGD([p for p in work.parameters() if p.requires_grad], lr=0.3)
        for batch in batches[:-1]:
            optimiser.zero_grad()
            F.cross_entropy(work(batch.images), batch.labels).backward()
            optimiser.step()
        return F.cross_entropy(work(batches[-1].images), batches[-1].labels).item()

    expected = (outer(1e-5) - outer(-1e-5)) / 2e-5
    assert float(gradient["first.weight"][3, 4]) == pytest.approx(expected, rel=1e-6, abs=1e-10)


def test_attention_is_differentiated_twice() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True, dtype=DOUBLE)
    model = nn.Sequential(
        nn.Flatten(2), nn.Linear(12, 12, dtype=DOUBLE), layer, nn.Flatten(), nn.Linear(12, 3, dtype=DOUBLE)
    )
    batches = draw(3)
    with scoring(model):
        ours = mask_gradient(model, supervised, batches, list(prunable(model)), lr=0.1)
        assert_same(ours.gradient, unrolled(model, batches, 0.1, 0.0), 1e-10)


@pytest.mark.parametrize("activation", [nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Mish, nn.ELU])
def test_activations_are_differentiated_twice(activation: type[nn.Module]) -> None:
    """Also those whose kernels torch cannot (MobileNetV3's): against the definition, unrolled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), activation(), nn.Linear(8, 3)).double()
    batches = draw(3)
    with scoring(model):
        ours = mask_gradient(model, supervised, batches, list(prunable(model)), lr=0.3)
        assert ours.losses[0] == pytest.approx(F.cross_entropy(model(batches[0].images), batches[0].labels).item())
        assert_same(ours.gradient, unrolled(model, batches, 0.3, 0.0))


def test_scoring_leaves_everything_as_it_was() -> None:
    """Identity 8: parameters, buffers, gradients, random state, and each module's own mode."""
    model = convnet()
    model.train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    with scoring(model):
        batches = list(ToyBatches().epoch(0))
        mask_gradient(model, supervised, batches, list(prunable(model)))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None


class Blocks(nn.Module):
    """Two blocks, the first of which may be evaluated again on the way back."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 3, padding=1))
        self.head = nn.Linear(48, 3)
        self.checkpointed = checkpointed
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        inner = checkpoint(self.block, images, use_reentrant=False) if self.checkpointed else self.block(images)
        return self.head(inner.flatten(1))


@pytest.mark.parametrize("reading", ["full", "first_order"])
def test_checkpointed_activations_are_refused(reading: str) -> None:
    """Evaluated again after the call, they would be those of the initial weights."""
    batches = draw(3)
    for checkpointed in (False, True):
        model = Blocks(checkpointed)
        with scoring(model):
            if not checkpointed:
                assert mask_gradient(model, supervised, batches, list(prunable(model)), reading=reading).gradient
                continue
            with pytest.raises(MetaGradientError, match="activation checkpointing"):
                mask_gradient(model, supervised, batches, list(prunable(model)), reading=reading)


def test_a_compiled_network_is_differentiated_as_it_was_written() -> None:
    plain, batches = convnet(dtype=DOUBLE), draw(3)
    compiled = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    with scoring(plain):
        expected = mask_gradient(plain, supervised, batches, list(prunable(plain)), lr=0.3).gradient
    with scoring(compiled):
        found = mask_gradient(compiled, supervised, batches, list(prunable(compiled)), lr=0.3).gradient
    assert_same({name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}, expected)


class Dropping(nn.Module):
    """A layer that is left out by chance, drawn in Python or numpy, as stochastic depth often is."""

    def __init__(self, drawn: Callable[[], float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.drawn = drawn
        self.first, self.maybe, self.last = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(images.flatten(1)))
        return self.last(torch.tanh(self.maybe(hidden)) if self.drawn() < 0.5 else hidden)


@pytest.mark.parametrize("drawn", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_whatever_is_drawn_is_drawn_again(drawn: Callable[[], float]) -> None:
    model, batches = Dropping(drawn), draw(5)
    before = drawn(), random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    results = []
    for graphs_kept in (0, 4):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        with scoring(model):
            results.append(mask_gradient(model, supervised, batches, list(prunable(model)), graphs_kept=graphs_kept))
        assert random.getstate() == states[0]
        assert np.array_equal(np.random.get_state()[1], states[1]) and torch.equal(torch.get_rng_state(), states[2])
    assert before
    assert_same(results[0].gradient, results[1].gradient)


def test_gradients_are_on_while_scoring() -> None:
    model, batches = mlp(), draw(2)
    with scoring(model):
        expected = mask_gradient(model, supervised, batches, ["1.weight"]).gradient
    for off in (torch.no_grad(), torch.inference_mode()):
        with off, scoring(model):
            found = mask_gradient(model, supervised, batches, ["1.weight"]).gradient
        assert_same(found, expected)


def test_what_is_no_logits_is_named() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(images)}

    model = Named()
    with scoring(model), pytest.raises(EpsdError, match=r"gives dict, not logits \(B, K\)"):
        mask_gradient(model, supervised, draw(1), ["inner.1.weight"])


@pytest.mark.parametrize("objective", ["cross_entropy", "pskd"])
def test_a_label_without_an_output_is_named(objective: str) -> None:
    model = mlp(classes=2)
    loss = Following(OBJECTIVES[objective]())
    with scoring(model), pytest.raises(MetaGradientError, match=r"a label is .*: the network has no output for it"):
        mask_gradient(model, loss, draw(1), ["1.weight"])


def test_readings_of_first_order_keep_the_first_and_the_last_weights_alone() -> None:
    model, live = mlp(), OBJECTIVES["pskd"]()  # which remembers the network of the last step
    live.begin("score", 96, 3)
    unroll = Unroll(model, Following(live), for_return=False)
    before = weakref.ref(unroll.weights[0]["1.weight"])
    unroll.advance(draw(6))
    assert len(unroll.weights) == 2 and not any(unroll._parts)
    assert before() is unroll.weights[0]["1.weight"]


def test_half_precision_weights_get_scores_in_single() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 500), nn.Tanh(), nn.Linear(500, 3))
    batches, scores = draw(1, torch.float32), []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        given = [batch._replace(images=batch.images.to(dtype)) for batch in batches]
        with scoring(model):
            scores.append(normalised(mask_gradient(model, supervised, given, list(prunable(model))).gradient))
    assert all(score.dtype == torch.float32 for score in scores[1].values())
    for name, score in scores[1].items():
        assert int((score == 0).sum()) <= int((scores[0][name] == 0).sum()) + 2
        assert len(score.unique()) > 0.9 * score.numel()


class Once(torch.autograd.Function):
    """Differentiable once only."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient.clone()


def once(forward: Forward, batch: Batch) -> Loss:
    logits = forward(batch.images)
    total = F.cross_entropy(Once.apply(logits), batch.labels)
    return Loss(total, {}, logits.detach())


def test_a_loss_that_is_differentiable_only_once_is_refused_by_full_alone() -> None:
    model, batches = mlp(), draw(2)
    with scoring(model):
        assert mask_gradient(model, once, batches, ["1.weight"], reading="first_order").gradient
        with pytest.raises(MetaGradientError, match="not differentiable twice"):
            mask_gradient(model, once, batches, ["1.weight"])


def test_a_loss_without_gradient_is_refused() -> None:
    def constant(forward: Forward, batch: Batch) -> Loss:
        with torch.no_grad():
            logits = forward(batch.images)
        return Loss(logits.sum(), {}, logits)

    model = mlp()
    with scoring(model), pytest.raises(MetaGradientError, match="not differentiable"):
        mask_gradient(model, constant, draw(1), ["1.weight"])


def test_gradient_norms_are_those_of_the_summands() -> None:
    model = mlp()
    sd = OBJECTIVES["cskd"](temperature=4.0, weight=2.0)
    batches = draw(3, partner="same_class")
    with scoring(model):
        norms = gradient_norms(model, Following(sd), batches, lr=0.3)
    parts = sd.loss(model, batches[0], 1.0).parts
    for name, part in parts.items():
        gradient = torch.autograd.grad(part, list(model.parameters()), retain_graph=True)
        expected = torch.cat([g.flatten() for g in gradient]).norm()
        assert norms[0][name] == pytest.approx(float(expected))
    assert len(norms) == 3
    with scoring(model):  # without batch statistics, parts of a batch make no difference
        parted = gradient_norms(model, Following(sd), batches, lr=0.3, micro_batch=5)
    for one, other in zip(norms, parted, strict=True):
        assert one == pytest.approx(other)
