"""The one classifier loop: self-distilled training with the mask held after every step, checkpoint and resume."""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from epsd.compute import distributed, joint_layers, networks, quantise, shortage
from epsd.compute.cost import Meter
from epsd.compute.devices import to_device
from epsd.compute.seeds import mix
from epsd.compute.speed import compiled, lay_out_
from epsd.data.balance import weighed
from epsd.data.loaders import Source, as_batches
from epsd.losses import (
    Metric,
    PlainLoss,
    are_classes,
    as_objective,
    class_logits,
    cross_entropy,
    logits_of,
    no_such_class,
    of_type,
)
from epsd.masks import Mask
from epsd.project.progress import Progress
from epsd.project.recipes import Recipe
from epsd.project.runtime import note
from epsd.training import autotune, checkpoints
from epsd.training.groups import Freeze
from epsd.training.moving import Moving
from epsd.training.parts import Fitting, added
from epsd.training.record import History, Record, Tally, TrainingError, judged_by
from epsd.training.result import Result, check_judged
from epsd.training.schedule import lr_at
from epsd.training.updates import Updates
from epsd.types import Batch, Batches, Loss, Objective


def fit(
    model: nn.Module,
    train: Source,
    *,
    objective: Objective | Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    mask: Mask | None = None,
    moving: Moving | None = None,
    recipe: Recipe | None = None,
    validation: Source | None = None,
    metrics: Mapping[str, Metric] | None = None,
    progress: bool = True,
    seed: int = 0,
    checkpoint: Path | None = None,
    mark: str | None = None,
    meter: Meter | None = None,
    on_epoch: Callable[[Record], None] | None = None,
    on_mask: Callable[[Mask], None] | None = None,
) -> History:
    """Train `model` in place on its own device; weights that `mask` removed are exactly zero after every step.

    After `parallel.start` in each of several processes, they share every batch of `train` and `validation`: all of
    them get the same records, and the weights are those that one process would find, to rounding (with
    `Recipe.accumulate` above 1 only where no BatchNorm tells the parts of a batch apart).

    Parameters
    ----------
    train : prepared batches, a `DataLoader` of (image, label) pairs, or an iterable of `Batch`: see `as_batches`.
    objective : a self-distillation method, or a plain `loss(logits, labels)`, which gets what the network gives: one
        logit per image of a binary task, or several tensors, of which the one named `logits` is judged. On a CPU it is
        also called with a few images before the first step, to see whether the step will fit into memory.
    moving : moves `mask` while training, e.g. `RigL()`; weights that it removes are zero from that step on. The last
        mask is what `on_mask` is told.
    on_mask : called with the mask before the first step, after each move and after a resume.
    validation : judged after every epoch where given: top1 and nll, or the loss where labels are no classes.
    metrics : judged instead, as val/NAME: functions of all outputs (N, ...) and labels (N, ...) of `validation`.
    progress : a bar where stderr is a terminal (and `EPSD_QUIET` is not set).
    seed : of everything random inside the loop (dropout, and of a DataLoader its order and augmentation): epoch n
        draws from (seed, n) alone, so a resumed run draws the same. The global random state is restored afterwards.
        A batch of one image that BatchNorm cannot normalise is skipped, and that is said.
    checkpoint : file written after every epoch (model, optimiser, objective, history); training goes on from it
        where it exists and carries the same `mark` (`checkpoints.fingerprint`), in any number of processes. None:
        a mark of the network's shapes, the mask, the objective's settings, the recipe and the seed; data and code are
        the caller's to tell apart. The caller deletes the file when the result is safe.
    meter : counts images and seconds on from where it stands (what pruning spent, say); a resumed training puts it
        where the interrupted one left it. Default: from 0.
    on_epoch : called with each epoch's record; after a resume also with the records of the epochs done before.

    Returns
    -------
    One record per epoch; printed, they are one line. The model has the weights that `recipe.ema` and `recipe.keep` ask
    for, rounded where `recipe.quantise` asks for it, and is in eval mode, with or without `validation`. While it
    trains, modules that were in eval mode and frozen stay so (`networks.resting`): a frozen BatchNorm keeps its running
    statistics.

    Raises
    ------
    TrainingError : a loss that is NaN or infinite (says at which epoch and step; the last good checkpoint stays);
        a label for which the network has no output; no batch; nothing trainable; weights in half precision.
    EpsdError : layers without weights yet; outputs that are no logits where the objective or validation needs some.
    OutOfMemory : a step does not fit into memory; says which batch would.
    MaskError : the mask does not fit the model.  CheckpointError : a checkpoint of something else.
    """
    loop = _Loop(model, train, as_objective(objective), mask, recipe or Recipe(), seed, meter or Meter())
    loop.moving, loop.on_mask = moving, on_mask or (lambda mask: None)
    loop.metrics, loop.bar = dict(metrics or {}), progress
    return loop.run(validation, checkpoint, mark, on_epoch or (lambda record: None))


