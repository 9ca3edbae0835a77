"""The one classifier loop: self-distilled training with the mask held after every step, checkpoint and resume."""

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader

from epsd.compute import distributed, joint_layers, shortage
from epsd.compute.cost import Meter
from epsd.compute.devices import pick_memory_format, pick_precision, to_device
from epsd.compute.speed import Compile, Update, align_, compiled, lay_out_, pick_update, sgd
from epsd.data.loaders import as_batches
from epsd.losses import as_objective, cross_entropy, no_such_class
from epsd.masks import Mask, MaskHolder
from epsd.project.progress import Progress
from epsd.project.runtime import mix, note
from epsd.registry import variant
from epsd.training import checkpoints
from epsd.types import Batch, Batches, EpsdError, Loss, Objective

Record = dict[str, float]
"""One epoch: `epoch` (from 1), `train/loss`, `train/<term>`, `train/grad_norm` (mean over steps of the norm of the
whole gradient, masked, before clipping), `train/top1`, `train/lr`, `time/epoch`, `val/top1`, ...; what was spent up to
its end (validation excluded): `cost/images_forward`, ..., `cost/image_passes`, `cost/seconds`."""

_CHECK_EVERY = 50
"""Steps between looks at the loss on a GPU: each look waits for the device."""


class TrainingError(EpsdError):
    """Training cannot go on: the loss is not finite, or there is nothing to train on."""


@variant
class Recipe:
    """How to train. Defaults: the CIFAR recipe shared by ProsPr and CS-KD (200 epochs, SGD, 0.1, ÷10 at 50 and 75 %).

    epochs : passes over train.  lr : peak learning rate.  momentum, nesterov, weight_decay : of SGD, on every
        parameter.
    schedule : "step" (× gamma at each of `milestones`, shares of the epochs), "cosine" (to 0 at the end) or "constant".
    warmup_epochs : linear warm-up from lr / steps.  clip_norm : largest gradient norm, null = none.
    precision : "auto" (bf16 on a GPU or processor that computes in it, else fp32), "fp32", "bf16", "fp16" (with loss
        scaling).  memory_format : of images and convolution weights, "auto" (channels_last; contiguous for a network
        that it breaks on a CPU, `epsd.compute.devices.breaks_channels_last`), "channels_last" or "contiguous".
    update : how optimiser and mask go over the parameters ("auto", "fused", "foreach", "loop"), and
    compile : of the passes through the network ("auto", "none", "kernels", "graphs"): see `epsd.compute.speed`.
    accumulate : parts of equal size in which a batch is computed, their gradients added, "auto": 1, doubled until a
        step fits into memory. Each part is normalised by BatchNorm statistics of its own, so the result is that of
        the smaller batch there and of the whole one everywhere else. DLB distils part n from part n of the last batch.
    """

    epochs: Annotated[int, Field(ge=1)] = 200
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=lambda: [0.5, 0.75])
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    update: Update = "auto"
    compile: Compile = "auto"
    accumulate: Literal["auto"] | Annotated[int, Field(ge=1)] = 1

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of optimiser step `step` (from 0)."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "step":
            passed = sum(step // steps_per_epoch >= max(1, round(share * self.epochs)) for share in self.milestones)
            return self.lr * self.gamma**passed
        if self.schedule == "cosine":
            total = max(1, self.epochs * steps_per_epoch - warmup)
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / total))
        return self.lr


