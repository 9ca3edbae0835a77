"""Contract of every score, and the identities that it must satisfy."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from epsd.masks import Mask, prunable
from epsd.objectives import OBJECTIVES
from epsd.pruning.prune import prune
from epsd.pruning.scoring import MetaGradientError
from epsd.registry import ParamsError, choose
from epsd.scores import SCORES
from epsd.types import BatchNeeds, Scores
from toys import ToyBatches, convnet, mlp

NAMES = sorted(SCORES)
CE = OBJECTIVES["cross_entropy"]()
DATA = ToyBatches(dtype=torch.float64, shape=(1, 4, 3))


def score(name: str, model: nn.Module, objective: str = "cross_entropy", **settings: object) -> Scores:
    sd = OBJECTIVES[objective]()
    sd.begin("score", DATA.size, DATA.num_classes)
    return SCORES[name](**settings)(model, DATA.epoch(0, sd.needs), sd)


def flat(scores: Scores) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in scores.values()])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_contract(name: str, objective: str) -> None:
    """One finite score per prunable weight; model, buffers, gradients, modes and random state untouched."""
    settings = {"samples_per_class": 2} if name == "grasp" else {}
    model = convnet(dtype=torch.float64)
    model[4].eval()
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    sd = OBJECTIVES[objective]()
    data = ToyBatches(dtype=torch.float64)
    sd.begin("score", data.size, data.num_classes)
    scores = SCORES[name](**settings)(model, data.epoch(0, sd.needs), sd)
    assert list(scores) == list(prunable(model))
    for key, value in scores.items():
        assert value.shape == model.get_parameter(key).shape
        assert torch.isfinite(value).all()
        assert not value.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_mask(name: str) -> None:
    """Identity 12."""
    settings = {"samples_per_class": 2} if name == "grasp" else {}
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append(Mask.from_scores(score(name, mlp(), **settings), 0.7))
    assert masks[0].jaccard(masks[1]) == 1.0


@pytest.mark.parametrize("reading", ["full", "first_order", "local"])
def test_no_steps_and_cross_entropy_is_snip(reading: str) -> None:
    """Identity 1, for all three readings."""
    snip = flat(score("snip", mlp()))
    assert torch.allclose(flat(score("epsd", mlp(), steps=0, reading=reading)), snip, rtol=1e-12)
    assert torch.allclose(flat(score("prospr", mlp(), steps=0, reading=reading)), snip, rtol=1e-12)


def test_epsd_under_cross_entropy_is_prospr() -> None:
    assert torch.equal(flat(score("epsd", mlp(), steps=2, lr=0.3)), flat(score("prospr", mlp(), steps=2, lr=0.3)))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_literal_pskd_is_cross_entropy(steps: int) -> None:
    """Identity 2: taken literally, PS-KD's mask is that of the simple combination for any number of steps."""
    literal = OBJECTIVES["pskd"](score="literal")
    ours, plain = (
        prune(mlp(), DATA, score=SCORES["epsd"](steps=steps, lr=0.3), sparsity=0.6, objective=objective)
        for objective in (literal, CE)
    )
    assert ours.jaccard(plain) > 0.999


def test_live_pskd_is_not_cross_entropy_from_the_first_step_on() -> None:
    assert not torch.allclose(
        flat(score("epsd", mlp(), "pskd", steps=2, lr=1.0)), flat(score("epsd", mlp(), steps=2, lr=1.0)), rtol=1e-3
    )


def test_dlb_without_steps_is_cross_entropy() -> None:
    """Identity 3: there is no last batch yet; with steps the distillation is live."""
    assert torch.allclose(flat(score("epsd", mlp(), "dlb", steps=0)), flat(score("epsd", mlp(), steps=0)), rtol=1e-12)
    assert not torch.allclose(
        flat(score("epsd", mlp(), "dlb", steps=2, lr=1.0)), flat(score("epsd", mlp(), steps=2, lr=1.0)), rtol=1e-3
    )