class _Loop:
    """State of one training."""

    def __init__(
        self,
        model: nn.Module,
        train: Source,
        objective: Objective,
        mask: Mask | None,
        recipe: Recipe,
        seed: int,
        meter: Meter,
    ) -> None:
        self.model, self.objective, self.recipe, self.seed = model, objective, recipe, seed
        self.meter, self.rest = meter, networks.resting(model)
        self.counted_forward = meter.through(self.forward)
        batches = as_batches(train, seed=mix(seed, "train"))
        self.objective = objective = weighed(objective, batches)
        self.train = distributed.shard(batches, even=True)
        _check(model, recipe)
        self.freeze = Freeze(model, recipe.freeze, recipe.freeze_epochs)
        self.device = next(model.parameters()).device
        self.way = autotune.ways(recipe, model, self.device)[0]
        self.bits = recipe.weight_bits(0)
        self.times: dict[str, float] = {}
        if distributed.world() > 1 and recipe.compile not in ("auto", "none"):
            raise TrainingError("train.compile: several processes run uncompiled; use none, or launch.processes: 1.")
        if recipe.quantise is not None and recipe.compile not in ("auto", "none"):
            raise TrainingError("train.compile: rounded weights run uncompiled; use none, or train.quantise: null.")
        self.net = compiled(model, recipe.compile, self.device)
        self.mask = mask
        self.moving: Moving | None = None
        self.metrics: dict[str, Metric] = {}
        self.bar = True
        self.skipped = False
        self.on_mask: Callable[[Mask], None] = lambda mask: None
        half = self.way.precision == torch.float16
        self.updates = Updates(model, recipe, recipe.update, self.device, scaled=half)
        self.history = History()
        self.room = Fitting(self, recipe.accumulate)
        objective.begin("train", self.train.size, self.train.num_classes)

    def run(
        self,
        validation: Source | None,
        checkpoint: Path | None,
        mark: str | None,
        on_epoch: Callable[[Record], None],
    ) -> History:
        check_judged(self.recipe, validation is not None)
        lay_out_(self.model, self.way.layout)
        try:
            self.freeze.begin()
            self.result = Result(self.model, self.recipe)
            self.net = distributed.wrapped(self.net)
            return self._run(validation, checkpoint, mark, on_epoch)
        except (RuntimeError, MemoryError, IndexError) as error:
            if told := no_such_class(error):  # on a CPU
                raise TrainingError(told) from None
            if not shortage.is_shortage(error):
                raise
            shortage.release(error, self.device)
            raise shortage.OutOfMemory(self.room.advice()) from None
        finally:
            self.freeze.end()
            lay_out_(self.model, torch.contiguous_format)

    def _run(
        self,
        validation: Source | None,
        checkpoint: Path | None,
        mark: str | None,
        on_epoch: Callable[[Record], None],
    ) -> History:
        self._hold(self.mask)
        if checkpoint is not None and mark is None:
            mark = self._mark()
        if checkpoint is not None and mark is not None and (state := checkpoints.load(checkpoint, mark)):
            self._restore(state)
            self._hold(self.mask)  # whatever a caller's own mark let through
        if not distributed.agree(len(self.history)):
            raise TrainingError("only some of the processes see the checkpoint: they need one common project folder.")
        for record in self.history:
            on_epoch(record)
        judged = None if validation is None else distributed.shard(as_batches(validation, seed=mix(self.seed, "train")))
        steps, epochs = len(self.train), self.recipe.epochs
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            distributed.prepared(self.model),
            Progress(
                "train", steps * epochs, steps * len(self.history), shown=self.bar, after=len(self.history)
            ) as bar,
        ):
            for epoch in range(len(self.history), epochs):
                if thawed := self.freeze.thawed(epoch):
                    self.updates.begin(thawed)
                    self.net = distributed.wrapped(self.net)
                record = self._epoch(epoch, bar)
                if judged is not None:
                    record |= {f"val/{name}": value for name, value in self.judge(judged).items()}
                self.history.append(record)
                self.result.consider(self.history)
                if checkpoint is not None and mark is not None:
                    self._save(checkpoint, mark)
                on_epoch(record)
                bar.say(" ".join(f"{word} {record[key]:.4g}" for word, key in _SHOWN.items() if key in record))
        self.result.settle()
        if self.recipe.quantise is not None:
            quantise.round_(self.model, self.recipe.quantise.bits)
        self.model.eval()
        return self.history

    def _hold(self, mask: Mask | None) -> None:
        """From now on what `mask` removes is zero."""
        if mask is None:
            return
        self.mask = mask
        self.updates.hold(mask)
        self.result.hold(mask)
        self.on_mask(mask)

    def _settle(self, batch: Batch) -> None:
        """In how many parts a batch is computed, and how: what the recipe leaves open, fixed from here on."""
        self.room.find(batch)
        times = autotune.autotuned(self, batch)
        if not times:
            return
        self.times = {str(way): seconds for way, seconds in times.items()}
        self.take(autotune.best(times))
        self.room.find(batch)
        if distributed.is_main():
            each = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in self.times.items())
            note(f"train: {self.way} is taken; a step took {each}.")

    def take(self, way: autotune.Way) -> None:
        """Compute the passes through the network so from here on."""
        if way.compile != self.way.compile:
            self.net = compiled(self.model, way.compile, self.device)
        self.way = way
        lay_out_(self.model, way.layout)

    def _moves(self, step: int) -> bool:
        """Let the mask move; whether that takes the place of the step."""
        if self.moving is None or self.mask is None:
            return False
        weights = {name: self.model.get_parameter(name) for name in self.mask.keep}
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in weights.items()}
        moved = self.moving.moved(self.mask, step, len(self.train) * self.recipe.epochs, weights, gradients)
        self._hold(moved)
        return moved is not None and self.moving.instead_of_step

    def _epoch(self, epoch: int, bar: Progress) -> Record:
        torch.manual_seed(mix(self.seed, "train", epoch))
        networks.train_(self.model, [*self.rest, *self.freeze.modules])
        self.bits = self.recipe.weight_bits(epoch)
        started = time.perf_counter()
        tally = Tally(len(self.train), self.device, epoch)
        progress = (epoch + 1) / self.recipe.epochs
        for step, drawn in enumerate(self.train.epoch(epoch, self.objective.needs)):
            batch = to_device(drawn, self.device)
            try:
                if not self.room.known:
                    self._settle(batch)
                    torch.manual_seed(mix(self.seed, "train", epoch))
                self._step(epoch * len(self.train) + step, batch, progress, tally)
            except ValueError as error:
                self._skip(error)
            bar.step()
        self.updates.settle()
        if not tally.steps:
            raise TrainingError("there is no batch to train on: use another train.batch_size.")
        distributed.settle_buffers(self.model)
        self.result.average_buffers()
        record = {"epoch": epoch + 1.0, **tally.means()}
        first = self.updates.optimiser.param_groups[0]
        record["train/lr"] = first["lr"] / first["factor"]
        record["time/epoch"] = time.perf_counter() - started
        record |= {f"time/step {name}": seconds for name, seconds in self.times.items()}
        self.meter.seconds += record["time/epoch"]
        return record | self.meter.figures("cost/")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) in full precision, whatever the network computes in. A plain loss gets what the network gives.

        Raises EpsdError: several outputs, where a self-distillation method needs logits.
        """
        images = networks.as_weights(images, self.model)
        if images.dim() == 4:
            images = images.contiguous(memory_format=self.way.layout)
        with joint_layers.together(), torch.autocast(self.device.type, self.way.precision, self._lowered):
            outputs = quantise.passed(self.net, images, self.bits)
        if not isinstance(self.objective, PlainLoss):
            logits_of(outputs)
        logits: Tensor = tree_map(self._kept, outputs)
        return logits

    @property
    def _lowered(self) -> bool:
        return self.way.precision is not None

    def _kept(self, output: object) -> object:
        if not isinstance(output, Tensor):
            return output
        full = output.float() if self._lowered and output.is_floating_point() else output
        return full.clone() if self.recipe.compile == "graphs" else full  # the next replay writes over them

    def _step(self, number: int, batch: Batch, progress: float, tally: "Tally") -> None:
        loss = self.backward(shortage.parts(batch, self.room.parts), progress)
        if number == 0:
            distributed.check_used(self.model)
        tally.add(loss.total, loss.terms, loss.logits, batch.labels)
        lr = lr_at(self.recipe, number, len(self.train))
        tally.add_gradient(self.updates.take(lr, lambda: self._moves(number)))
        self.result.step()

    def _skip(self, error: ValueError) -> None:
        if not networks.is_lonely(error):
            raise error
        if not self.skipped and distributed.is_main():
            note(f"train: a batch is skipped, {networks.LONELY}: drop_last, or another batch size, avoids that.")
        self.skipped = True

    def backward(self, parts: list[Batch], progress: float) -> Loss:
        """The gradient of a batch, from its parts, and what to log of it (detached)."""
        self.updates.forget()
        self._announce(0, len(parts))
        if len(parts) == 1:
            loss = self._loss(parts[0], progress)
            self.updates.backward(loss.total)
            return loss._replace(total=loss.total.detach())
        size = sum(len(part.labels) for part in parts)
        losses = []
        for number, part in enumerate(parts):
            self._announce(number, len(parts))
            with distributed.unsynced(self.net) if number + 1 < len(parts) else contextlib.nullcontext():
                losses.append(self._backward_part(part, progress, len(part.labels) / size))
        self._announce(0, len(parts))
        return added(losses)

    def _announce(self, part: int, count: int) -> None:
        """Tell an objective that remembers the last batch which of how many parts comes next."""
        if hasattr(self.objective, "part"):
            self.objective.part = part, count

    def _loss(self, part: Batch, progress: float) -> Loss:
        loss = self.objective.loss(self.counted_forward, part, progress)
        if not loss.total.requires_grad:
            raise TrainingError("the loss does not depend on any trainable parameter: there is nothing to learn.")
        return loss

    def _backward_part(self, part: Batch, progress: float, share: float) -> Loss:
        loss = self._loss(part, progress)
        total = loss.total * share
        self.updates.backward(total)
        return Loss(total.detach(), {name: term * share for name, term in loss.terms.items()}, loss.logits)

    def judge(self, batches: Batches) -> Record:
        """top1 and nll, in eval mode, of what would be kept now; the loss, where labels are no classes; or `metrics`.

        EpsdError where it does not give logits then.
        """
        net, judged, self.bits = self.net, self.result.network, self.recipe.weight_bits(self.recipe.epochs)
        self.net = net if judged is self.model else judged
        judged.eval()
        try:
            with torch.no_grad():
                return judged_by(self.metrics, self._answers(batches)) if self.metrics else self._judge(batches)
        finally:
            self.net = net

    def _answers(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """What the network gives, named `logits` where it is several tensors, and the labels, batch by batch."""
        for drawn in batches.epoch(0):
            batch = to_device(drawn, self.device)
            yield logits_of(self.forward(batch.images), named=True), batch.labels

    def _judge(self, batches: Batches) -> Record:
        right, loss, seen = (torch.zeros((), device=self.device) for _ in range(3))
        plain = self.objective.function if isinstance(self.objective, PlainLoss) else cross_entropy
        classes = True
        for given, labels in self._answers(batches):
            seen, classes = seen + len(labels), are_classes(labels)
            if not classes:
                loss = loss + plain(given, of_type(labels, given)) * len(labels)
                continue
            logits = class_logits(given, labels)
            loss = loss + nn.functional.cross_entropy(logits, labels, reduction="sum")
            right = right + (logits.argmax(1) == labels).sum()
        distributed.sum_([right, loss, seen])
        if not seen:
            raise TrainingError("validation: there is no batch to judge the network on.")
        mean = float(loss / seen)
        return {"top1": float(right / seen), "nll": mean} if classes else {"loss": mean}

    def _mark(self) -> str:
        """Of all that makes this training another one, data and code excepted."""
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        kept = None if self.mask is None else self.mask.digest()
        own = repr if dataclasses.is_dataclass(self.objective) else checkpoints.described  # without its state
        settings = [self.recipe.model_dump(), own(self.objective)]
        settings += [] if self.moving is None else [repr(self.moving)]
        return checkpoints.fingerprint({"shapes": shapes, "mask": kept, "settings": settings, "seed": self.seed})

    def _save(self, checkpoint: Path, mark: str) -> None:
        """All processes put the state together, the main one writes it."""
        state = self._state()
        if distributed.is_main():
            checkpoints.save(checkpoint, state, mark)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            **self.updates.state_dict(),
            "objective": self.objective.state_dict(),
            "history": list(self.history),
            "parts": self.room.parts,
            "way": str(self.way),
            "times": self.times,
            "result": self.result.state_dict(),
            **({"mask": self.mask.keep} if self.moving is not None and self.mask is not None else {}),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.mask = Mask(state["mask"]) if "mask" in state else self.mask
        self.take(autotune.resumed(state["way"], self.recipe, self.way))
        self.model.load_state_dict(state["model"])
        self.updates.load_state_dict(state)
        self.result.load_state_dict(state["result"])
        placed = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in state["objective"].items()}
        self.objective.load_state_dict(placed)
        self.history = History(copy.deepcopy(state["history"]))
        self.meter.stand_at(Meter.of(self.history[-1], "cost/"))
        self.room.known, self.room.parts, self.times = True, state["parts"], dict(state["times"])


_SHOWN = {"epoch": "epoch", "loss": "train/loss", "val": "val/top1"}


def _check(model: nn.Module, recipe: Recipe) -> None:
    """Raises what `fit` does for a network that cannot be trained as it is."""
    networks.check(model)
    if recipe.quantise is not None:
        quantise.check(model)
    types = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if not types:
        raise TrainingError("no parameter of the network is trainable (requires_grad): there is nothing to learn.")
    if half := types & {torch.float16, torch.bfloat16}:
        raise TrainingError(
            f"the weights are {str(half.pop()).removeprefix('torch.')}, in which small steps vanish: train "
            "model.float(); train.precision says in which type it computes."
        )
    if torch.float64 in types and recipe.precision not in ("auto", "fp32"):
        raise TrainingError(f"train.precision: {recipe.precision} is for weights in single precision, not in double.")
