"""Masks: exact counts, ties by position, saving, and what is refused."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from epsd import masks
from epsd.files import digests
from epsd.files.digests import DamagedFile
from epsd.masks import Mask, MaskError, Scope, check_fits, erk_ranked, hidden, prunable
from epsd.training.updates import MaskHolder
from toys import convnet


def scores_of(**layers: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in layers.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.36, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99])
@pytest.mark.parametrize("total", [100, 1000, 1260, 77])
def test_exactly_round_of_sparsity_times_n_are_removed(total: int, sparsity: float) -> None:
    mask = Mask.from_scores({"w": torch.randn(total)}, sparsity)
    assert mask.kept == total - round(sparsity * total)
    assert mask.sparsity == pytest.approx(round(sparsity * total) / total)


def test_the_highest_scores_stay_whatever_their_sign() -> None:
    mask = Mask.from_scores(scores_of(a=[-3.0, 5.0, 0.0], b=[-1.0, 4.0]), 0.6)
    assert mask.keep["a"].tolist() == [False, True, False]
    assert mask.keep["b"].tolist() == [False, True]


def test_ties_keep_the_earlier_position() -> None:
    mask = Mask.from_scores(scores_of(a=[1.0, 2.0, 1.0], b=[1.0, 1.0]), 0.4)
    assert mask.keep["a"].tolist() == [True, True, True]
    assert mask.keep["b"].tolist() == [False, False]


def test_layer_scope_gives_each_layer_its_share() -> None:
    mask = Mask.from_scores(scores_of(a=[9.0, 8.0, 7.0, 6.0], b=[1.0, 2.0]), 0.5, "layer")
    assert mask.per_layer() == {"a": (2, 4), "b": (1, 2)}


def test_keep_at_least_one_revives_dead_layers_at_the_same_total() -> None:
    scores = scores_of(a=[9.0, 8.0, 7.0, 6.0], b=[1.0, 2.0])
    assert Mask.from_scores(scores, 0.5).dead_layers() == ["b"]
    mask = Mask.from_scores(scores, 0.5, keep_at_least_one=True)
    assert mask.kept == 3
    assert mask.keep["b"].tolist() == [False, True]
    assert mask.keep["a"].tolist() == [True, True, False, False]


def test_within_removed_weights_stay_removed_even_with_negative_scores() -> None:
    first = Mask.from_scores(scores_of(a=[4.0, 3.0, 2.0, 1.0]), 0.5)
    second = Mask.from_scores(scores_of(a=[-9.0, -8.0, 7.0, 6.0]), 0.75, within=first)
    assert second.keep["a"].tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("scores", "sparsity", "message"),
    [
        ({}, 0.5, "no prunable weight"),
        (scores_of(a=[1.0, float("nan")]), 0.5, "'a': 1 of 2 are NaN"),
        (scores_of(a=[1.0, float("inf")]), 0.5, "NaN or infinite"),
        (scores_of(a=[0.0, 0.0]), 0.5, "every score is zero"),
        (scores_of(a=[1.0, 2.0]), 1.0, r"outside \[0, 1\)"),
        (scores_of(a=[1.0, 2.0]), -0.1, r"outside \[0, 1\)"),
        (scores_of(a=[1.0] * 10, b=[1.0] * 10), 0.95, "fewer weights than layers"),
    ],
)
def test_unfit_scores_are_refused(scores: dict[str, torch.Tensor], sparsity: float, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        Mask.from_scores(scores, sparsity)


def test_prunable_leaves_biases_norms_and_frozen_weights_alone() -> None:
    model = convnet()
    assert list(prunable(model)) == ["0.weight", "3.weight", "8.weight"]
    model[0].weight.requires_grad_(False)
    assert list(prunable(model)) == ["3.weight", "8.weight"]


def test_prunable_finds_attention_and_names_tied_weights_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)
            self.second.weight = self.first.weight

    assert list(prunable(Tied())) == ["attention.in_proj_weight", "attention.out_proj.weight", "first.weight"]


def test_apply_sets_removed_weights_to_zero_and_no_others() -> None:
    model = convnet()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = Mask.from_scores({name: p.abs() for name, p in prunable(model).items()}, 0.8)
    mask.apply_(model)
    for name, parameter in model.named_parameters():
        keep = mask.keep.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, torch.where(keep, before[name], 0.0))


def test_the_holder_masks_gradients_too() -> None:
    model = convnet()
    mask = Mask.from_scores({name: p.abs() for name, p in prunable(model).items()}, 0.8)
    holder = MaskHolder(mask, model)
    model(torch.randn(4, 1, 4, 4)).sum().backward()
    model[3].weight.grad = None
    holder.gradients_()
    assert not model[0].weight.grad[~mask.keep["0.weight"]].any()
    assert model[0].weight.grad[mask.keep["0.weight"]].any()


def test_save_and_load_give_the_same_mask_in_the_same_order(tmp_path: Path) -> None:
    mask = Mask.from_scores(scores_of(z=[1.0, 2.0, 3.0], a=[4.0, 0.0]), 0.4)
    mask.save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    assert list(loaded.keep) == ["z", "a"]
    assert loaded.jaccard(mask) == 1.0


@pytest.mark.parametrize("content", [b"", b"garbage that is no safetensors file", b"\x80\x04K\x01."])
def test_a_damaged_mask_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"mask\.safetensors"):
        Mask.load(path)


def test_a_truncated_mask_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    Mask.from_scores({"w": torch.randn(1000)}, 0.5).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match=r"mask\.safetensors: cannot be read"):
        Mask.load(path)


def test_another_safetensors_file_is_no_mask(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(DamagedFile, match="no mask of this version"):
        Mask.load(tmp_path / "model.safetensors")
    with pytest.raises(DamagedFile, match=r"absent\.safetensors: missing"):
        Mask.load(tmp_path / "absent.safetensors")


def test_a_mask_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    Mask({"w": torch.zeros(3, dtype=torch.bool)}).save(path)
    with pytest.raises(MaskError, match=r"mask\.safetensors: it keeps no weight at all"):
        Mask.load(path)
    digests.save_tensors(path, "mask", {"w": torch.ones(3)}, {"order": ["w"]})
    with pytest.raises(MaskError, match=r"mask\.safetensors: .*expected bool"):
        Mask.load(path)
    digests.save_tensors(path, "mask", {"w": torch.ones(3)}, {"order": ["v"]})
    with pytest.raises(MaskError, match=r"mask\.safetensors: 'v'"):
        Mask.load(path)


def test_a_mask_for_another_model_is_refused() -> None:
    mask = Mask.from_scores({"0.weight": torch.randn(6, 1, 3, 3), "other": torch.randn(3)}, 0.5)
    with pytest.raises(MaskError, match="no parameter 'other'"):
        mask.apply_(convnet())
    with pytest.raises(MaskError, match="shape"):
        Mask.from_scores({"0.weight": torch.randn(5)}, 0.5).apply_(convnet())


def test_shuffled_keeps_every_layers_density_and_moves_the_weights() -> None:
    mask = Mask.from_scores({"a": torch.randn(30, 10), "b": torch.randn(400)}, 0.7)
    shuffled = mask.shuffled(3)
    assert shuffled.per_layer() == mask.per_layer()
    assert shuffled.jaccard(mask) < 0.5
    assert shuffled.jaccard(mask.shuffled(3)) == 1.0


def test_a_mask_is_a_value() -> None:
    keep = {"a": torch.tensor([True, False]), "b": torch.tensor([[True]])}
    mask = Mask(keep)
    assert mask == Mask({name: tensor.clone() for name, tensor in keep.items()})
    assert len({mask, Mask(dict(keep))}) == 1
    others = [{"a": torch.tensor([True, True])}, {"b": torch.tensor([True])}, {"c": torch.tensor([True])}]
    assert all(mask != Mask({**keep, **other}) for other in others)
    assert mask != "mask"


def test_an_unknown_scope_is_named() -> None:
    with pytest.raises(MaskError, match=r"scope: unknown 'Global'\. Valid: global, layer, erk, lamp"):
        Mask.from_scores({"a": torch.arange(4.0)}, 0.5, "Global")  # type: ignore[arg-type]


# --- high sparsity: layers, channels, schedules ---

SHAPES = {"stem": (8, 3, 3, 3), "deep": (32, 32, 3, 3), "shortcut": (32, 8, 1, 1), "head": (10, 32)}
TOTAL = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def drawn(**powers: float) -> dict[str, torch.Tensor]:
    """Positive scores by layer, of scale 10^power."""
    torch.manual_seed(0)
    return {name: torch.rand(shape).pow(3) * 10 ** powers.get(name, 0.0) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.98, 0.995])
def test_scope_erk_gives_every_layer_what_random_erk_gives(sparsity: float) -> None:
    chance = {name: erk_ranked(score.shape)[torch.randperm(score.numel())] for name, score in drawn().items()}
    found = Mask.from_scores(drawn(stem=9.0), sparsity, "erk")
    expected = Mask.from_scores({n: s.view(SHAPES[n]) for n, s in chance.items()}, sparsity)
    assert found.per_layer() == expected.per_layer()
    assert found.kept == TOTAL - round(sparsity * TOTAL)
    for name, score in drawn(stem=9.0).items():
        ordered = score.flatten().sort(descending=True).values
        assert torch.equal(score[found.keep[name]].sort(descending=True).values, ordered[: found.keep[name].sum()])
    assert list(found.keep) == list(SHAPES)


def test_scope_lamp_is_the_scores_share_of_what_is_not_smaller() -> None:
    scores = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.tensor([1e-6, 3e-6, -1.0])}
    # a: 4/4, 3/7, 2/9, 1/10; b: 3/3, 1/4, negative ones last
    order = [("a", 0), ("b", 1), ("a", 2), ("b", 0), ("a", 3), ("a", 1), ("b", 2)]
    for kept in range(2, 8):
        mask = Mask.from_scores(scores, 1 - kept / 7, "lamp")
        assert {(n, i) for n, keep in mask.keep.items() for i in keep.nonzero().flatten().tolist()} == set(order[:kept])


def test_scope_lamp_leaves_no_layer_without_a_weight() -> None:
    scores = drawn(deep=-9.0)
    assert Mask.from_scores(scores, 0.98).dead_layers() == ["deep"]
    assert Mask.from_scores(scores, 0.999, "lamp").dead_layers() == []
    equal = Mask.from_scores({"a": torch.ones(4), "b": torch.ones(4)}, 0.5, "lamp")
    assert equal.keep["a"].tolist() == equal.keep["b"].tolist() == [True, True, False, False]


@pytest.mark.parametrize("scope", get_args(Scope))
@pytest.mark.parametrize("densities", [{"stem": 1.0}, {"s*": 0.5, "stem": 1.0}, {"head": 0.3, "deep": 0.01}])
def test_given_densities_are_kept_and_the_others_share_the_rest(scope: Scope, densities: dict[str, float]) -> None:
    mask = Mask.from_scores(drawn(stem=-9.0), 0.95, scope, densities=densities)
    kept = {name: count for name, (count, _) in mask.per_layer().items()}
    exact = {"stem": {"stem": 216}, "s*": {"stem": 108, "shortcut": 128}, "head": {"head": 96, "deep": 92}}
    for name, count in exact[next(iter(densities))].items():
        assert kept[name] == count
    slack = 2 if scope == "layer" else 0  # every layer is rounded by itself
    assert abs(mask.kept - (TOTAL - round(0.95 * TOTAL))) <= slack


def test_densities_of_all_layers_meet_the_total_exactly() -> None:
    densities = {"stem": 0.4, "deep": 0.0431, "shortcut": 0.1, "head": 0.2}
    total = sum(round(d * torch.Size(SHAPES[n]).numel()) for n, d in densities.items())
    for off in (-2, 0, 2):
        mask = Mask.from_scores(drawn(), 1 - (total + off) / TOTAL, densities=densities)
        assert mask.kept == total + off
        assert mask.per_layer()["deep"][0] == round(0.0431 * 9216) + off


@pytest.mark.parametrize(
    ("densities", "message"),
    [
        ({"stemm": 0.5}, "densities: no layer fits 'stemm'. Layers: stem, deep"),
        ({"stem": 0.0}, r"densities: 0.0 of 'stem' is outside \(0, 1\]"),
        ({"deep": 0.5}, "they keep 4608 weights, prune.sparsity 0.95 keeps 500 of"),
        ({"*": 0.01}, "they keep 100 weights, prune.sparsity 0.95 keeps 500 of"),
        ({"deep": 0.001, "stem": 0.01, "head": 0.01}, "the other layers keep 486 of 256 weights"),
        ({"deep": 0.054}, "fewer weights than layers"),
    ],
)
def test_densities_that_cannot_be_are_named(densities: dict[str, float], message: str) -> None:
    weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    with pytest.raises(MaskError, match=message):
        check_fits(weights, 0.95, densities=densities)


@pytest.mark.parametrize("cap", [1.0, 1.5, 4.0, 100.0])
def test_no_channel_has_more_than_the_cap_of_a_layers_mass(cap: float) -> None:
    """The whole of a layer is ranked, so that what competes is seen; the ranking within a channel stays."""
    torch.manual_seed(1)
    score = torch.rand(6, 5) * torch.tensor([[100.0], [10.0], [1.0], [1.0], [0.1], [0.0]])
    spread = masks._capped(score, cap)
    mass = spread.sum(1)
    assert mass.sum() == pytest.approx(float(score.sum()))
    assert mass.max() <= min(cap / 5, 1) * mass.sum() * (1 + 1e-9), "five channels have any"
    assert torch.equal(spread[:5].argsort(1), score[:5].argsort(1))
    assert bool((spread[5] == 0).all())
    over = mass >= min(cap / 5, 1) * mass.sum() * (1 - 1e-9)
    ratio = (mass / score.sum(1))[:5][~over[:5]]
    assert len(ratio) == 0 or torch.allclose(ratio, ratio[0].expand_as(ratio)), "the others keep their proportions"


def test_a_cap_of_one_lets_all_channels_live_and_negative_scores_stay_last() -> None:
    score = torch.arange(40.0).view(4, 10) ** 4
    assert Mask.from_scores({"w": score}, 0.8).keep["w"].any(1).tolist() == [False, False, False, True]
    assert Mask.from_scores({"w": score}, 0.8, channel_cap=1.0).keep["w"].any(1).all()
    signed = Mask.from_scores({"w": score - 1e6}, 0.5, channel_cap=1.0)
    assert not signed.keep["w"][(score - 1e6) < 0][:10].any()
    with pytest.raises(MaskError, match=r"channel_cap: 0\.5 is below 1"):
        Mask.from_scores({"w": score}, 0.5, channel_cap=0.5)


@pytest.mark.parametrize("scope", get_args(Scope))
@pytest.mark.parametrize("options", [{}, {"densities": {"stem": 1.0, "head": 0.2}}, {"channel_cap": 2.0}])
def test_rounds_only_remove_and_end_where_one_round_does(scope: Scope, options: dict[str, Any]) -> None:
    mask, before = None, TOTAL
    for step in range(1, 6):
        mask = Mask.from_scores(drawn(deep=-3.0), 0.96, scope, within=mask, progress=step / 5, **options)
        assert mask.kept < before
        before = mask.kept
    once = Mask.from_scores(drawn(deep=-3.0), 0.96, scope, **options)
    assert mask is not None
    assert mask.per_layer() == once.per_layer() or "channel_cap" in options or scope == "lamp"
    assert mask.kept == once.kept


def test_no_more_is_kept_than_the_mask_within_has() -> None:
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0) + 100}
    first = Mask.from_scores(scores, 0.6)
    assert first.per_layer() == {"a": (0, 10), "b": (8, 10)}
    with pytest.raises(MaskError, match="keeps 10 weights, the mask within which it prunes has 8"):
        Mask.from_scores(scores, 0.5, within=first)
    with pytest.raises(MaskError, match="keeps 2 weights, the mask within which it prunes has 0"):
        Mask.from_scores(scores, 0.8, "layer", within=first)
    again = Mask.from_scores(scores, 0.8, within=first, keep_at_least_one=True)
    assert again.per_layer() == {"a": (0, 10), "b": (4, 10)}, "what an earlier mask took stays removed"


def test_layers_with_a_computed_weight_are_not_prunable() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3)), nn.Flatten(), nn.Linear(8, 2))
    model.append(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)))
    before = model[3].parametrizations.weight[0]._u.clone()
    assert list(prunable(model)) == ["2.weight"]
    assert hidden(model) == ["0", "3"]
    assert torch.equal(model[3].parametrizations.weight[0]._u, before), "looking at it computes nothing"


def test_jaccard_counts_the_survivors() -> None:
    a = Mask({"w": torch.tensor([True, True, False, False])})
    b = Mask({"w": torch.tensor([True, False, True, False])})
    assert a.jaccard(b) == pytest.approx(1 / 3)
    wider = Mask({**b.keep, "v": torch.tensor([True])})
    for one, other in ((a, wider), (wider, a)):
        with pytest.raises(MaskError, match="no parameter 'v'"):
            one.jaccard(other)


def test_renamed_and_restricted_follow_a_backbone() -> None:
    mask = Mask.from_scores(scores_of(conv=[1.0, 2.0], fc=[3.0, 4.0]), 0.5)
    moved = mask.restricted(["conv"]).renamed(lambda name: f"body.{name}")
    assert list(moved.keep) == ["body.conv"]


def test_a_mask_must_be_bool_and_not_empty() -> None:
    with pytest.raises(MaskError, match="bool"):
        Mask({"w": torch.ones(3)})
    with pytest.raises(MaskError, match="at least one layer"):
        Mask({})
