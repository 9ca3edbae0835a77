"""From parameters to a student distilled from a pruned teacher: the composition behind a cell of a study.

What EPSD is compared with for its cost, on the same data, network, batches, recipe and sparsity.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from epsd.architectures import ARCHITECTURES, built
from epsd.compute.cost import Meter
from epsd.data.prepared import Prepared
from epsd.masks import Mask
from epsd.pipeline.prune import initial, pruned
from epsd.pipeline.train import batches
from epsd.project.params import Params
from epsd.project.settings import Choice
from epsd.registry import ParamsError, choose, settings_of
from epsd.studies.prune_then_distill.rewinding import Outcome, Rewinding, prune_then_distill
from epsd.training import result
from epsd.training.record import Record

StudentKind = Literal["narrow", "rewound", "scored"]
"""narrow : the same architecture, dense, of the `width` at which it has as many parameters as the sparse network has
nonzero ones (the paper's student). rewound : the architecture itself from the initial weights of the run's seed, under
the mask that the teacher's rounds found. scored : the same under the mask of `prune.score`, so that it differs from
the run's own network in how it is trained alone."""

_WIDTH_STEPS = 14
"""Halvings of the interval in which the width is sought: to 1/16384 of the teacher's."""


class Distilled(NamedTuple):
    """`student`: trained, under `mask`, built from `architecture`. `teacher`: as pruned.

    `history`: of all phases (see `Outcome`).
    `figures`: `mask/...` of the student, `teacher/...`, the cost of each part (`cost/teacher_image_passes`,
    `cost/rounds_seconds`, ...), and the student's validation figures where an epoch was chosen by them.
    """

    student: nn.Module
    mask: Mask
    architecture: Choice
    history: list[Record]
    figures: dict[str, float]
    teacher: nn.Module


def distilled(
    params: Params,
    data: Prepared,
    settings: Rewinding,
    kind: StudentKind = "narrow",
    *,
    on_epoch: Callable[[Record], None],
    folder: Path | None = None,
    mark: str = "",
) -> Distilled:
    """Teacher of `architecture`, pruned to `prune.sparsity`, distilled into a student; all by the recipe of `train`.

    `folder`, `mark`, `on_epoch` and the errors: see `rewinding.prune_then_distill`. Raises ParamsError: a
    narrower student of an architecture that has no `width`.
    """
    meter, chosen = Meter(), dict(params.architecture)
    if kind == "narrow":
        has_width(params)

    def student(mask: Mask) -> tuple[nn.Module, Mask]:
        nonlocal chosen
        if kind == "scored":
            found = pruned(params.pruning(compare=False), data)
            meter.add(Meter.of(found.report))
            return found.model, found.mask
        if kind == "narrow":
            chosen = narrowed(params, data, nonzero(params, data, mask))
        model = initial(params.model_copy(update={"architecture": chosen}), data)
        return model, mask if kind == "rewound" else Mask.dense(model)

    outcome = prune_then_distill(
        initial(params, data),
        student,
        batches(params, data, "train"),
        sparsity=params.prune.sparsity,
        settings=settings,
        recipe=params.train,
        scope=params.prune.scope,
        keep_at_least_one=params.prune.keep_at_least_one,
        exclude=params.prune.exclude,
        validation=batches(params, data, "validation") if data.sizes["validation"] else None,
        seed=params.seed,
        folder=folder,
        mark=mark,
        meter=meter,
        on_epoch=on_epoch,
    )
    found = figures(outcome, settings)
    return Distilled(outcome.student, outcome.student_mask, chosen, outcome.history, found, outcome.teacher)


def figures(outcome: Outcome, settings: Rewinding) -> dict[str, float]:
    """`mask/...`, `teacher/...` and `cost/...` of the parts, as `Distilled.figures` has them."""
    found = {f"mask/{name}": float(value) for name, value in outcome.student_mask.summary().items()}
    found["teacher/sparsity"] = outcome.teacher_mask.sparsity
    found["teacher/rounds"] = float(len(outcome.chosen) - 2)
    for name, record in {"dense": outcome.chosen[0], "pruned": outcome.chosen[-2]}.items():
        found |= {f"teacher/{name}_{key[4:]}": value for key, value in record.items() if key.startswith("val/")}
    if settings.select == "validation":
        found |= result.chosen(outcome.chosen[-1])
    return found | _parts(outcome.history)


def _parts(history: list[Record]) -> dict[str, float]:
    """Image passes and seconds of teacher, rounds and student, each by itself."""
    last = max(record["train/phase"] for record in history)
    spent, found = Meter(), dict[str, float]()
    for name, phase in {"teacher": 0.0, "rounds": last - 1, "student": last}.items():
        done = Meter.of([record for record in history if record["train/phase"] <= phase][-1], "cost/")
        found[f"cost/{name}_image_passes"] = float(done.image_passes - spent.image_passes)
        found[f"cost/{name}_seconds"] = done.seconds - spent.seconds
        spent = done
    return found


# --- the narrower student -------------------------------------------------------------------------------------------


def nonzero(params: Params, data: Prepared, mask: Mask) -> int:
    """Parameters of the network that `mask` leaves: the surviving weights, and all that is never pruned."""
    return parameters(params.architecture, data) - mask.total + mask.kept


def parameters(architecture: Choice, data: Prepared) -> int:
    """Of all kinds, of the network that `architecture` builds. Nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in built(architecture, data.num_classes, data.image_shape).parameters())


def narrowed(params: Params, data: Prepared, wanted: int) -> Choice:
    """The architecture with the `width` at which its number of parameters comes nearest to `wanted`."""
    has_width(params)
    full = float(vars(choose(ARCHITECTURES, params.architecture, "architecture"))["width"])

    def of(width: float) -> Choice:
        return {**params.architecture, "width": width}

    low, high = full * 2.0**-_WIDTH_STEPS, full
    while high - low > full * 2.0**-_WIDTH_STEPS:
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(of(middle), data) <= wanted else (low, middle)
    return min(of(low), of(high), key=lambda choice: math.fabs(parameters(choice, data) - wanted))


def has_width(params: Params) -> None:
    """Raises ParamsError where the architecture cannot be made narrower."""
    name = params.architecture["name"]
    if name in ARCHITECTURES and "width" not in settings_of(ARCHITECTURES[name]):
        able = ", ".join(key for key, entry in ARCHITECTURES.items() if "width" in settings_of(entry))
        raise ParamsError(
            f"student: 'narrow' needs an architecture with a setting `width` ({able}); '{name}' has none. "
            "Use student: rewound or scored."
        )
