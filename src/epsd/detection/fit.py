"""The training loop of a detector around a classifier's backbone. The mask follows along."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from epsd.compute import distributed, joint_layers, networks, shortage
from epsd.compute.devices import pick_precision
from epsd.compute.seeds import mix
from epsd.compute.speed import give_back
from epsd.detection import foreseen
from epsd.detection.backbone import DetectionError
from epsd.detection.pictures import Pictures, Sample, loaded, moved_to, training_batches
from epsd.detection.whole_batch import Whole
from epsd.masks import Mask
from epsd.project.progress import Progress
from epsd.project.recipes import DetectorRecipe
from epsd.training import checkpoints
from epsd.training.updates import Updates
from epsd.voc.scenes import Scene

OnEpoch = Callable[[dict[str, float]], None]

SAVE_EVERY = 300.0
"""Seconds between two checkpoints inside an epoch (of one process; several save after each epoch alone)."""


class _Run(NamedTuple):
    """What stays the same through a training. `net`: the detector as it is called, in several processes by DDP.
    `kept`: bytes that the process may hold between steps.
    """

    detector: nn.Module
    net: nn.Module
    updates: Updates
    lr_at: Callable[[int], float]
    device: torch.device
    precision: torch.dtype | None
    kept: float


def fit_detector(
    detector: nn.Module,
    scenes: Sequence[Scene],
    recipe: DetectorRecipe,
    *,
    channels: int,
    mask: Mask | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 0,
    checkpoint: Path | None = None,
    mark: str = "",
    on_epoch: OnEpoch | None = None,
) -> list[dict[str, float]]:
    """Train a detector of torchvision's interface in place. Deterministic in `seed` on the CPU.

    After `parallel.start` in each of several processes they share every batch, and find the weights of one to
    rounding; a batch that cannot be split evenly (the last one of an epoch) is computed by all of them alike.

    Parameters
    ----------
    detector : called with pictures and targets it returns its losses by name, which are added.
    scenes : the training split. channels : 1 grey, 3 RGB: what the detector's backbone takes.
    mask : under the detector's parameter names (`follow`); removed weights are exactly 0 after every step.
    workers : processes that decode pictures, where they are not kept in memory.
    checkpoint, mark : as `epsd.training.fit.fit` has them: written after every epoch, and every five minutes of a long
        one; gone on from where there is one, to the same weights.
    on_epoch : called after each epoch with its row of the history, after a resume with the rows of those before too.

    Returns
    -------
    One row per epoch: epoch (from 1), lr (of its last step), loss, the detector's terms, gradient_norm, seconds.

    Raises
    ------
    DetectionError : no scene to train on; a loss that is NaN or infinite (says where); a batch of one picture where
        batch normalisation needs two; processes that do not see the same checkpoint.
    CheckpointError : a checkpoint of something else.  OutOfMemory : a step does not fit into memory.
    """
    if not scenes:
        raise DetectionError("detect: there is no training picture.")
    device = torch.device(device)
    epochs = recipe.passes(len(scenes))
    steps = epochs * len(training_batches(range(len(scenes)), recipe.batch_size))
    pictures = Pictures(scenes, channels)
    state = checkpoints.load(checkpoint, mark) if checkpoint is not None else None
    history, part = (list(state["history"]), _Part(**state["part"])) if state else ([], _Part())
    detector.to(device).train()
    left = epochs * len(scenes) - len(history) * len(scenes) - part.count
    with _told_of_lonely_values():
        precision = pick_precision(recipe.precision, device)
        need = foreseen.check(detector, pictures, device, precision, batch_size=recipe.batch_size, passes=left)
    run = _start(detector, recipe, mask, device, steps, need.kept)
    if state:
        run.detector.load_state_dict(state["detector"])
        run.updates.load_state_dict(state)
    if not (distributed.agree(len(history)) and distributed.agree(part.steps)):
        raise DetectionError("only some of the processes see the checkpoint: they need one common project folder.")
    tell = on_epoch or (lambda row: None)
    for row in history:
        tell(row)

    def save(part: _Part) -> None:
        if checkpoint is not None and distributed.is_main():
            whole = {"detector": detector.state_dict(), **run.updates.state_dict(), "history": history}
            checkpoints.save(checkpoint, whole | {"part": vars(part)}, mark)

    gpus = [device] if device.type == "cuda" else []
    bar = Progress("detect", epochs * len(scenes), epochs * len(scenes) - left, after=len(history))
    with torch.random.fork_rng(gpus), distributed.prepared(detector), Whole(detector) as whole, bar as progress:
        for epoch in range(len(history), epochs):
            torch.manual_seed(mix(seed, "detect", epoch))
            batches = training_batches(torch.randperm(len(scenes)).tolist(), recipe.batch_size)
            pictures.flip = torch.rand(len(scenes)) < 0.5 if recipe.flip else None
            rest = batches[part.steps :]
            drawn = loaded(pictures, [batch[_share(batch)] for batch in rest], workers)
            step = _Steps(run, whole, mix(seed, "detect", epoch), epoch + 1, len(batches))
            with _told_of_shortage(device):
                history.append(_epoch(step, zip(rest, drawn, strict=True), progress, part, save))
            part = _Part()
            run.updates.settle()
            distributed.settle_buffers(detector)
            save(part)
            tell(history[-1])
    give_back(above=0)
    return history


@dataclass
class _Part:
    """Of an epoch what is done: steps, pictures, sums of the terms over pictures, seconds."""

    steps: int = 0
    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@contextlib.contextmanager
def _told_of_shortage(device: torch.device) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not shortage.is_shortage(error):
            raise
        raise shortage.OutOfMemory(f"detect: out of memory on {device}. {foreseen.ADVICE}") from None


def _alike(batch: Sequence[int]) -> bool:
    """Whether a batch cannot be split evenly, so that every process computes all of it."""
    return len(batch) % distributed.world() > 0


def _share(batch: Sequence[int]) -> slice:
    """Which pictures of a batch this process takes."""
    return slice(0, len(batch)) if _alike(batch) else distributed.share(len(batch))


def _start(
    detector: nn.Module, recipe: DetectorRecipe, mask: Mask | None, device: torch.device, steps: int, kept: float
) -> _Run:
    detector.to(device)
    precision = pick_precision(recipe.precision, device)
    updates = Updates(detector, recipe, "foreach", device, scaled=precision == torch.float16)
    if mask is not None:
        updates.hold(mask)
    net = distributed.wrapped(detector)
    return _Run(detector, net, updates, lambda step: lr_at(recipe, step, steps), device, precision, kept)


def lr_at(recipe: DetectorRecipe, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) of `steps`: warm-up by steps, then a cosine to zero."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    return recipe.lr * (warm * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


class _Steps(NamedTuple):
    """The `steps` of one epoch (counted from 1), whose random numbers follow from `seed`."""

    run: _Run
    whole: Whole
    seed: int
    epoch: int
    steps: int

    def begin(self, number: int, batch: Sequence[int]) -> tuple[str, float]:
        """Step `number` on the pictures `batch`: where that is, in words, and its learning rate."""
        self.whole.begin(mix(self.seed, "step", number), _share(batch).start)
        return f"epoch {self.epoch}, step {number + 1}", self.run.lr_at((self.epoch - 1) * self.steps + number)


def _epoch(
    steps: _Steps,
    batches: Iterable[tuple[list[int], list[Sample]]],
    progress: Progress,
    part: _Part,
    save: Callable[[_Part], None],
) -> dict[str, float]:
    """The steps that `part` leaves to do."""
    run, before, lr = steps.run, part.seconds, 0.0
    run.detector.train()
    started = saved = time.perf_counter()
    for batch, samples in batches:
        where, lr = steps.begin(part.steps, batch)
        with distributed.alone() if _alike(batch) else contextlib.nullcontext():
            losses = _losses(run, steps.whole, samples)
        for name, value in _step(run, losses, lr, where).items():
            part.sums[name] = part.sums.get(name, 0.0) + value * len(batch)
        give_back(above=run.kept)
        part.steps, part.count = part.steps + 1, part.count + len(batch)
        now = time.perf_counter()
        part.seconds = before + now - started
        if now - saved >= SAVE_EVERY and part.steps < steps.steps and distributed.world() == 1:
            save(part)
            saved = time.perf_counter()
        progress.say(f"{where} of {steps.steps}, loss {part.sums['loss'] / part.count:.3f}")
        progress.step(len(batch))
    means = {name: total / part.count for name, total in part.sums.items()}
    return {"epoch": steps.epoch, "lr": lr, **means, "seconds": part.seconds}


def _losses(run: _Run, whole: Whole, samples: Sequence[Sample]) -> dict[str, Tensor]:
    images, targets = moved_to(samples, run.device)
    lowered = torch.autocast(run.device.type, run.precision, enabled=run.precision is not None)
    with _told_of_lonely_values(), joint_layers.together(), lowered:
        return whole.weighed(run.net(images, targets))


@contextlib.contextmanager
def _told_of_lonely_values() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if not networks.is_lonely(error):
            raise
        raise DetectionError(
            f"detect.batch_size: batch normalisation sees a single value of a map of one cell ({error}). Take "
            "larger batches, larger pictures or a lower detect.detector.extra_levels."
        ) from None


def _step(run: _Run, losses: dict[str, Tensor], lr: float, where: str) -> dict[str, float]:
    """One update. Returns the loss, its terms and the norm of the gradient before clipping."""
    total = torch.stack(list(losses.values())).float().sum()
    told = torch.stack([total.detach(), *(loss.detach().float() for loss in losses.values())])
    distributed.mean_([told])
    terms = dict(zip(("loss", *losses), told.tolist(), strict=True))
    if not math.isfinite(terms["loss"]):
        bad = ", ".join(f"{name} {value:g}" for name, value in terms.items() if not math.isfinite(value))
        raise DetectionError(
            f"detect: the loss is no number in {where} ({bad}). Lower detect.lr, lengthen detect.warmup_steps, "
            "or set detect.clip_norm."
        )
    run.updates.forget()
    run.updates.backward(total)
    return {**terms, "gradient_norm": float(run.updates.take(lr))}
