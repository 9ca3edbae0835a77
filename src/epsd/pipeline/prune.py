"""From parameters to a pruned network: the composition behind the stage `prune` and every trial of the search."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from epsd.architectures import built
from epsd.compute import distributed
from epsd.compute.cost import Meter
from epsd.compute.devices import pick_precision, seed_everything
from epsd.compute.memory import GIB
from epsd.compute.seeds import mix
from epsd.compute.speed import keep_freed_memory
from epsd.data.balance import weighed
from epsd.data.prepared import Prepared
from epsd.data.sampling import naming
from epsd.data.streaming import Augmentation
from epsd.losses import PlainLoss, cross_entropy
from epsd.masks import Mask
from epsd.objectives import OBJECTIVES
from epsd.pipeline.budget import Budget
from epsd.pipeline.weights import source_of
from epsd.project.params import Params
from epsd.project.runtime import note
from epsd.pruning import channels, paths, start, widths
from epsd.pruning import prune as pruning
from epsd.pruning.channels import Kept
from epsd.pruning.scoring import Means, within
from epsd.registry import choose
from epsd.scores import SCORES
from epsd.types import Batches, Objective, Score, Scores


class Pruned(NamedTuple):
    """`mask` and the network with the weights to train (all of them, unmasked), on its device.

    `report`: the mask's summary; what finding it cost (`Meter.figures`, the comparison excluded); the comparison; what
    of the mask is in effect. `examined`: that layer by layer, None for a dense network. `channels`: those that the
    network was cut to before its weights were looked at, None where it is as wide as its architecture. `scores`: those
    that the mask was cut from, None where none were computed here.
    """

    mask: Mask
    model: nn.Module
    report: dict[str, Any]
    examined: paths.Examined | None = None
    channels: Kept | None = None
    scores: Scores | None = None


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
    taken: start.Taken | None


def pruned(params: Params, data: Prepared, known: Scored | Pruned | None = None) -> Pruned:
    """Build the network, score it on augmented training images, select. Seeds everything from `params.seed` first.

    `known`: what `scored` gave for parameters with an equal `scoring_key`; it is selected from instead of scoring
    again, with the same mask. It needs `prune.rounds: 1`, as later rounds score what earlier ones left. With more of
    them it is what this function gave for the parameters without their control.
    """
    work, kept, ranked = _begin(params, data), None, list[Scores]()
    if params.start.mask == "keep" and work.taken is not None:
        mask = start.mask_of(work.model, work.taken)
        report = mask.summary() | {"start_share": work.taken.share}
        return _examined(params, data, _controlled(params, data, Pruned(mask, work.model, report)))
    if params.prune.structure == "channels":
        work, kept, narrowing = _narrowed(params, data, work)
    if kept is not None and params.prune.sparsity == 0:
        mask = Mask.dense(work.model)
        report = mask.summary() | narrowing
    elif isinstance(known, Pruned):
        mask, report = known.mask, known.report
    elif known is None:
        how: dict[str, Any] = {**params.prune.model_dump(include={"rounds", "exclude"}), **selection(params)}
        how |= _draws(params)
        with within(work.means):
            with _measured(work) as spent:
                asked: dict[str, Any] = {"score": work.score, "objective": work.objective, "on_scores": ranked.append}
                mask = pruning.prune(work.model, work.batches, **asked, **how)
            report = mask.summary() | spent
            if params.prune.compare:
                report |= _compared(work, mask, how)
            if kept is not None:
                report = _added(narrowing, report)
    else:
        mask, report = _cut(known, params)
    report |= {} if work.taken is None else {"start_share": work.taken.share}
    found = Pruned(mask, work.model, report, channels=kept, scores=ranked[0] if ranked else None)
    return _examined(params, data, _controlled(params, data, found))


def scored(params: Params, data: Prepared) -> Scored:
    """The scoring of `pruned` by itself. Seeds everything from `params.seed` first."""
    work = _begin(params, data)
    model, batches, score, objective, means, *_ = work
    with within(means):
        with _measured(work) as report:
            how = {**_draws(params), "exclude": params.prune.exclude}
            scores = pruning.scored(model, batches, score=score, objective=objective, **how)
        if not params.prune.compare:
            return Scored(scores, None, report)
        plain = scores
        if pruning.follows_objective(score):
            alone = PlainLoss(cross_entropy, objective.needs)
            plain = pruning.scored(model, batches, score=score, objective=alone, **how)
        return Scored(scores, plain, report | pruning.signal(model, batches, score, objective))


def scoring_key(params: Params) -> dict[str, Any]:
    """All parameters that `scored` depends on, beside the data: those with equal keys share one scoring."""
    sections = params.model_dump(include={"seed", "device", "architecture", "objective", "start"})
    augmentation = params.data.model_dump(include={"crop_padding", "flip"})
    own = params.prune.model_dump(include={"score", "batch_size", "compare", "precision", "exclude"})
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
    model, taken = begun(params, data)
    at_once = min(params.prune.batch_size, data.sizes["train"])
    if at_once < params.prune.batch_size:
        note(f"prune.batch_size: scoring by all {at_once} training images at once, not by {params.prune.batch_size}.")
    with naming("prune.batch_size"):
        batches = data.batches(
            "train",
            batch_size=at_once,
            seed=mix(params.seed, "prune"),
            augmentation=Augmentation(params.data.crop_padding, params.data.flip),
            shuffle=True,
            drop_last=True,
        )
    score = choose(SCORES, params.prune.score, "prune.score")
    objective = weighed(choose(OBJECTIVES, params.objective, "objective"), batches)
    device = data.machine.device
    memory = None if params.prune.memory == "auto" else params.prune.memory * GIB
    means = Means(memory, pick_precision(params.prune.precision, device))
    return _Scoring(model, batches, score, objective, means, device, taken)


def _controlled(params: Params, data: Prepared, found: Pruned) -> Pruned:
    mask, model = pruning.controlled(found.mask, params.prune.control, mix(params.seed, "shuffle")), found.model
    if params.prune.control == "reinitialised":
        model = begun(params, data, mix(params.seed, "reinitialise")).model
        if found.channels is not None:
            model = channels.cut(model, data.image_shape, found.channels)
    if params.prune.rescale:
        pruning.rescale_(model, mask)
    return found._replace(mask=mask, model=model)


def _narrowed(params: Params, data: Prepared, work: _Scoring) -> tuple[_Scoring, Kept, dict[str, Any]]:
    """The network cut to the channels that `prune.macs` allows, which those are, and what finding them cost."""
    wanted, structure = params.prune, channels.Structure(work.model, data.image_shape)
    if structure.whole and distributed.is_main():
        note(f"kept whole, as they cannot be narrower: {structure.left_whole()}.")
    macs, auto = wanted.macs, partial(Budget, params, data, work.model, structure)
    find = auto().share if isinstance(macs, str) else lambda select: (macs, {})
    how = wanted.model_dump(include={"allocation", "round_to", "floor"})
    how["seed"] = mix(params.seed, "channels")
    lots: Scores = {name: torch.zeros(group.size) for name, group in structure.groups.items()}
    rank = partial(pruning.gates, work.model, work.batches, structure, score=work.score, **_draws(params))
    with within(work.means):
        with _measured(work) as report:
            gates = lots if wanted.allocation == "random" else rank(objective=work.objective)
        select = partial(widths.chosen, structure, gates, **how)
        share, costs = find(select)
        kept = select(macs=share)
        if wanted.compare and wanted.allocation != "random" and pruning.follows_objective(work.score):
            plain = rank(objective=PlainLoss(cross_entropy, work.objective.needs))
            others = widths.chosen(structure, plain, macs=share, **how)
            report["channels_jaccard_cross_entropy"] = widths.jaccard(kept, others)
    if wanted.control == "shuffled":
        kept = widths.shuffled(structure, kept, mix(params.seed, "shuffle"))
    report |= widths.summary(structure, kept) | costs
    return work._replace(model=channels.cut(work.model, data.image_shape, kept)), kept, report


def _added(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two reports as one: what they cost is added, the peak is the higher one."""
    meter = Meter.of(first)
    meter.add(Meter.of(second))
    peak = max(report.get("peak_memory_mib", 0.0) for report in (first, second))
    return first | second | meter.figures() | {"peak_memory_mib": peak}


