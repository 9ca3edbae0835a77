"""Scores computed once and cut at several sparsities give the masks of separate scorings."""

from typing import Any

import pytest
import torch
from torch import nn

from conftest import shipped
from epsd.architectures import built
from epsd.data.prepared import Prepared
from epsd.evaluation import metrics
from epsd.masks import Mask, prunable
from epsd.pipeline import prune
from epsd.pipeline.deploy import masked
from epsd.pipeline.prune import pruned, scored, scoring_key
from epsd.pipeline.train import card
from epsd.project.params import Params
from epsd.pruning.paths import on_path
from epsd.pruning.prune import PruneError
from epsd.studies.procedures.pipeline import Pipeline

SMALL = {"data.limit": 12, "architecture.width": 0.25, "prune.batch_size": 32, "threads": 1}


def params(**changes: Any) -> Params:
    return shipped({**SMALL, **changes})


@pytest.fixture
def data(few_digits: Prepared) -> Prepared:
    return few_digits


@pytest.mark.filterwarnings("ignore:no weight survives")
@pytest.mark.parametrize(
    "score", [{"name": "epsd"}, {"name": "grasp"}, {"name": "synflow"}, {"name": "random", "distribution": "erk"}]
)
@pytest.mark.parametrize("objective", ["cskd", "pskd"])
def test_shared_scores_equal_separate_ones(score: dict[str, Any], objective: str, data: Prepared) -> None:
    common = {"prune.score": score, "objective": {"name": objective}, "seed": 3}
    known = scored(params(**common), data)
    for sparsity, control in ((0.5, "none"), (0.9, "reinitialised")):
        mine = params(**common, **{"prune.sparsity": sparsity, "prune.control": control})
        assert scoring_key(mine) == scoring_key(params(**common))
        apart, shared = pruned(mine, data), pruned(mine, data, known)
        assert all(torch.equal(keep, shared.mask.keep[name]) for name, keep in apart.mask.keep.items())
        weights = dict(shared.model.named_parameters())
        assert all(torch.equal(weight, weights[name]) for name, weight in apart.model.named_parameters())
        measured = {"seconds", "peak_memory_mib"}
        assert apart.report.keys() == shared.report.keys()
        assert {k: v for k, v in apart.report.items() if k not in measured} == {
            k: v for k, v in shared.report.items() if k not in measured
        }


