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
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from epsd.compute.cost import Meter
from epsd.compute.devices import pick_precision
from epsd.compute.seeds import mix
from epsd.losses import cross_entropy
from epsd.masks import Mask, check_fits, covered, prunable
from epsd.project.recipes import Recipe
from epsd.project.settings import Count, Positive
from epsd.registry import variant
from epsd.studies.prune_then_distill.distillation import Distillation
from epsd.training import checkpoints, result
from epsd.training.fit import fit
from epsd.training.record import Record
from epsd.training.schedule import Rewound
from epsd.types import Batch, Batches, BatchNeeds, EpsdError, Objective


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
class Course:
    """A teacher is trained and pruned, then its student is distilled: phases one after the other.

    Kept on disk: `course.safetensors` after each phase, beside it the one that is at work.

    Parameters
    ----------
    recipe, train, validation, seed, meter : as of `epsd.training.fit.fit`; every epoch of every phase is another
        epoch of `train`. The meter also counts the teacher's forward passes while it teaches.
    folder, mark : where and as what every epoch is kept; a course of the same goes on there after a kill, to the same
        result. The caller deletes the folder when the result is safe.
    on_epoch : called with the record of each epoch; after a resume also with those of the epochs done before.
    history : the records of all phases, `epoch` counted through, `train/phase` 0 (teacher), 1 ... n (rounds) and n + 1
        (student).
    chosen : of each phase the record of the epoch whose weights were handed on.
    """

    settings: Rewinding
    recipe: Recipe
    train: Batches
    validation: Batches | None
    seed: int
    folder: Path
    mark: str
    on_epoch: Callable[[Record], None]
    meter: Meter = field(default_factory=Meter)
    history: list[Record] = field(default_factory=list)
    chosen: list[Record] = field(default_factory=list)

    def prune(self, teacher: nn.Module, sparsity: float, *, exclude: Iterable[str] = (), **how: Any) -> Mask:
        """Train `teacher` in place with cross entropy, prune it in rounds to `sparsity`; the mask.

        exclude, how : of each round's selection, as of `epsd.pruning.prune.prune` and `Mask.from_scores`.

        Raises
        ------
        RewindingError : `select: validation` without validation images; rounds longer than the teacher's training; a
            recipe that rounds weights, by whose magnitudes each round would prune.
        And what `epsd.training.fit.fit` and `Mask.from_scores` raise.
        """
        if self.settings.select == "validation" and self.validation is None:
            raise RewindingError("select: 'validation' needs validation images: set data.validation, or select: last.")
        if self.recipe.quantise is not None:
            raise RewindingError(
                "train.quantise: prune_then_distill prunes by magnitude, which rounding levels: use null."
            )
        check_fits(covered(prunable(teacher), exclude=exclude), sparsity, **how)
        teacher_epochs, round_epochs, _ = self.settings.epochs(self.recipe)
        dense, densities = lasting(self.recipe, teacher_epochs), self.settings.densities(sparsity)
        mask = self._restored(teacher)
        for number in range(len(self.chosen), len(densities) + 1):
            if number:
                # the last round's target is `sparsity` itself, so that rounding removes what a one-shot method would
                target = sparsity if number == len(densities) else 1 - densities[number - 1]
                weights = covered(prunable(teacher), exclude=exclude)
                magnitudes = {name: weight.detach().abs() for name, weight in weights.items()}
                mask = Mask.from_scores(magnitudes, target, **how, within=mask)
            self._run(teacher, mask, rewound(dense, round_epochs) if number else dense)
            self._keep(teacher, mask)
        return mask

    def distil(self, teacher: nn.Module, student: nn.Module, mask: Mask) -> None:
        """Train `student` in place under `mask`, with `teacher` as it stands."""
        objective = Distillation(
            teacher,
            temperature=self.settings.temperature,
            alpha=self.settings.alpha,
            precision=pick_precision(self.recipe.precision, next(teacher.parameters()).device),
            meter=self.meter,
        )
        self._run(student, mask, lasting(self.recipe, self.settings.epochs(self.recipe)[2]), objective)

    def figures(self) -> dict[str, float]:
        """`teacher/...`, the cost of each part (`cost/teacher_image_passes`, `cost/rounds_seconds`, ...), and the
        student's validation figures where an epoch was chosen by them.
        """
        last, spent = len(self.chosen) - 1, Meter()
        found = {"teacher/rounds": float(last - 1)}
        for name, record in {"dense": self.chosen[0], "pruned": self.chosen[-2]}.items():
            found |= {f"teacher/{name}_{key[4:]}": value for key, value in record.items() if key.startswith("val/")}
        for name, phase in {"teacher": 0, "rounds": last - 1, "student": last}.items():
            done = Meter.of([record for record in self.history if record["train/phase"] <= phase][-1], "cost/")
            found[f"cost/{name}_image_passes"] = float(done.image_passes - spent.image_passes)
            found[f"cost/{name}_seconds"] = done.seconds - spent.seconds
            spent = done
        return found | (result.chosen(self.chosen[-1]) if self.settings.select == "validation" else {})

    def _run(self, model: nn.Module, mask: Mask, recipe: Recipe, objective: Objective | None = None) -> None:
        """Train `model` in place as the next phase; it ends with the weights of the chosen epoch."""
        number, before = len(self.chosen), len(self.history)
        keep: Literal["best", "last"] = "best" if self.settings.select == "validation" else "last"

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
            checkpoint=self._file(number),
            mark=self.mark,
            meter=self.meter,
            on_epoch=follow,
        )
        self.chosen.append(result.kept(self.history[before:], keep))

    def _keep(self, teacher: nn.Module, mask: Mask) -> None:
        """The phase is over: from here on a kill cannot lose it."""
        state = {"model": teacher.state_dict(), "mask": mask.keep, "history": self.history, "chosen": self.chosen}
        checkpoints.save(self.folder / "course.safetensors", state, self.mark)
        self._file(len(self.chosen) - 1).unlink(missing_ok=True)

    def _restored(self, teacher: nn.Module) -> Mask:
        """The mask of the last phase that is over, whose weights `teacher` then has; a dense one where none is."""
        if not (state := checkpoints.load(self.folder / "course.safetensors", self.mark)):
            return Mask.dense(teacher)
        teacher.load_state_dict(state["model"])
        self.history, self.chosen = list(state["history"]), list(state["chosen"])
        self.meter.stand_at(Meter.of(self.history[-1], "cost/"))
        for record in self.history:
            self.on_epoch(record)
        return Mask(state["mask"])

    def _file(self, number: int) -> Path:
        return self.folder / f"phase-{number:02d}.safetensors"
