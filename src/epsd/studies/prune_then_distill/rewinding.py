"""Prune, then distill: a dense teacher, iterative magnitude pruning with learning-rate rewinding, a distilled student.

The procedure of Park and No, "Prune Your Model Before Distill It" (ECCV 2022, official code ososos888/prune-then-
distill), which EPSD saves: no teacher is trained there. Rounds are those of Renda, Frankle and Carbin, "Comparing
Rewinding and Fine-tuning" (ICLR 2020): a share of the remaining weights of least magnitude goes, the others keep their
values, and training runs again through the last part of the learning-rate schedule.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from torch import nn
from torch.utils.data import DataLoader

from epsd.compute.cost import Meter
from epsd.compute.devices import pick_precision
from epsd.compute.seeds import mix
from epsd.data.loaders import as_batches
from epsd.losses import cross_entropy
from epsd.masks import Mask, Scope, check_fits, covered, prunable
from epsd.project.recipes import Recipe
from epsd.project.settings import Count, Positive
from epsd.registry import variant
from epsd.studies.prune_then_distill.distillation import Distillation
from epsd.training import checkpoints
from epsd.training.fit import fit
from epsd.training.record import Record
from epsd.training.result import kept
from epsd.training.schedule import Rewound
from epsd.types import Batch, Batches, BatchNeeds, EpsdError, Objective

OnEpoch = Callable[[Record], None]
Student = Callable[[Mask], tuple[nn.Module, Mask]]
"""The mask that the rounds found -> an untrained student on its device, and the mask to train it under."""


class RewindingError(EpsdError):
    """Settings that do not fit together or the data."""


@variant
class Rewinding:
    """How the teacher is trained and pruned and the student distilled.

    share : (0, 1) of the remaining weights removed in each round. Default 0.2 (both papers).
    teacher_epochs, student_epochs : null = as many as the recipe has (official for CIFAR-100: 200 and 200).
    round_epochs : of each round; null = 65 % of the teacher's (official for CIFAR-100: 130 of 200; for Tiny-ImageNet
        50 of 100).
    temperature, alpha : of the distillation, see `Distillation`. Default 10 and 0.95 (official).
    select : "validation" (default, official: 10 % of train held out): each phase hands on the weights of the epoch
        with the highest validation top-1, of equal ones the lowest NLL. "last": of the last epoch, as for methods that
        report it.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    teacher_epochs: Count | None = None
    round_epochs: Count | None = None
    student_epochs: Count | None = None
    temperature: Positive = 10.0
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.95
    select: Literal["validation", "last"] = "validation"

    def epochs(self, recipe: Recipe) -> tuple[int, int, int]:
        """Of the teacher, of each round, of the student. Raises RewindingError: a round longer than its schedule."""
        teacher = self.teacher_epochs or recipe.epochs
        rounds = self.round_epochs or max(1, round(0.65 * teacher))
        if rounds > teacher:
            raise RewindingError(
                f"round_epochs: {rounds} is more than the teacher's {teacher}: a round runs through the last part of "
                "the teacher's schedule."
            )
        return teacher, rounds, self.student_epochs or recipe.epochs

    def densities(self, sparsity: float) -> list[float]:
        """Density after each round: (1 − share)^k, the last one cut short at 1 − `sparsity`."""
        rounds = math.ceil(math.log(1 - sparsity) / math.log(1 - self.share) - 1e-9)
        return [max((1 - self.share) ** done, 1 - sparsity) for done in range(1, rounds + 1)]


def lasting(recipe: Recipe, epochs: int) -> Recipe:
    """The same recipe over `epochs` epochs: its schedule is stretched."""
    return recipe.model_copy(update={"epochs": epochs})


def rewound(recipe: Recipe, epochs: int) -> Recipe:
    """The last `epochs` epochs of `recipe`, its learning rate rewound to what it was there."""
    return Rewound.model_construct(**{**dict(recipe), "epochs": epochs}, whole=recipe)


class Outcome(NamedTuple):
    """`teacher`: pruned under `teacher_mask`. `student`: trained, under `student_mask`.

    `history`: the records of all phases, `epoch` counted through, `train/phase` 0 (teacher), 1 ... n (rounds) and
    n + 1 (student). `chosen`: of each phase the record of the epoch whose weights were handed on.
    """

    teacher: nn.Module
    teacher_mask: Mask
    student: nn.Module
    student_mask: Mask
    history: list[Record]
    chosen: list[Record]