def fit(
    model: nn.Module,
    train: Batches | DataLoader[Any],
    *,
    objective: Objective | Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    mask: Mask | None = None,
    recipe: Recipe | None = None,
    validation: Batches | DataLoader[Any] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    mark: str | None = None,
    meter: Meter | None = None,
    on_epoch: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Train `model` in place on its own device; weights that `mask` removed are exactly zero after every step.

    After `parallel.start` in each of several processes, they share every batch of `train` and `validation`: all of
    them get the same records, and the weights are those that one process would find, to rounding (with
    `Recipe.accumulate` above 1 only where no BatchNorm tells the parts of a batch apart).

    Parameters
    ----------
    train : prepared batches, or a `DataLoader` of (image, label) pairs, see `as_batches`.
    objective : a self-distillation method, or a plain `loss(logits, labels)`. On a CPU it is also called with a few
        images before the first step, to see whether the step will fit into memory.
    validation : judged after every epoch where given.
    seed : of everything random inside the loop (dropout, and of a DataLoader its order and augmentation): epoch n
        draws from (seed, n) alone, so a resumed run draws the same. The global random state is restored afterwards.
    checkpoint : file written after every epoch (model, optimiser, objective, history); training goes on from it
        where it exists and carries the same `mark` (`checkpoints.fingerprint`), in any number of processes. None:
        a mark of the network's shapes, the mask, the objective's settings, the recipe and the seed; data and code are
        the caller's to tell apart. The caller deletes the file when the result is safe.
    meter : counts images and seconds on from where it stands (what pruning spent, say); a resumed training puts it
        where the interrupted one left it. Default: from 0.
    on_epoch : called with each epoch's record; after a resume also with the records of the epochs done before.

    Returns
    -------
    One record per epoch.

    Raises
    ------
    TrainingError : a loss that is NaN or infinite (says at which epoch and step; the last good checkpoint stays);
        a label for which the network has no output; no batch.
    OutOfMemory : a step does not fit into memory; says which batch would.
    MaskError : the mask does not fit the model.  CheckpointError : a checkpoint of something else.
    """
    return _Loop(model, train, as_objective(objective), mask, recipe or Recipe(), seed, meter or Meter()).run(
        validation, checkpoint, mark, on_epoch or (lambda record: None)
    )


class _Loop:
    """State of one training."""

    def __init__(
        self,
        model: nn.Module,
        train: Batches | DataLoader[Any],
        objective: Objective,
        mask: Mask | None,
        recipe: Recipe,
        seed: int,
        meter: Meter,
    ) -> None:
        self.model, self.objective, self.recipe, self.seed = model, objective, recipe, seed
        self.meter = meter
        self.counted_forward = meter.through(self.forward)
        self.train = distributed.shard(as_batches(train, seed=mix(seed, "train")), even=True)
        self.device = next(model.parameters()).device
        self.layout = pick_memory_format(recipe.memory_format, model, self.device)
        if distributed.world() > 1 and recipe.compile not in ("auto", "none"):
            raise TrainingError("train.compile: several processes run uncompiled; use none, or launch.processes: 1.")
        self.net = compiled(model, recipe.compile, self.device)
        self.mask = mask
        self.holder: MaskHolder | None = None
        self.autocast = pick_precision(recipe.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)
        self.update = pick_update(recipe.update, self.device)
        self.optimiser = sgd(
            model,
            self.update,
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov and recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )
        self.history: list[Record] = []
        self.room = _Fitting(self, recipe.accumulate)
        objective.begin("train", self.train.size, self.train.num_classes)

    def run(
        self,
        validation: Batches | DataLoader[Any] | None,
        checkpoint: Path | None,
        mark: str | None,
        on_epoch: Callable[[Record], None],
    ) -> list[Record]:
        lay_out_(self.model, self.layout)
        try:
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
            lay_out_(self.model, torch.contiguous_format)

    def _run(
        self,
        validation: Batches | DataLoader[Any] | None,
        checkpoint: Path | None,
        mark: str | None,
        on_epoch: Callable[[Record], None],
    ) -> list[Record]:
        if self.mask is not None:
            self.mask.apply_(self.model)
            self.holder = MaskHolder(self.mask, self.model, foreach=self.update != "loop")
        if checkpoint is not None and mark is None:
            mark = self._mark()
        if checkpoint is not None and mark is not None and (state := checkpoints.load(checkpoint, mark)):
            self._restore(state)
            if self.mask is not None:
                self.mask.apply_(self.model)  # whatever a caller's own mark let through
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
            Progress("train", steps * epochs, steps * len(self.history)) as bar,
        ):
            for epoch in range(len(self.history), epochs):
                record = self._epoch(epoch, bar)
                if judged is not None:
                    record |= {f"val/{name}": value for name, value in self.judge(judged).items()}
                self.history.append(record)
                if checkpoint is not None and mark is not None:
                    self._save(checkpoint, mark)
                on_epoch(record)
                bar.say(" ".join(f"{word} {record[key]:.4g}" for word, key in _SHOWN.items() if key in record))
        return self.history

    def _epoch(self, epoch: int, bar: Progress) -> Record:
        torch.manual_seed(mix(self.seed, "train", epoch))
        self.model.train()
        started = time.perf_counter()
        tally = _Tally(len(self.train), self.device, epoch)
        progress = (epoch + 1) / self.recipe.epochs
        step = -1
        for step, drawn in enumerate(self.train.epoch(epoch, self.objective.needs)):
            batch = to_device(drawn, self.device)
            if not self.room.known:
                self.room.find(batch)
                torch.manual_seed(mix(self.seed, "train", epoch))
            self._step(epoch * len(self.train) + step, batch, progress, tally)
            bar.step()
        if self.holder is not None:
            self.holder.weights_()
        if step < 0:
            raise TrainingError("there is no batch to train on: use a smaller train.batch_size.")
        distributed.settle_buffers(self.model)
        record = {"epoch": epoch + 1.0, **tally.means()}
        record["train/lr"] = self.optimiser.param_groups[0]["lr"]
        record["time/epoch"] = time.perf_counter() - started
        self.meter.seconds += record["time/epoch"]
        return record | self.meter.figures("cost/")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) in full precision, whatever the network computes in."""
        if images.dim() == 4:
            images = images.contiguous(memory_format=self.layout)
        with joint_layers.together():
            if self.autocast is None:
                logits: Tensor = self.net(images)
            else:
                with torch.autocast(self.device.type, self.autocast):
                    logits = self.net(images).float()
        return logits.clone() if self.recipe.compile == "graphs" else logits  # the next replay writes over them

    def _step(self, number: int, batch: Batch, progress: float, tally: "_Tally") -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.lr_at(number, len(self.train))
        loss = self.backward(shortage.parts(batch, self.room.parts), progress)
        if number == 0:
            distributed.check_used(self.model)
        tally.add(loss.total, loss.terms, loss.logits, batch.labels)
        self.scaler.unscale_(self.optimiser)
        if self.holder is not None:
            self.holder.gradients_()
        tally.add_gradient(self._clipped())
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def backward(self, parts: list[Batch], progress: float) -> Loss:
        """The gradient of a batch, from its parts, and what to log of it (detached)."""
        self.optimiser.zero_grad(set_to_none=True)
        self._announce(0, len(parts))
        if len(parts) == 1:
            loss = self.objective.loss(self.counted_forward, parts[0], progress)
            self.scaler.scale(loss.total).backward()  # type: ignore[no-untyped-call]
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

    def _backward_part(self, part: Batch, progress: float, share: float) -> Loss:
        loss = self.objective.loss(self.counted_forward, part, progress)
        total = loss.total * share
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        return Loss(total.detach(), {name: term * share for name, term in loss.terms.items()}, loss.logits)

    @torch.no_grad()
    def _clipped(self) -> Tensor:
        """Norm of the whole gradient, masked and not clipped yet, as a scalar on the device; clipped where asked."""
        if self.recipe.clip_norm is not None:
            return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    @torch.no_grad()
    def judge(self, batches: Batches) -> Record:
        """top1 and nll of the model in eval mode."""
        self.model.eval()
        right, nll, seen = (torch.zeros((), device=self.device) for _ in range(3))
        for drawn in batches.epoch(0):
            batch = to_device(drawn, self.device)
            logits = self.forward(batch.images)
            seen = seen + len(batch.labels)
            nll = nll + nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
            right = right + (logits.argmax(1) == batch.labels).sum()
        distributed.sum_([right, nll, seen])
        if not seen:
            raise TrainingError("validation: there is no batch to judge the network on.")
        return {"top1": float(right / seen), "nll": float(nll / seen)}

    def _mark(self) -> str:
        """Of all that makes this training another one, data and code excepted."""
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        kept = None if self.mask is None else self.mask.digest()
        settings = [
            dataclasses.asdict(self.recipe),
            repr(self.objective) if dataclasses.is_dataclass(self.objective) else "",
        ]
        return checkpoints.fingerprint({"shapes": shapes, "mask": kept, "settings": settings, "seed": self.seed})

    def _save(self, checkpoint: Path, mark: str) -> None:
        """All processes put the state together, the main one writes it."""
        state = self._state()
        if distributed.is_main():
            checkpoints.save(checkpoint, state, mark)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "objective": self.objective.state_dict(),
            "history": self.history,
            "parts": self.room.parts,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        align_(self.optimiser)
        self.scaler.load_state_dict(state["scaler"])
        placed = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in state["objective"].items()}
        self.objective.load_state_dict(placed)
        self.history = copy.deepcopy(state["history"])
        self.meter.stand_at(Meter.of(self.history[-1], "cost/"))
        self.room.known, self.room.parts = True, state["parts"]


