"""Early pruning: find the mask that keeps the weights worth self-distilling. Writes artifacts/prune/."""

from typing import Any

from torch import nn

from epsd import artifacts, pruning
from epsd.architectures import ARCHITECTURES
from epsd.data import Augmentation, Prepared
from epsd.masks import Mask
from epsd.objectives import OBJECTIVES
from epsd.params import Params
from epsd.registry import choose
from epsd.runtime import mix, pick_device, seed_everything
from epsd.scores import SCORES
from epsd.stage import run_stage
from epsd.types import Batches, Objective, Score


def main(params: Params) -> str:
    """Build the network, score it on augmented training images, save mask, initial weights and report."""
    data = Prepared.load(artifacts.DATA)
    model = build(params, data)
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
        model = build(params, data)
    artifacts.save_pruned(mask, model, report)
    dead = f", no weight left in {', '.join(mask.dead_layers())}" if mask.dead_layers() else ""
    return f"kept {mask.kept:,} of {mask.total:,} weights, sparsity {mask.sparsity:.4f}{dead}"


def build(params: Params, data: Prepared) -> nn.Module:
    """The randomly initialised network on its device."""
    architecture = choose(ARCHITECTURES, params.architecture, "architecture")
    network: nn.Module = architecture(data.num_classes, data.image_shape)
    return network.to(pick_device(params.device))


def comparison(
    params: Params, model: nn.Module, batches: Batches, mask: Mask, score: Score, objective: Objective
) -> dict[str, Any]:
    """How live the distillation was, and how much of the mask cross entropy alone would have chosen."""
    if not params.prune.compare:
        return {}
    selection = params.prune.model_dump(include={"sparsity", "scope", "rounds", "keep_at_least_one"})
    overlap = pruning.overlap_with_cross_entropy(mask, model, batches, score=score, objective=objective, **selection)
    return {"jaccard_cross_entropy": overlap, **pruning.signal(model, batches, score, objective)}


if __name__ == "__main__":
    run_stage("prune", main)