def prune_then_distill(
    teacher: nn.Module,
    student: Student,
    train: Batches | DataLoader[Any],
    *,
    sparsity: float,
    settings: Rewinding | None = None,
    recipe: Recipe | None = None,
    scope: Scope = "global",
    keep_at_least_one: bool = False,
    exclude: Iterable[str] = (),
    validation: Batches | DataLoader[Any] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    mark: str = "",
    meter: Meter | None = None,
    on_epoch: OnEpoch | None = None,
) -> Outcome:
    """Train `teacher` in place with cross entropy, prune it in rounds to `sparsity`, distil it into a student.

    Parameters
    ----------
    teacher : randomly initialised, on its device.
    student : asked for once the teacher is pruned.
    train, validation, recipe, seed, meter : as of `epsd.training.fit.fit`; every epoch of every phase is another
        epoch of `train`. The meter also counts the teacher's forward passes while it teaches.
    scope, keep_at_least_one, exclude : of each round's selection, as of `epsd.pruning.prune.prune`.
    folder, mark : where and as what every epoch is kept; called again with the same arguments after a kill, it goes on
        there to the same result. The caller deletes the folder when the result is safe.
    on_epoch : called with the record of each epoch; after a resume also with those of the epochs done before.

    Raises
    ------
    RewindingError : `select: validation` without validation images; rounds longer than the teacher's training; a
        recipe that rounds weights, by whose magnitudes each round would prune.
    And what `epsd.training.fit.fit` and `Mask.from_scores` raise.
    """
    settings, recipe = settings or Rewinding(), recipe or Recipe()
    if settings.select == "validation" and validation is None:
        raise RewindingError("select: 'validation' needs validation images: set data.validation, or select: last.")
    if recipe.quantise is not None:
        raise RewindingError("train.quantise: prune_then_distill prunes by magnitude, which rounding levels: use null.")
    check_fits(covered(prunable(teacher), exclude=exclude), sparsity, scope)
    teacher_epochs, round_epochs, student_epochs = settings.epochs(recipe)
    course = _Course(
        as_batches(train, seed=mix(seed, "train")),
        validation,
        settings.select,
        seed,
        folder,
        mark,
        meter or Meter(),
        on_epoch or (lambda record: None),
    )
    dense = lasting(recipe, teacher_epochs)
    mask = course.restored(teacher)
    densities = [1.0, *settings.densities(sparsity)]
    for number in range(course.done, len(densities)):
        if number:
            # the last round's target is `sparsity` itself, so that rounding removes what a one-shot method would
            target = sparsity if number == len(densities) - 1 else 1 - densities[number]
            weights = covered(prunable(teacher), exclude=exclude)
            magnitudes = {name: weight.detach().abs() for name, weight in weights.items()}
            mask = Mask.from_scores(magnitudes, target, scope, keep_at_least_one=keep_at_least_one, within=mask)
        course.run(number, teacher, mask, rewound(dense, round_epochs) if number else dense)
        course.keep(teacher, mask)
    learner, learner_mask = student(mask)
    precision = pick_precision(recipe.precision, next(teacher.parameters()).device)
    objective = Distillation(
        teacher, temperature=settings.temperature, alpha=settings.alpha, precision=precision, meter=course.meter
    )
    course.run(len(densities), learner, learner_mask, lasting(recipe, student_epochs), objective)
    return Outcome(teacher, mask, learner, learner_mask, course.history, course.chosen)


class _Later:
    """Batches from epoch `start` on, so that each phase sees the images in other orders and augmentations."""

    def __init__(self, batches: Batches, start: int) -> None:
        self._batches, self._start = batches, start
        self.size, self.num_classes = batches.size, batches.num_classes

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        return self._batches.epoch(self._start + number, needs)


@dataclass
class _Course:
    """Phases one after the other, kept on disk: `course.safetensors` after each, beside it the one that is at work."""

    train: Batches
    validation: Batches | DataLoader[Any] | None
    select: Literal["validation", "last"]
    seed: int
    folder: Path | None
    mark: str
    meter: Meter
    on_epoch: OnEpoch
    history: list[Record] = field(default_factory=list)
    chosen: list[Record] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Phases that are over."""
        return len(self.chosen)

    def run(
        self, number: int, model: nn.Module, mask: Mask, recipe: Recipe, objective: Objective | None = None
    ) -> None:
        """Train `model` in place as phase `number`; it ends with the weights of the chosen epoch."""
        before = len(self.history)
        keep: Literal["best", "last"] = "best" if self.select == "validation" else "last"

        def follow(record: Record) -> None:
            self.history.append({**record, "epoch": before + record["epoch"], "train/phase": float(number)})
            self.on_epoch(self.history[-1])

        fit(
            model,
            _Later(self.train, before),
            objective=objective or cross_entropy,
            mask=mask,
            recipe=recipe.model_copy(update={"keep": keep}),
            validation=self.validation,
            seed=mix(self.seed, "phase", number),
            checkpoint=None if self.folder is None else self._file(number),
            mark=self.mark,
            meter=self.meter,
            on_epoch=follow,
        )
        self.chosen.append(kept(self.history[before:], keep))

    def keep(self, teacher: nn.Module, mask: Mask) -> None:
        """The phase is over: from here on a kill cannot lose it."""
        if self.folder is None:
            return
        state = {"model": teacher.state_dict(), "mask": mask.keep, "history": self.history, "chosen": self.chosen}
        checkpoints.save(self.folder / "course.safetensors", state, self.mark)
        self._file(self.done - 1).unlink(missing_ok=True)

    def restored(self, teacher: nn.Module) -> Mask:
        """The mask of the last phase that is over, whose weights `teacher` then has; a dense one where none is."""
        if self.folder is None or not (state := checkpoints.load(self.folder / "course.safetensors", self.mark)):
            return Mask.dense(teacher)
        teacher.load_state_dict(state["model"])
        self.history, self.chosen = list(state["history"]), list(state["chosen"])
        self.meter.stand_at(Meter.of(self.history[-1], "cost/"))
        for record in self.history:
            self.on_epoch(record)
        return Mask(state["mask"])

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"phase-{number:02d}.safetensors"