@pytest.mark.filterwarnings("ignore:no weight survives", "ignore:.*lie on no path")
def test_what_scores_share_of_random_weights_is_what_each_has_alone(
    data: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    asked = [
        {"prune.score": {"name": name}, "prune.sparsity": share} for name in ("snip", "random") for share in (0.8, 0.95)
    ]
    asked.append({**asked[0], "architecture.depth": 14})
    for known in ({}, None):
        for changes in asked:
            monkeypatch.setattr(prune, "_RANDOM", {} if known is None else known)
            examined = pruned(params(**changes), data).examined
            assert examined is not None
            found.append(examined)
    assert found[: len(asked)] == found[len(asked) :]


@pytest.mark.filterwarnings("ignore:no weight survives", "ignore:.*lie on no path")
def test_the_report_says_what_of_the_final_mask_is_in_effect(data: Prepared) -> None:
    """Of the mask that is trained, after the control."""
    for control in ("none", "shuffled"):
        found = pruned(params(**{"prune.sparsity": 0.97, "prune.control": control}), data)
        effective = on_path(found.model, found.mask, data.image_shape)
        assert found.report["effective_sparsity"] == pytest.approx(1 - effective.kept / effective.total)
        assert found.examined is not None
        assert [row["on_path"] for row in found.examined.rows()] == [kept for kept, _ in effective.per_layer().values()]
        assert found.report["on_path"] < 1 < 1 + found.report["random_erk_gini"]
        assert found.scores is not None
        ranked = Mask.from_scores(found.scores, 0.97)
        assert ranked == found.mask if control == "none" else ranked.kept == found.mask.kept


@pytest.mark.filterwarnings("ignore:no weight survives", "ignore:.*lie on no path")
def test_controls_share_the_mask_in_which_rounds_end(data: Prepared) -> None:
    several = {"prune.rounds": 2, "prune.sparsity": 0.9}
    shares = Pipeline().shares
    assert shares(params(**several)) != shares(params(**{**several, "prune.sparsity": 0.95}))
    for control in ("shuffled", "reinitialised"):
        mine = params(**several, **{"prune.control": control})
        assert shares(mine) == shares(params(**several)) != shares(params(**{"prune.sparsity": 0.9}))
        known = pruned(mine.pruning(control="none"), data)._replace(model=nn.Identity())
        apart, shared = pruned(mine, data), pruned(mine, data, known)
        assert apart.mask == shared.mask
        weights = dict(shared.model.named_parameters())
        assert all(torch.equal(weight, weights[name]) for name, weight in apart.model.named_parameters())
        measured = {"seconds", "peak_memory_mib"}
        for name in apart.report.keys() | shared.report.keys() - measured:
            assert name in measured or apart.report[name] == shared.report[name]


@pytest.mark.parametrize("control", ["none", "shuffled", "reinitialised"])
def test_rescaling_changes_what_is_trained_and_no_mask(control: str, data: Prepared) -> None:
    asked = {"prune.compare": False, "prune.control": control}
    plain, scaled = (pruned(params(**asked, **{"prune.rescale": value}), data) for value in (False, True))
    assert plain.mask == scaled.mask
    drawn, kept = dict(plain.model.named_parameters()), dict(scaled.model.named_parameters())
    for name, keep in plain.mask.keep.items():
        assert kept[name][keep].square().mean().item() == pytest.approx(drawn[name].square().mean().item(), rel=1e-4)


def test_excluded_layers_stay_whole_and_are_not_counted_anywhere(data: Prepared) -> None:
    """In a shared scoring, in the card that goes with the weights, and in what `evaluate` counts by it."""
    mine = params(**{"prune.exclude": ["fc", "layer3.*"], "prune.compare": False, "prune.sparsity": 0.5})
    assert scoring_key(mine) != scoring_key(params(**{"prune.compare": False}))
    apart, shared = pruned(mine, data), pruned(mine, data, scored(mine, data))
    assert apart.mask == shared.mask
    assert not any(name.startswith(("fc.", "layer3.")) for name in apart.mask.keep)
    apart.mask.apply_(apart.model)
    about = card(mine, data, apart.mask, apart.model)
    assert set(about["not_covered"]) | set(apart.mask.keep) == set(prunable(apart.model))
    counted = metrics.count_parameters(apart.model, masked(apart.model, about))
    assert counted.sparsity == pytest.approx(0.5, abs=1 / apart.mask.total)
    whole = pruned(params(**{"prune.compare": False}), data)
    assert "not_covered" not in card(mine, data, whole.mask, whole.model)


def test_few_images_are_scored_by_all_of_them(data: Prepared, capsys: pytest.CaptureFixture[str]) -> None:
    """With a note, and as where the parameter says so."""
    size = data.sizes["train"]
    score = {"prune.score": {"name": "snip"}, "prune.compare": False}
    many = pruned(params(**score, **{"prune.batch_size": 4096}), data)
    assert f"by all {size} training images at once, not by 4096" in capsys.readouterr().err
    same = pruned(params(**score, **{"prune.batch_size": size}), data)
    assert capsys.readouterr().err == ""
    assert all(torch.equal(keep, same.mask.keep[name]) for name, keep in many.mask.keep.items())


def test_scores_are_not_shared_over_rounds(data: Prepared) -> None:
    several = params(**{"prune.rounds": 2})
    with pytest.raises(ValueError, match="rounds 1"):
        pruned(several, data, scored(several, data))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"prune.score.steps": 1}, {"objective.weight": 2.0}, {"data.flip": True}]
)
def test_another_scoring_has_another_key(change: dict[str, Any]) -> None:
    assert scoring_key(params(**change)) != scoring_key(params())