class _Fitting:
    """In how many parts a batch is computed so that a step fits into memory: found at the first batch, then fixed.

    A resumed training keeps the number it began with: it is a part of the result. Several processes take the number
    that the one with least memory needs.
    """

    def __init__(self, loop: _Loop, asked: int | Literal["auto"]) -> None:
        self.loop, self.asked = loop, asked
        self.parts = 1 if asked == "auto" else asked
        self.known = False
        self._batch: Batch | None = None

    def find(self, batch: Batch) -> None:
        """Estimate on a CPU, which gives no second chance where memory runs out; with "auto" also try on a GPU.

        Several processes estimate there too: one that ran out while trying would leave the others waiting.
        """
        self._batch, self.known = batch, True
        size, device = len(batch.labels), self.loop.device
        tried = device.type != "cpu" and distributed.world() == 1
        with self._untouched():
            room = None if tried else _room(device)
            if room is not None and size >= shortage.SAMPLE:
                needed = self._need()
                while needed.of(-(-size // self.parts)) > room:
                    if self.asked != "auto" or self.parts * 4 > size:
                        raise shortage.OutOfMemory(self.advice())
                    self.parts *= 2
            while self.asked == "auto" and tried and not self._fits():
                self.parts *= 2
        if self.asked == "auto" and self.parts > 1 and distributed.is_main():
            note(f"train: a batch of {size} does not fit into memory: computed in {self.parts} parts.")

    def advice(self) -> str:
        """What to do about a batch that does not fit. Asks no other process, which may be elsewhere."""
        processes = distributed.world()
        with distributed.alone():
            return self._advice(processes)

    def _advice(self, processes: int) -> str:
        device = self.loop.device
        if self._batch is None or len(self._batch.labels) < shortage.SAMPLE:
            return f"out of memory on {device} before the first step. Take a smaller network, or free memory."
        self.loop.optimiser.zero_grad(set_to_none=True)
        with self._untouched():
            needed = self._need()
        size = len(self._batch.labels)
        return shortage.advice(size, self.parts, needed, shortage.free(device), device, processes)

    def _need(self) -> shortage.Need:
        """From a few images of the batch under the objective itself, with a state of its own."""
        assert self._batch is not None
        objective = copy.copy(self.loop.objective)
        objective.begin("score", self.loop.train.size, self.loop.train.num_classes)
        copies = 1 + (self.loop.recipe.momentum > 0) + (self.loop.holder is not None)

        def graph(batch: Batch) -> object:
            with torch.no_grad():
                objective.loss(self.loop.forward, batch, 1.0)  # DLB looks back at it
            return objective.loss(self.loop.forward, batch, 1.0)

        net, self.loop.net = self.loop.net, self.loop.model  # nothing is compiled for so few images
        try:
            return shortage.need(self.loop.model, graph, self._batch, copies)
        finally:
            self.loop.net = net

    def _fits(self) -> bool:
        """Whether the gradient of the batch can be computed in that many parts."""
        assert self._batch is not None
        try:
            self.loop.backward(shortage.parts(self._batch, self.parts), 1.0)
        except (RuntimeError, MemoryError) as error:
            if not shortage.is_shortage(error) or self.parts * 4 > len(self._batch.labels):
                raise
            shortage.release(error, self.loop.device)
            return False
        return True

    @contextlib.contextmanager
    def _untouched(self) -> Iterator[None]:
        """What is tried leaves no trace in the network's buffers, gradients, or a training that has not begun."""
        loop = self.loop
        buffers = {name: buffer.clone() for name, buffer in loop.model.named_buffers()}
        state, meter = loop.objective.state_dict(), copy.copy(loop.meter)
        try:
            yield
        finally:
            loop.meter.stand_at(meter)
            for name, buffer in loop.model.named_buffers():
                buffer.copy_(buffers[name])
            loop.optimiser.zero_grad(set_to_none=True)
            if not state:
                loop.objective.begin("train", loop.train.size, loop.train.num_classes)


def _room(device: torch.device) -> float | None:
    """Bytes for each process; on a CPU those of a machine share what is free."""
    free = shortage.free(device)
    if free is None or distributed.world() == 1:
        return free
    return distributed.least(0.9 * free if device.type == "cuda" else free / distributed.neighbours())


def added(parts: list[Loss]) -> Loss:
    """The loss of a batch from those of its parts, each already weighted by its share; logits (B, K) in order."""
    total = torch.stack([part.total for part in parts]).sum()
    terms = {name: torch.stack([part.terms[name] for part in parts]).sum() for name in parts[0].terms}
    return Loss(total, terms, torch.cat([part.logits for part in parts]))


_SHOWN = {"epoch": "epoch", "loss": "train/loss", "val": "val/top1"}


class _Tally:
    """Sums of an epoch, kept on the device so that no step waits for it; watches that the loss stays finite."""

    def __init__(self, steps: int, device: torch.device, epoch: int) -> None:
        self._every = 1 if device.type == "cpu" else _CHECK_EVERY
        self._device, self._epoch = device, epoch
        self._losses: list[Tensor] = []
        self._checked = 0
        self._sums: dict[str, Tensor] = {}
        self._right = torch.zeros((), device=device)
        self._norms: list[Tensor] = []
        self._images = 0
        self._steps = steps

    def add(self, total: Tensor, terms: dict[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        self._losses.append(total)
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term
        self._right += (logits.argmax(1) == labels).sum()
        self._images += len(labels)
        if len(self._losses) % self._every == 0:
            self._check()

    def add_gradient(self, norm: Tensor) -> None:
        """`norm`: of the step's gradient; infinite where scaled half precision overflowed and the step is skipped."""
        self._norms.append(norm)

    def _check(self) -> None:
        fresh = torch.stack(self._losses[self._checked :])
        distributed.mean_([fresh])
        bad = torch.nonzero(~torch.isfinite(fresh)).flatten()
        if len(bad):
            step = self._checked + int(bad[0]) + 1
            raise TrainingError(
                f"the loss is {float(fresh[bad[0]])} at epoch {self._epoch + 1}, step {step} of {self._steps}. "
                "The last good epoch is kept. A smaller train.lr, a warm-up or train.clip_norm usually helps."
            )
        self._checked = len(self._losses)

    def means(self) -> Record:
        if self._checked < len(self._losses):
            self._check()
        count = max(1, len(self._losses))
        loss = torch.stack(self._losses).mean() if self._losses else torch.zeros(())
        distributed.mean_([loss, *self._sums.values()])
        images = torch.tensor(self._images, device=self._device)
        distributed.sum_([self._right, images])
        record = {"train/loss": float(loss)}
        record |= {f"train/{name}": float(total) / count for name, total in self._sums.items()}
        norms = torch.stack(self._norms)
        finite = norms[torch.isfinite(norms)]
        record["train/grad_norm"] = float((finite if len(finite) else norms).mean())
        return record | {"train/top1": float(self._right) / max(1, int(images))}
