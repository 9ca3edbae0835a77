"""prune(): schedule, scope, controls, report, and that the model is left as it is."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from epsd.masks import Mask, MaskError, prunable
from epsd.objectives import OBJECTIVES
from epsd.pruning import prune as pruning
from epsd.pruning.prune import (
    PruneError,
    Stopwatch,
    controlled,
    follows_objective,
    overlap_with_cross_entropy,
    prune,
    rescale_,
    scored,
    signal,
)
from epsd.pruning.scoring import Means, MetaGradientError, normalised, within
from epsd.scores import SCORES
from epsd.types import Batch, BatchNeeds, EpsdError, Scores
from toys import ToyBatches, convnet, mlp

DATA = ToyBatches()
NAMES = sorted(SCORES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounds", [1, 3])
def test_exact_sparsity_and_an_untouched_model(name: str, rounds: int) -> None:
    score = SCORES[name](**({"samples_per_class": 2} if name == "grasp" else {}))
    model = convnet()
    model[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    mask = prune(model, DATA, score=score, sparsity=0.6, objective=OBJECTIVES["cskd"](), rounds=rounds)
    assert mask.kept == mask.total - round(0.6 * mask.total)
    assert list(mask.keep) == list(prunable(model))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


def test_rounds_follow_an_exponential_schedule() -> None:
    seen = []

    class Recording:
        def __call__(self, model, batches, objective):  # type: ignore[no-untyped-def]
            seen.append(sum(int((p != 0).sum()) for p in prunable(model).values()))
            return {name: p.detach().abs() for name, p in prunable(model).items()}

    total = sum(p.numel() for p in prunable(convnet()).values())
    prune(convnet(), DATA, score=Recording(), sparsity=0.9, rounds=4)
    expected = [total - round((1 - 0.1 ** (k / 4)) * total) for k in range(4)]
    assert seen == expected


@pytest.mark.parametrize("name", ["epsd", "prospr", "snip", "grasp"])
def test_several_batches_are_averaged_with_or_without_sign(name: str) -> None:
    """Against the score on each draw, in the order of the data."""
    data, count = ToyBatches(size=144, dtype=torch.float64), 3
    settings: dict[str, Any] = {"grasp": {"samples_per_class": None}}.get(name, {})
    score, batches = SCORES[name](**settings), list(data.epoch(0))
    each = 4 if name in ("epsd", "prospr") else 1

    def given(signed: bool) -> list[Scores]:
        with within(Means(signed=signed)):
            draws = [iter(batches[each * number : each * (number + 1)]) for number in range(count)]
            return [score(mlp(16), draw, OBJECTIVES["cross_entropy"]()) for draw in draws]

    for layer, found in scored(mlp(16), data, score=score, batches=count).items():
        assert torch.allclose(found, torch.stack([one[layer] for one in given(False)]).mean(0))
    signed = scored(mlp(16), data, score=score, batches=count, average="signed")
    mean = {layer: torch.stack([one[layer] for one in given(True)]).mean(0) for layer in signed}
    expected = mean if name == "grasp" else normalised(mean)
    assert all(torch.allclose(signed[layer], expected[layer]) for layer in expected)
    if name == "snip":
        summed = scored(mlp(16), data, score=SCORES["snip"](batches=count))
        assert all(torch.allclose(signed[layer], summed[layer]) for layer in summed)


@pytest.mark.parametrize("name", ["random", "magnitude", "synflow"])
def test_what_looks_at_no_images_is_scored_once(name: str) -> None:
    torch.manual_seed(3)
    one, many = (scored(mlp(16), ToyBatches(dtype=torch.float64), score=SCORES[name](), batches=n) for n in (1, 5))
    assert all(torch.equal(one[layer], many[layer]) for layer in one)


def test_how_batches_are_averaged_is_checked() -> None:
    with pytest.raises(PruneError, match="batches: 0 is below 1"):
        prune(convnet(), DATA, score=SCORES["snip"](), sparsity=0.5, batches=0)
    with pytest.raises(PruneError, match=r"average: unknown 'median'\. Valid: absolute, signed"):
        prune(convnet(), DATA, score=SCORES["snip"](), sparsity=0.5, average="median")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"scope": "erk"}, {"scope": "lamp"}, {"channel_cap": 1.0}, {"densities": {"0.*": 1.0}}]
)
def test_rounds_go_with_every_selection(options: dict[str, Any]) -> None:
    mask = prune(convnet(), DATA, score=SCORES["epsd"](), sparsity=0.8, rounds=3, batches=2, **options)
    assert mask.kept == mask.total - round(0.8 * mask.total)
    assert "densities" not in options or mask.per_layer()["0.weight"] == (54, 54)


def test_the_objective_given_is_not_changed() -> None:
    objective = OBJECTIVES["dlb"]()
    prune(convnet(), DATA, score=SCORES["epsd"](), sparsity=0.5, objective=objective)
    assert objective.last == {}


def test_more_batches_than_there_are_restart_or_refuse() -> None:
    score = SCORES["epsd"](steps=9)
    assert prune(convnet(), DATA, score=score, sparsity=0.5).kept
    with pytest.raises(MetaGradientError, match="needs 10 batches, the data gave 4"):
        prune(convnet(), DATA, score=score, sparsity=0.5, restart=False)


def test_a_dead_layer_is_named_or_kept_alive_by_option() -> None:
    model = convnet()
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"no weight survives in 0\.weight.*keep_at_least_one"):
        dead = prune(model, DATA, score=SCORES["magnitude"](), sparsity=0.5)
    alive = prune(model, DATA, score=SCORES["magnitude"](), sparsity=0.5, keep_at_least_one=True)
    assert dead.dead_layers() == ["0.weight"]
    assert alive.dead_layers() == []
    assert alive.kept == dead.kept


def test_bad_requests_are_refused_before_any_work() -> None:
    def never(*_: object) -> None:
        raise AssertionError("the score was computed all the same")

    with pytest.raises(MaskError, match=r"outside \[0, 1\)"):
        prune(convnet(), DATA, score=never, sparsity=1.0)
    with pytest.raises(MaskError, match="no prunable weight"):
        prune(nn.Flatten(), DATA, score=never, sparsity=0.5)
    with pytest.raises(MaskError, match="fewer weights than layers"):
        prune(convnet(), DATA, score=never, sparsity=0.999)


def test_zero_and_nan_scores_are_named() -> None:
    with pytest.raises(MaskError, match="every score is zero"):
        prune(convnet(), DATA, score=SCORES["epsd"](), sparsity=0.5, objective=lambda logits, labels: logits.sum() * 0)
    with pytest.raises(MaskError, match="NaN or infinite"):
        prune(
            convnet(), DATA, score=SCORES["epsd"](), sparsity=0.5, objective=lambda logits, _: logits.sum() * math.nan
        )


@pytest.mark.parametrize("name", sorted({*NAMES} - {"random", "grasp"}))
@pytest.mark.parametrize("keep_at_least_one", [False, True])
def test_a_layer_that_starts_at_zero_is_named(name: str, keep_at_least_one: bool) -> None:
    """Every score multiplies by the initial weights: it would lose all of them at any sparsity."""
    model = convnet()
    nn.init.zeros_(model[8].weight)
    settings = {"sparsity": 0.1, "keep_at_least_one": keep_at_least_one}
    with pytest.raises(MaskError, match=r"every weight of '8.weight' is zero.*exclude '8.weight'"):
        prune(model, DATA, score=SCORES[name](), **settings)
    if name == "magnitude":  # the others see nothing at all through such a classifier
        assert "8.weight" not in prune(model, DATA, score=SCORES[name](), exclude="8.weight", **settings).keep


def test_a_model_that_cannot_be_pruned_as_it_is() -> None:
    score = SCORES["snip"]()
    with pytest.raises(PruneError, match=r"wrapped in DataParallel: prune what is inside, model\.module"):
        prune(nn.DataParallel(convnet()), DATA, score=score, sparsity=0.5)
    with pytest.raises(PruneError, match="TorchScript"):
        prune(torch.jit.script(convnet()), DATA, score=score, sparsity=0.5)
    model = convnet()
    model.last = model[0](DATA.images[:2])
    with pytest.raises(PruneError, match="cannot be copied: it keeps last, computed from other tensors"):
        prune(model, DATA, score=score, sparsity=0.5)
    model = convnet()
    nn.utils.parametrizations.weight_norm(model[3])
    with pytest.warns(UserWarning, match=r"not pruned, as their weights are computed .*: 3\."):
        assert list(prune(model, DATA, score=score, sparsity=0.5).keep) == ["0.weight", "8.weight"]


def test_what_is_no_score_objective_or_batch_is_named() -> None:
    model, score = convnet(), SCORES["epsd"]()
    for wrong, message in ((SCORES["epsd"], r"the class Epsd: make one, Epsd\(\)"), ("epsd", "got 'epsd'")):
        with pytest.raises(PruneError, match=f"score: .*{message}"):
            prune(model, DATA, score=wrong, sparsity=0.5)  # type: ignore[arg-type]
    for wrong, message in ((OBJECTIVES["cskd"], r"the class CsKd: make one"), ("cskd", "got 'cskd'")):
        with pytest.raises(EpsdError, match=f"objective: .*{message}"):
            prune(model, DATA, score=score, sparsity=0.5, objective=wrong)  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="rounds: 0 is below 1"):
        prune(model, DATA, score=score, sparsity=0.5, rounds=0)
    batch = next(DATA.epoch(0))
    for objective in ("cskd", "dlb"):
        with pytest.raises(EpsdError, match="needs a partner for every image"):
            prune(model, [batch], score=score, sparsity=0.5, objective=OBJECTIVES[objective]())
    with pytest.raises(MetaGradientError, match=r"batches of type epsd\.Batch, the data gave tuple"):
        prune(model, [(batch.images, batch.labels)], score=score, sparsity=0.5)


@pytest.mark.parametrize("restart", [True, False])
def test_data_without_a_batch_is_named(restart: bool) -> None:
    class Empty(ToyBatches):
        def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
            return iter(())

    for empty in (Empty(), []):
        with pytest.raises(MetaGradientError, match=r"score snip .* needs 1 batches, the data gave none"):
            prune(convnet(), empty, score=SCORES["snip"](), sparsity=0.5, restart=restart)


def test_a_list_of_batches_begins_again() -> None:
    batches = list(DATA.epoch(0))
    masks = [prune(convnet(), given, score=SCORES["epsd"](steps=6), sparsity=0.5) for given in (batches, iter(batches))]
    longer = prune(convnet(), batches + batches, score=SCORES["epsd"](steps=6), sparsity=0.5)
    assert masks[0] == masks[1] == longer


def test_the_seed_decides_which_images_of_a_loader_are_scored() -> None:
    loader = DataLoader(TensorDataset(DATA.images, DATA.labels), batch_size=12, shuffle=True)
    masks = [prune(convnet(), loader, score=SCORES["epsd"](), sparsity=0.8, seed=seed) for seed in (0, 0, 1)]
    assert masks[0] == masks[1] != masks[2]


def test_a_stream_of_unknown_length_can_be_scored() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
            yield from zip(DATA.images, DATA.labels.tolist(), strict=True)

    loader: DataLoader[Any] = DataLoader(Endless(), batch_size=12)
    assert prune(convnet(), loader, score=SCORES["epsd"](), sparsity=0.5).kept


def test_synflow_looks_at_the_data_once() -> None:
    drawn = []

    class Counted(ToyBatches):
        def epoch(self, number, needs=BatchNeeds()):  # type: ignore[no-untyped-def]
            for batch in super().epoch(number, needs):
                drawn.append(batch)
                yield batch

    prune(convnet(), Counted(), score=SCORES["synflow"](), sparsity=0.8, rounds=20)
    assert len(drawn) == 1


def test_a_plain_loader_and_a_plain_loss() -> None:
    loader = DataLoader(TensorDataset(DATA.images, DATA.labels), batch_size=12)
    mask = prune(convnet(), loader, score=SCORES["epsd"](), sparsity=0.8, objective=nn.functional.cross_entropy)
    assert mask.sparsity == pytest.approx(0.8, abs=0.01)


def test_controls() -> None:
    mask = prune(convnet(), DATA, score=SCORES["snip"](), sparsity=0.6)
    assert controlled(mask, "none", 1) is mask
    assert controlled(mask, "reinitialised", 1) is mask
    assert controlled(mask, "shuffled", 1).per_layer() == mask.per_layer()
    assert controlled(mask, "shuffled", 1).jaccard(mask) < 0.9


def test_rescaled_layers_have_the_mean_square_they_began_with_and_keep_what_they_are() -> None:
    model, before = convnet(), convnet()
    before.load_state_dict(model.state_dict())
    mask = prune(model, DATA, score=SCORES["snip"](), sparsity=0.9)
    *_, last = mask.keep
    mask = Mask({**mask.keep, last: torch.zeros_like(mask.keep[last])})
    rescale_(model, mask)
    for (name, weight), old in zip(model.named_parameters(), before.parameters(), strict=True):
        keep = mask.keep.get(name, torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(weight[~keep], old[~keep]), "neither what is removed nor a norm or bias changes"
        if keep.any():
            assert weight[keep].square().mean().item() == pytest.approx(old.square().mean().item(), rel=1e-5)
            ratios = weight[keep] / old[keep]
            assert ratios.std() < 1e-5 and ratios.mean() < 0.9, "scores of a loss keep large weights"


def test_overlap_with_cross_entropy_is_one_where_the_loss_is_cross_entropy() -> None:
    """Identity 2 as the report shows it: literal PS-KD is the simple combination; CS-KD is not."""
    score, selection = SCORES["epsd"](lr=1.0), {"sparsity": 0.8}

    def overlap(objective):  # type: ignore[no-untyped-def]
        mask = prune(convnet(), DATA, score=score, objective=objective, **selection)
        return overlap_with_cross_entropy(mask, convnet(), DATA, score=score, objective=objective, **selection)

    assert overlap(OBJECTIVES["pskd"](score="literal")) > 0.999
    assert overlap(OBJECTIVES["cross_entropy"]()) == 1.0
    assert overlap(OBJECTIVES["cskd"](weight=3.0)) < 1.0


@pytest.mark.parametrize("name", sorted({*NAMES} - {"epsd"}))
def test_scores_that_do_not_look_at_the_objective_say_so(name: str) -> None:
    """So that their overlap with cross entropy is known without scoring again. It is checked here."""
    score = SCORES[name](**({"samples_per_class": 2} if name == "grasp" else {}))
    assert not follows_objective(score) and follows_objective(SCORES["epsd"]())
    scores = [pruning.scored(convnet(), DATA, score=score, objective=OBJECTIVES[sd]()) for sd in ("cskd", "dlb")]
    assert all(torch.equal(value, scores[1][key]) for key, value in scores[0].items())
    assert overlap_with_cross_entropy(Mask.dense(convnet()), convnet(), DATA, score=score, objective=None) == 1.0


def test_signal_tells_whether_the_distillation_is_live() -> None:
    model, score = convnet(), SCORES["epsd"](lr=1.0)
    live = signal(model, DATA, score, OBJECTIVES["dlb"]())
    assert live["distillation_signal_start"] == 0
    assert live["distillation_signal"] > 0
    assert signal(model, DATA, score, OBJECTIVES["cross_entropy"]()) == {}
    assert signal(model, DATA, SCORES["magnitude"](), OBJECTIVES["cskd"]()) == {}
    assert signal(model, DATA, SCORES["prospr"](), OBJECTIVES["cskd"]()) == {}, "it never consulted the objective"
    assert signal(model, DATA, score, OBJECTIVES["pskd"](alpha=1.0)) == {}, "no label loss to compare with"


def test_signal_sees_the_batches_that_scoring_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    class Watched(OBJECTIVES["cskd"]):  # type: ignore[name-defined, misc]
        def loss(self, forward, batch, progress):  # type: ignore[no-untyped-def]
            seen.append(batch.indices.tolist())
            return super().loss(forward, batch, progress)

    for settings in ({}, {"new_batch_per_step": False}, {"micro_batch": 5}):
        score = SCORES["epsd"](steps=2, graphs_kept=3, **settings)
        seen.clear()
        pruning.scored(mlp(16, dtype=torch.float32), DATA, score=score, objective=Watched())
        scored, places = [tuple(indices) for indices in seen], {tuple(indices) for indices in seen}
        seen.clear()
        signal(mlp(16, dtype=torch.float32), DATA, score, Watched())
        assert {tuple(indices) for indices in seen} == places and len(scored) >= 3


def test_the_stopwatch_measures() -> None:
    with Stopwatch(torch.device("cpu")) as watch:
        sum(range(10000))
    assert watch.seconds > 0
    assert watch.peak_memory > 50