_RANDOM: dict[str, dict[str, paths.Layer]] = {}
"""What random weights of ERK densities leave of a network: the same for all scores, so that cells of a study share
it."""


def _examined(params: Params, data: Prepared, found: Pruned) -> Pruned:
    network = params.model_dump(include={"seed", "architecture", "start"}), params.prune.exclude, data.image_shape
    kept = {name: len(indices) for name, indices in (found.channels or {}).items()}
    key = json.dumps([*network, data.num_classes, kept, found.mask.kept, found.mask.total], default=str)
    seed, known = mix(params.seed, "random erk"), _RANDOM.get(key)
    examined = paths.examined(found.model, found.mask, data.image_shape, seed, known)
    _RANDOM[key] = examined.random
    paths.warn_of_lost(examined)
    return found._replace(report=found.report | examined.summary(), examined=examined)


class Begun(NamedTuple):
    """The network that is pruned, on the device of the data, and what of it came from `start.weights`."""

    model: nn.Module
    taken: start.Taken | None = None


def begun(params: Params, data: Prepared, anew: int | None = None) -> Begun:
    """The network with the weights that `start` names, as narrow as theirs; without them, those that `params.seed`
    draws; with `anew`, those that this seed draws. Seeds all random numbers.

    Raises ArtifactError, RegistryError, StartError: weights that cannot be had, or that do not fit.
    """
    seed_everything(params.seed if anew is None else anew)
    model = built(params.architecture, data.num_classes, data.image_shape)
    if params.start.weights is None:
        return Begun(model.to(data.machine.device))
    source = source_of(params.start.weights)
    model = start.narrow_as(model, source)
    if anew is not None:
        return Begun(model.to(data.machine.device))
    taken = start.take_(model, source, params.start.head, data.class_names)
    if distributed.is_main():
        _tell(f"start: {taken}")
    return Begun(model.to(data.machine.device), taken)


def initial(params: Params, data: Prepared) -> nn.Module:
    """The network that is pruned, on the device of the data. Seeds all random numbers. Raises as `begun`."""
    return begun(params, data).model


@cache
def _tell(text: str) -> None:
    """Once in a process: every trial and cell begins alike."""
    note(text)


def _compared(work: _Scoring, mask: Mask, how: dict[str, Any]) -> dict[str, Any]:
    """How live the distillation was, and how much of the mask cross entropy alone would have chosen."""
    model, batches, score, objective, *_ = work
    overlap = pruning.overlap_with_cross_entropy(mask, model, batches, score=score, objective=objective, **how)
    return {"jaccard_cross_entropy": overlap, **pruning.signal(model, batches, score, objective)}
