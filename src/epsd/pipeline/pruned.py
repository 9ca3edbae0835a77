"""From parameters to a pruned network: the composition behind the stage `prune` and every trial of the search."""

from typing import Any, NamedTuple

from torch import nn

from epsd import pruning
from epsd.architectures import ARCHITECTURES
from epsd.data import Augmentation, Prepared
from epsd.masks import Mask
from epsd.objectives import OBJECTIVES
from epsd.params import Params
from epsd.registry import choose
from epsd.runtime import mix, pick_device, seed_everything
from epsd.scores import SCORES
from epsd.types import Batches, Objective, Score


class Pruned(NamedTuple):
    """`mask` and the network with the weights to train (all of them, unmasked), on its device; `report`: figures."""

    mask: Mask
    model: nn.Module
    report: dict[str, Any]


def pruned(params: Params, data: Prepared) -> Pruned:
    """Build the network, score it on augmented training images, select. Seeds everything from `params.seed` first."""
    seed_everything(params.seed)
    model = network(params, data)
    score = choose(SCORES, params.prune.score, "prune.score")
    objective = choose(OBJECTIVES, params.objective, "objective")
    batches = data.batches(
        "train",
        batch_size=params.prune.batch_size,
        seed=mix(params.seed, "prune"),
        device=pick_device(params.device),
        augmentation=Augmentation(params.data.crop_padding, params.data.flip),
        shuffle=True,
        drop_last=True,
        workers=params.data.workers,
    )
    selection = params.prune.model_dump(include={"sparsity", "scope", "rounds", "keep_at_least_one"})
    with pruning.Stopwatch(pick_device(params.device)) as watch:
        mask = pruning.prune(model, batches, score=score, objective=objective, **selection)
    report = mask.summary() | {"seconds": watch.seconds, "peak_memory_mib": watch.peak_memory}
    report |= comparison(params, model, batches, mask, score, objective)

    mask = pruning.controlled(mask, params.prune.control, mix(params.seed, "shuffle"))
    if params.prune.control == "reinitialised":
        seed_everything(mix(params.seed, "reinitialise"))
        model = network(params, data)
    return Pruned(mask, model, report)


def network(params: Params, data: Prepared) -> nn.Module:
    """The randomly initialised network on its device."""
    architecture = choose(ARCHITECTURES, params.architecture, "architecture")
    built: nn.Module = architecture(data.num_classes, data.image_shape)
    return built.to(pick_device(params.device))


def comparison(
    params: Params, model: nn.Module, batches: Batches, mask: Mask, score: Score, objective: Objective
) -> dict[str, Any]:
    """How live the distillation was, and how much of the mask cross entropy alone would have chosen."""
    if not params.prune.compare:
        return {}
    selection = params.prune.model_dump(include={"sparsity", "scope", "rounds", "keep_at_least_one"})
    overlap = pruning.overlap_with_cross_entropy(mask, model, batches, score=score, objective=objective, **selection)
    return {"jaccard_cross_entropy": overlap, **pruning.signal(model, batches, score, objective)}
