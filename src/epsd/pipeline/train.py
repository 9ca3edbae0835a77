"""From a pruned network to a trained one: the composition behind the stage `train` and every trial of the search."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from epsd.architectures import narrowed
from epsd.compute.cost import Meter
from epsd.compute.seeds import mix
from epsd.compute.speed import keep_freed_memory
from epsd.data.prepared import Prepared
from epsd.data.sampling import naming
from epsd.data.streaming import Augmentation
from epsd.masks import Mask, prunable
from epsd.objectives import OBJECTIVES
from epsd.project.params import Params
from epsd.registry import choose
from epsd.training.fit import fit
from epsd.training.moving import Moving
from epsd.training.record import Record
from epsd.types import Batches


def trained(
    params: Params,
    data: Prepared,
    model: nn.Module,
    mask: Mask,
    *,
    on_epoch: Callable[[Record], None],
    checkpoint: Path | None = None,
    mark: str = "",
    meter: Meter | None = None,
    moving: Moving | None = None,
    on_mask: Callable[[Mask], None] | None = None,
) -> list[Record]:
    """Train `model` in place under `mask`, judged on validation after every epoch where there is such a split.

    `meter`: what was spent before (`Meter.of` the prune report); each record's `cost/...` then includes it.
    `moving`, `on_mask`, `checkpoint`, `mark`, `on_epoch` and the errors: see `epsd.training.fit.fit`.
    """
    keep_freed_memory()
    return fit(
        model,
        batches(params, data, "train"),
        objective=choose(OBJECTIVES, params.objective, "objective"),
        mask=mask,
        moving=moving,
        on_mask=on_mask,
        recipe=params.train,
        validation=batches(params, data, "validation") if data.sizes["validation"] else None,
        seed=params.seed,
        checkpoint=checkpoint,
        mark=mark,
        meter=meter,
        on_epoch=on_epoch,
    )


def batches(params: Params, data: Prepared, split: Any) -> Batches:
    """Augmented and shuffled for train; as they are for validation."""
    training = split == "train"
    with naming("train.batch_size"):
        return data.batches(
            split,
            batch_size=params.train.batch_size,
            seed=mix(params.seed, "train"),
            augmentation=Augmentation(params.data.crop_padding, params.data.flip) if training else None,
            shuffle=training,
            drop_last=training,
        )


def card(params: Params, data: Prepared, mask: Mask, model: nn.Module) -> dict[str, Any]:
    """What stands beside saved weights: how to build the network again, to feed it, and what was removed from it.

    `shapes`, of a network that was made narrow alone: its tensors that are smaller than the architecture has them.
    `weight_bits`, of one whose weights were rounded in training alone.
    """
    made = (params.architecture, data.num_classes, data.image_shape)
    may_be = params.prune.structure == "channels" or params.start.weights is not None
    made_so: dict[str, Any] = {"shapes": shapes} if may_be and (shapes := narrowed(model, *made)) else {}
    made_so |= {"weight_bits": params.train.quantise.bits} if params.train.quantise is not None else {}
    whole = [name for name in prunable(model) if name not in mask.keep]
    return made_so | {
        "dataset": params.data_title,
        "architecture": params.architecture,
        "num_classes": data.num_classes,
        "class_names": data.class_names,
        "image_shape": data.image_shape,
        "mean": data.mean,
        "std": data.std,
        "reading": data.index.get("reading", {}),
        "mask": mask.summary(),
        "seed": params.seed,
        **({"not_covered": whole} if whole else {}),
    }