@pytest.mark.parametrize(("objective", "setting"), [("cskd", "weight"), ("pskd", "alpha")])
def test_without_weight_the_distillation_vanishes_from_the_score(objective: str, setting: str) -> None:
    """Identity 5: λ → 0, α → 0 give the simple combination."""
    nothing = OBJECTIVES[objective](**{setting: 0.0})
    plain = flat(score("epsd", mlp(), steps=2))
    nothing.begin("score", DATA.size, DATA.num_classes)
    ours = SCORES["epsd"](steps=2)(mlp(), DATA.epoch(0, nothing.needs), nothing)
    assert torch.allclose(flat(ours), plain, rtol=1e-10)


def test_dlb_without_weight_still_learns_the_second_view() -> None:
    """DLB's cross entropy covers the last batch too, so that α → 0 is cross entropy over both halves, not over one."""
    nothing = OBJECTIVES["dlb"](weight=0.0)
    nothing.begin("score", DATA.size, DATA.num_classes)
    ours = SCORES["epsd"](steps=1, lr=0.3)(mlp(), DATA.epoch(0, nothing.needs), nothing)
    assert not torch.allclose(flat(ours), flat(score("epsd", mlp(), steps=1, lr=0.3)), rtol=1e-3)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_scaled_loss_leaves_the_mask_alone(steps: int) -> None:
    """Identity 6: at i = 0; for i > 0 with the learning rate divided by the same factor."""

    def scaled(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 7 * F.cross_entropy(logits, labels)

    plain = prune(mlp(), DATA, score=SCORES["epsd"](steps=steps, lr=0.7), sparsity=0.6)
    ours = prune(mlp(), DATA, score=SCORES["epsd"](steps=steps, lr=0.1), sparsity=0.6, objective=scaled)
    assert ours.jaccard(plain) == 1.0


@pytest.mark.parametrize("name", ["epsd", "prospr", "snip"])
def test_scores_are_shares_of_one(name: str) -> None:
    assert flat(score(name, mlp())).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_random_densities(distribution: str, sparsity: float) -> None:
    """Uniform: every layer's density is the net's. ERK: min(1, ε·f) with one ε, to one weight."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(512, 100), nn.Linear(100, 10))
    mask = Mask.from_scores(SCORES["random"](distribution=distribution)(model, [], CE), sparsity)
    shapes = {name: weight.shape for name, weight in prunable(model).items()}
    if distribution == "uniform":
        assert all(abs(kept - (1 - sparsity) * total) <= 1 for kept, total in mask.per_layer().values())
        return
    factors = {name: sum(shape) / shape.numel() for name, shape in shapes.items()}
    open_layers = {name: kept / total for name, (kept, total) in mask.per_layer().items() if kept < total}
    epsilons = [density / factors[name] for name, density in open_layers.items()]
    assert max(epsilons) / min(epsilons) < 1.1
    assert all(factors[name] * max(epsilons) > 0.95 for name in shapes if name not in open_layers)


def test_random_masks_follow_the_global_seed() -> None:
    masks = []
    model = mlp()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(Mask.from_scores(SCORES["random"]()(model, [], CE), 0.5))
    assert masks[0].jaccard(masks[1]) == 1.0
    assert masks[0].jaccard(masks[2]) < 0.9


def test_grasp_deals_the_classes_over_both_halves_unless_told_otherwise() -> None:
    """BatchNorm sees the difference: class-sorted halves have other statistics."""
    dealt, official = (
        SCORES["grasp"](samples_per_class=4, interleave=flag)(
            convnet(dtype=torch.float64), ToyBatches(dtype=torch.float64).epoch(0), CE
        )
        for flag in (True, False)
    )
    assert not torch.allclose(flat(dealt), flat(official), rtol=1e-3)


def test_grasp_gives_up_on_a_class_that_never_comes() -> None:
    """From data that begins again for ever."""
    for source in (ToyBatches(), list(ToyBatches().epoch(0))):
        with pytest.raises(MetaGradientError, match="the data ran out with class 3 at 0"):
            prune(convnet(classes=5), source, score=SCORES["grasp"](samples_per_class=1), sparsity=0.5)
    rare = ToyBatches()
    rare.labels = torch.where(torch.arange(rare.size) == 40, 3, rare.labels)
    assert prune(convnet(classes=4), rare, score=SCORES["grasp"](samples_per_class=2), sparsity=0.5).kept
    with pytest.raises(MetaGradientError, match="a label is 2: the network has no output"):
        prune(convnet(classes=2), ToyBatches(), score=SCORES["grasp"](samples_per_class=1), sparsity=0.5)


def test_grasp_says_which_class_runs_short() -> None:
    with pytest.raises(MetaGradientError, match=r"samples_per_class=40.*class 0"):
        score("grasp", mlp(), samples_per_class=40)


def test_synflow_survives_a_deep_net_in_single_precision() -> None:
    """The official code under- or overflows there."""
    torch.manual_seed(0)
    layers = [layer for _ in range(80) for layer in (nn.Linear(12, 12), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(12, 3))
    for parameter in model.parameters():
        parameter.data.mul_(0.2)
    scores = SCORES["synflow"]()(model, DATA.epoch(0), CE)
    assert (flat(scores) > 0).all()
    assert torch.isfinite(flat(scores)).all()
    assert all(score.dtype == torch.float64 for score in scores.values()), "single precision would not have done"


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e6])
def test_synflow_in_single_precision_is_that_in_double(scale: float) -> None:
    """Whether single precision was enough or not, the scores are those of double precision, to single rounding."""
    model, data = convnet(), ToyBatches()
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[3].weight[4:] = 0
    single = SCORES["synflow"]()(model, data.epoch(0), CE)
    double = SCORES["synflow"]()(model.double(), ToyBatches(dtype=torch.float64).epoch(0), CE)
    for name, score in double.items():
        assert torch.allclose(single[name].double(), score, rtol=1e-5, atol=0), name
    assert all(score.dtype == torch.float32 for score in single.values())


class Attending(nn.Module):
    """Patches of 2x2, attention with a residual connection, and what SynFlow shall leave alone: a buffer outside the
    state, here a mask of attention, and inside it one that is not of floating point.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(1, 8, 2, stride=2), nn.LayerNorm(8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1), persistent=False)
        self.register_buffer("calls", torch.tensor(True))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, attn_mask=self.mask, need_weights=False)[0]
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_synflow_of_attention_is_an_independent_one(dtype: torch.dtype) -> None:
    """By torch alone in double precision: half of the derivatives are negative there, and none of the scores."""
    torch.manual_seed(0)
    model = Attending().to(dtype)
    apart = copy.deepcopy(model).double().eval()
    for tensor in apart.state_dict().values():
        tensor.copy_(tensor.abs()) if tensor.is_floating_point() else None
    apart(torch.ones(1, 1, 4, 4, dtype=torch.float64)).sum().backward()
    signed = {name: apart.get_parameter(name) * apart.get_parameter(name).grad for name in prunable(apart)}
    scores = SCORES["synflow"]()(model, ToyBatches(dtype=dtype).epoch(0), CE)
    assert 0.2 < (flat(signed) < 0).double().mean() < 0.8
    assert {"attention.in_proj_weight", "attention.out_proj.weight"} < set(scores) == set(signed)
    largest = flat(signed).abs().max()
    assert (flat(scores) - flat(signed).abs()).abs().max() < 1e-12 * largest


@pytest.mark.parametrize("name", ["epsd", "prospr"])
def test_too_few_batches_says_how_many_are_needed(name: str) -> None:
    with pytest.raises(MetaGradientError, match=r"needs 6 batches, the data gave 4.*restart"):
        score(name, mlp(), steps=5)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_nothing_to_prune_has_no_scores(name: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(12))
    assert SCORES[name]()(model, DATA.epoch(0), CE) == {}


def test_bad_settings_name_the_key() -> None:
    with pytest.raises(ParamsError, match=r"prune\.score\.steps"):
        choose(SCORES, {"name": "epsd", "steps": -1}, "prune.score")
    with pytest.raises(ParamsError, match="Valid: steps, lr, momentum, reading"):
        choose(SCORES, {"name": "epsd", "stepz": 1}, "prune.score")
    with pytest.raises(ParamsError, match="epsd, prospr, snip, grasp, synflow, magnitude, random"):
        choose(SCORES, {"name": "taylor"}, "prune.score")


def test_needs_are_declared() -> None:
    assert OBJECTIVES["cskd"]().needs == BatchNeeds("same_class")
    assert OBJECTIVES["dlb"]().needs == BatchNeeds("view")
    assert OBJECTIVES["pskd"]().needs.indices