# --- channels -------------------------------------------------------------------------------------------------------

CHANNELS = {"prune.structure": "channels", "prune.macs": 0.25, "prune.sparsity": 0.0, "prune.round_to": 4,
            "architecture.width": 1.0}  # fmt: skip


def widths(model: torch.nn.Module) -> dict[str, int]:
    return {name: len(p) for name, p in model.named_parameters() if p.dim() == 4}


def test_channels_are_cut_before_anything_is_trained(data: Prepared) -> None:
    """The network is narrow, its weights are those of the whole one, and no weight is masked."""
    mine = params(**CHANNELS)
    found = pruned(mine, data)
    whole = pruned(params(**{"prune.sparsity": 0.0, "architecture.width": 1.0}), data).model
    assert 0.2 <= found.report["macs"] <= 0.25
    assert found.mask.sparsity == 0 and found.report["kept"] == found.mask.total
    assert found.channels is not None
    assert torch.equal(found.model.conv1.weight, whole.conv1.weight[found.channels["conv1"]])
    again = pruned(mine, data)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), again.model.parameters(), strict=True))


def test_controls_mean_the_same_for_channels(data: Prepared) -> None:
    found = {c: pruned(params(**CHANNELS, **{"prune.control": c}), data) for c in ("none", "shuffled", "reinitialised")}
    plain, mixed, anew = found.values()
    assert widths(plain.model) == widths(mixed.model) == widths(anew.model)
    same = {name: torch.equal(plain.channels[name], mixed.channels[name]) for name in plain.channels}
    assert not all(same.values())
    assert all(torch.equal(kept, anew.channels[name]) for name, kept in plain.channels.items())
    assert not torch.equal(plain.model.conv1.weight, anew.model.conv1.weight)


@pytest.mark.filterwarnings("ignore:no weight survives", "ignore:.*lie on no path")
@pytest.mark.parametrize("control", ["none", "reinitialised"])
def test_weights_of_the_narrow_network_are_pruned_too(control: str, data: Prepared) -> None:
    found = pruned(params(**{**CHANNELS, "prune.sparsity": 0.5, "prune.control": control}), data)
    assert found.mask.sparsity == pytest.approx(0.5, abs=1e-3)
    assert {name: tuple(keep.shape) for name, keep in found.mask.keep.items()} == {
        name: tuple(found.model.get_parameter(name).shape) for name in found.mask.keep
    }
    alone = pruned(params(**CHANNELS), data)
    assert found.report["image_passes"] > alone.report["image_passes"]  # both scorings are counted


def test_channels_by_lot_need_no_score(data: Prepared) -> None:
    found = pruned(params(**CHANNELS, **{"prune.allocation": "random", "prune.score": {"name": "magnitude"}}), data)
    assert found.report["image_passes"] == 0
    assert 0.2 <= found.report["macs"] <= 0.25


def test_scores_without_a_gate_are_named(data: Prepared) -> None:
    with pytest.raises(PruneError, match="which epsd, prospr and snip differentiate"):
        pruned(params(**CHANNELS, **{"prune.score": {"name": "grasp"}}), data)


def test_a_narrow_network_is_built_again_from_its_card(data: Prepared) -> None:
    mine = params(**CHANNELS)
    found = pruned(mine, data)
    about = card(mine, data, found.mask, found.model)
    again = built(about["architecture"], about["num_classes"], about["image_shape"], about["shapes"])
    again.load_state_dict(found.model.state_dict())
    images = torch.rand(2, *data.image_shape)
    assert torch.equal(again.eval()(images), found.model.eval()(images))
    assert "shapes" not in card(params(), data, found.mask, found.model)
