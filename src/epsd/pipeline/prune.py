"""From parameters to a pruned network: the composition behind the stage `prune` and every trial of the search."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from epsd.architectures import ARCHITECTURES
from epsd.compute.cost import Meter
from epsd.compute.devices import pick_precision, seed_everything
from epsd.compute.memory import GIB
from epsd.compute.seeds import mix
from epsd.compute.speed import keep_freed_memory
from epsd.data.prepared import Augmentation, Prepared
from epsd.data.sampling import naming
from epsd.losses import PlainLoss, cross_entropy
from epsd.masks import Mask
from epsd.objectives import OBJECTIVES
from epsd.project.params import Params
from epsd.pruning import paths
from epsd.pruning import prune as pruning
from epsd.pruning.scoring import Means, within
from epsd.registry import choose
from epsd.scores import SCORES
from epsd.types import Batches, Objective, Score, Scores


class Pruned(NamedTuple):
    """`mask` and the network with the weights to train (all of them, unmasked), on its device.

    `report`: the mask's summary; what finding it cost (`Meter.figures`, the comparison excluded); the comparison; what
    of the mask is in effect. `examined`: that layer by layer, None for a dense network.
    """

    mask: Mask
    model: nn.Module
    report: dict[str, Any]
    examined: paths.Examined | None = None


class Scored(NamedTuple):
    """One scoring of the initial network, which masks of any sparsity can be cut from.

    scores : under the run's objective.  plain : under cross entropy alone, where `prune.compare` asks for it.
    report : cost, peak memory and the distillation signal of this scoring.
    """

    scores: Scores
    plain: Scores | None
    report: dict[str, Any]


class _Scoring(NamedTuple):
    """What a scoring works on."""

    model: nn.Module
    batches: Batches
    score: Score
    objective: Objective
    means: Means
    device: torch.device


def pruned(params: Params, data: Prepared, known: Scored | None = None) -> Pruned:
    """Build the network, score it on augmented training images, select. Seeds everything from `params.seed` first.

    `known`: what `scored` gave for parameters with an equal `scoring_key`; it is selected from instead of scoring
    again, with the same mask. It needs `prune.rounds: 1`, as later rounds score what earlier ones left.
    """
    work = _begin(params, data)
    if known is None:
        how: dict[str, Any] = {"rounds": params.prune.rounds, **selection(params), **_draws(params)}
        with within(work.means):
            with _measured(work) as spent:
                mask = pruning.prune(work.model, work.batches, score=work.score, objective=work.objective, **how)
            report = mask.summary() | spent
            if params.prune.compare:
                report |= _compared(work, mask, how)
    else:
        mask, report = _cut(known, params)
    return _examined(params, data, _controlled(params, data, Pruned(mask, work.model, report)))


def scored(params: Params, data: Prepared) -> Scored:
    """The scoring of `pruned` by itself. Seeds everything from `params.seed` first."""
    work = _begin(params, data)
    model, batches, score, objective, means, _ = work
    with within(means):
        with _measured(work) as report:
            scores = pruning.scored(model, batches, score=score, objective=objective, **_draws(params))
        if not params.prune.compare:
            return Scored(scores, None, report)
        plain = scores
        if pruning.follows_objective(score):
            alone = PlainLoss(cross_entropy, objective.needs)
            plain = pruning.scored(model, batches, score=score, objective=alone, **_draws(params))
        return Scored(scores, plain, report | pruning.signal(model, batches, score, objective))


def scoring_key(params: Params) -> dict[str, Any]:
    """All parameters that `scored` depends on, beside the data: those with equal keys share one scoring."""
    sections = params.model_dump(include={"seed", "device", "architecture", "objective"})
    augmentation = params.data.model_dump(include={"crop_padding", "flip"})
    own = params.prune.model_dump(include={"score", "batch_size", "compare", "precision"})
    return {**sections, **augmentation, **own, **_draws(params)}


def selection(params: Params) -> dict[str, Any]:
    """What makes a mask of scores."""
    wanted = {"sparsity", "scope", "densities", "channel_cap", "keep_at_least_one"}
    return params.prune.model_dump(include=wanted)


def _draws(params: Params) -> dict[str, Any]:
    """How often a round scores, and what mean it takes."""
    return params.prune.model_dump(include={"batches", "average"})


@contextmanager
def _measured(work: _Scoring) -> Iterator[dict[str, Any]]:
    """What the block cost: `Meter.figures` and peak memory, there when it has ended."""
    report: dict[str, Any] = {}
    meter = Meter()
    with pruning.Stopwatch(work.device) as watch, meter.watching(work.model):
        yield report
    meter.seconds = watch.seconds
    report |= meter.figures() | {"peak_memory_mib": watch.peak_memory}


def _cut(known: Scored, params: Params) -> tuple[Mask, dict[str, Any]]:
    """Mask and report at one sparsity, from scores that are there."""
    if params.prune.rounds != 1:
        raise ValueError("scores can be shared with prune.rounds 1 only")
    how = selection(params)
    mask = pruning.selected(known.scores, **how)
    report = mask.summary() | known.report
    if known.plain is not None:
        report["jaccard_cross_entropy"] = mask.jaccard(pruning.selected(known.plain, **how))
    return mask, report


def _begin(params: Params, data: Prepared) -> _Scoring:
    keep_freed_memory(params.prune.memory == "auto")  # faster, for a higher peak: not where memory is counted
    seed_everything(params.seed)
    model = network(params, data)
    with naming("prune.batch_size"):
        batches = data.batches(
            "train",
            batch_size=params.prune.batch_size,
            seed=mix(params.seed, "prune"),
            augmentation=Augmentation(params.data.crop_padding, params.data.flip),
            shuffle=True,
            drop_last=True,
        )
    score = choose(SCORES, params.prune.score, "prune.score")
    objective, device = choose(OBJECTIVES, params.objective, "objective"), data.machine.device
    memory = None if params.prune.memory == "auto" else params.prune.memory * GIB
    means = Means(memory, pick_precision(params.prune.precision, device))
    return _Scoring(model, batches, score, objective, means, device)


def _controlled(params: Params, data: Prepared, found: Pruned) -> Pruned:
    mask = pruning.controlled(found.mask, params.prune.control, mix(params.seed, "shuffle"))
    if params.prune.control != "reinitialised":
        return found._replace(mask=mask)
    seed_everything(mix(params.seed, "reinitialise"))
    return found._replace(mask=mask, model=network(params, data))


def _examined(params: Params, data: Prepared, found: Pruned) -> Pruned:
    examined = paths.examined(found.model, found.mask, data.image_shape, mix(params.seed, "random erk"))
    paths.warn_of_lost(examined)
    return found._replace(report=found.report | examined.summary(), examined=examined)


def network(params: Params, data: Prepared) -> nn.Module:
    """The randomly initialised network on the device of the data."""
    architecture = choose(ARCHITECTURES, params.architecture, "architecture")
    built: nn.Module = architecture(data.num_classes, data.image_shape)
    return built.to(data.machine.device)


def _compared(work: _Scoring, mask: Mask, how: dict[str, Any]) -> dict[str, Any]:
    """How live the distillation was, and how much of the mask cross entropy alone would have chosen."""
    model, batches, score, objective, *_ = work
    overlap = pruning.overlap_with_cross_entropy(mask, model, batches, score=score, objective=objective, **how)
    return {"jaccard_cross_entropy": overlap, **pruning.signal(model, batches, score, objective)}
