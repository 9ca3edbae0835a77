"""A detector around a classifier backbone: the training loop, detections, and their scores. The mask follows along."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from epsd.compute import distributed, joint_layers
from epsd.compute.seeds import mix
from epsd.compute.speed import align_
from epsd.detection.whole_batch import Whole
from epsd.masks import Mask, MaskHolder
from epsd.project.progress import Progress
from epsd.training import checkpoints
from epsd.types import EpsdError
from epsd.voc.annotations import Curve, Detections, Scene, ap_11point, ap_area, curve, read_picture

IN_MEMORY_UP_TO = 512 * 2**20
"""Bytes of decoded pictures that are kept; a larger set is decoded anew in each epoch."""

Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]
"""A picture (C, H, W) in [0, 1], and its `boxes` (n, 4) and `labels` (n,) counted from 1, as torchvision wants them."""

_LONELY = "Expected more than 1 value per channel when training"

OnEpoch = Callable[[dict[str, float]], None]


class DetectionError(EpsdError):
    """A detector that cannot be trained or scored: a loss that is no number, a test split without objects."""


# --- pictures ---------------------------------------------------------------------------------------------------------


class Pictures(Dataset[Sample]):
    """Scenes as a detector learns them: difficult objects left out. Kept decoded where all fit in memory.

    `flip` (N,) bool: which scenes of this epoch are mirrored left to right; None: none.
    """

    def __init__(self, scenes: Sequence[Scene], channels: int) -> None:
        self.scenes, self.channels = scenes, channels
        self.flip: Tensor | None = None
        size = sum(scene.width * scene.height for scene in scenes) * channels
        self.kept: dict[int, Tensor] | None = {} if size <= IN_MEMORY_UP_TO else None

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        scene, image = self.scenes[index], self._pixels(index).float().div(255)
        wanted = ~scene.difficult
        boxes = torch.from_numpy(scene.boxes[wanted].astype(np.float32))
        labels = torch.from_numpy(scene.labels[wanted] + 1)
        if self.flip is not None and self.flip[index]:
            image = image.flip(2)
            boxes = torch.stack([scene.width - boxes[:, 2], boxes[:, 1], scene.width - boxes[:, 0], boxes[:, 3]], 1)
        return image, {"boxes": boxes, "labels": labels}

    def _pixels(self, index: int) -> Tensor:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        pixels = torch.from_numpy(read_picture(self.scenes[index], self.channels))
        if self.kept is not None:
            self.kept[index] = pixels
        return pixels


def typical_size(scenes: Sequence[Scene]) -> tuple[int, int]:
    """Median height and width of the pictures, in pixels."""
    return int(np.median([s.height for s in scenes])), int(np.median([s.width for s in scenes]))


def _batches(order: Sequence[int], batch_size: int) -> list[list[int]]:
    return [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def training_batches(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches, the last one short; a picture that would be alone in it joins the batch before.

    Alone, it would leave batch normalisation a single value where a map is down to one cell.
    """
    batches = _batches(order, batch_size)
    if batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
        alone = batches.pop()
        batches[-1] += alone
    return batches


def _loaded(pictures: Pictures, batches: list[list[int]], workers: int) -> Iterator[list[Sample]]:
    workers = 0 if pictures.kept is not None else workers
    return iter(DataLoader(pictures, batch_sampler=batches, num_workers=workers, collate_fn=list))


def _to(samples: Sequence[Sample], device: torch.device) -> tuple[list[Tensor], list[Target]]:
    targets = [{key: value.to(device) for key, value in target.items()} for _, target in samples]
    return [image.to(device) for image, _ in samples], targets


# --- training ---------------------------------------------------------------------------------------------------------


def follow(mask: Mask, model: nn.Module, detector: nn.Module) -> Mask:
    """The part of a classifier's mask that its backbone took along, under the detector's parameter names.

    Goes by identity, not by name: `detector` was built from the very parameters of `model`. DetectionError when it
    holds none of the masked ones.
    """
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    moved = {name: names[id(p)] for name, p in model.named_parameters() if id(p) in names and name in mask.keep}
    if not moved:
        raise DetectionError("the detector holds none of the classifier's masked weights.")
    return mask.restricted(moved).renamed(moved.__getitem__)


def sparsity(detector: nn.Module, mask: Mask) -> float:
    """Share of the weights under `mask` (by the detector's names) that are exactly 0, recounted."""
    weights = dict(detector.named_parameters())
    return 1 - sum(int(weights[name].count_nonzero()) for name in mask.keep) / mask.total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a detector is trained: SGD, linear warm-up by steps, then a cosine to zero.

    `clip_norm`: largest gradient norm, None: no clipping. `flip`: mirror half of the pictures, drawn anew each epoch.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_norm: float | None = None
    warmup_steps: int = 0
    flip: bool = False

    @classmethod
    def fields(cls) -> set[str]:
        """The names of its settings, which are those of the section `detect` of params.yaml."""
        return {field.name for field in dataclasses.fields(cls)}

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at `step` of `steps`, from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


class _Run(NamedTuple):
    """What stays the same through a training. `net`: the detector as it is called, in several processes by DDP."""

    detector: nn.Module
    net: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    holder: MaskHolder | None
    device: torch.device
    precision: torch.dtype | None
    clip_norm: float | None


def fit_detector(
    detector: nn.Module,
    scenes: Sequence[Scene],
    recipe: Recipe,
    *,
    channels: int,
    mask: Mask | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
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
    precision : autocast type, None: fp32. workers : processes that decode pictures, where they are not kept in memory.
    checkpoint, mark : as `epsd.training.fit.fit` has them: written after every epoch, gone on from where there is one.
    on_epoch : called after each epoch with its row of the history, after a resume with the rows of those before too.

    Returns
    -------
    One row per epoch: epoch (from 1), lr (of its last step), loss, the detector's terms, gradient_norm, seconds.

    Raises
    ------
    DetectionError : no scene to train on; a loss that is NaN or infinite (says where); a batch of one picture where
        batch normalisation needs two; processes that do not see the same checkpoint.
    CheckpointError : a checkpoint of something else.
    """
    if not scenes:
        raise DetectionError("detect: there is no training picture.")
    device = torch.device(device)
    steps = recipe.epochs * len(training_batches(range(len(scenes)), recipe.batch_size))
    run = _start(detector, recipe, mask, device, precision, steps)
    pictures, history = Pictures(scenes, channels), list[dict[str, float]]()
    if checkpoint is not None and (state := checkpoints.load(checkpoint, mark)):
        history = _restored(run, state)
    if not distributed.agree(len(history)):
        raise DetectionError("only some of the processes see the checkpoint: they need one common project folder.")
    tell = on_epoch or (lambda row: None)
    for row in history:
        tell(row)
    gpus = [device] if device.type == "cuda" else []
    bar = Progress("detect", recipe.epochs * len(scenes), len(history) * len(scenes))
    with torch.random.fork_rng(gpus), distributed.prepared(detector), Whole(detector) as whole, bar as progress:
        for epoch in range(len(history), recipe.epochs):
            torch.manual_seed(mix(seed, "detect", epoch))
            batches = training_batches(torch.randperm(len(scenes)).tolist(), recipe.batch_size)
            pictures.flip = torch.rand(len(scenes)) < 0.5 if recipe.flip else None
            drawn = _loaded(pictures, [batch[_share(batch)] for batch in batches], workers)
            step = _Steps(run, whole, mix(seed, "detect", epoch), epoch + 1)
            history.append(_epoch(step, zip(batches, drawn, strict=True), progress))
            distributed.settle_buffers(detector)
            if checkpoint is not None and distributed.is_main():
                checkpoints.save(checkpoint, _state(run, history), mark)
            tell(history[-1])
    return history


def _alike(batch: Sequence[int]) -> bool:
    """Whether a batch cannot be split evenly, so that every process computes all of it."""
    return len(batch) % distributed.world() > 0


def _share(batch: Sequence[int]) -> slice:
    """Which pictures of a batch this process takes."""
    return slice(0, len(batch)) if _alike(batch) else distributed.share(len(batch))


def _state(run: _Run, history: list[dict[str, float]]) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "detector": run.detector,
        "optimiser": run.optimiser,
        "schedule": run.schedule,
        "scaler": run.scaler,
    }
    state = {name: part.state_dict() for name, part in parts.items()}
    state["schedule"].pop("lr_lambdas")  # the function itself, which is not restored
    return {**state, "history": history}


def _restored(run: _Run, state: dict[str, Any]) -> list[dict[str, float]]:
    run.detector.load_state_dict(state["detector"])
    run.optimiser.load_state_dict(state["optimiser"])
    align_(run.optimiser)
    run.schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None]})
    run.scaler.load_state_dict(state["scaler"])
    return list(state["history"])


def _start(
    detector: nn.Module,
    recipe: Recipe,
    mask: Mask | None,
    device: torch.device,
    precision: torch.dtype | None,
    steps: int,
) -> _Run:
    detector.to(device)
    holder = None if mask is None else MaskHolder(mask, detector)
    if holder is not None:
        holder.weights_()
    optimiser = torch.optim.SGD(
        [p for p in detector.parameters() if p.requires_grad],
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: recipe.factor(step, steps))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    return _Run(
        detector,
        distributed.wrapped(detector),
        optimiser,
        schedule,
        scaler,
        holder,
        device,
        precision,
        recipe.clip_norm,
    )


class _Steps(NamedTuple):
    """The steps of one epoch (counted from 1), whose random numbers follow from `seed`."""

    run: _Run
    whole: Whole
    seed: int
    epoch: int

    def begin(self, number: int, batch: Sequence[int]) -> str:
        """Step `number` on the pictures `batch`; where that is, in words."""
        self.whole.begin(mix(self.seed, "step", number), _share(batch).start)
        return f"epoch {self.epoch}, step {number + 1}"


def _epoch(steps: _Steps, batches: Iterable[tuple[list[int], list[Sample]]], progress: Progress) -> dict[str, float]:
    run = steps.run
    run.detector.train()
    started, sums, count = time.perf_counter(), dict[str, float](), 0
    lr = run.optimiser.param_groups[0]["lr"]
    for number, (batch, samples) in enumerate(batches):
        lr = run.optimiser.param_groups[0]["lr"]
        where = steps.begin(number, batch)
        with distributed.alone() if _alike(batch) else contextlib.nullcontext():
            losses = _losses(run, steps.whole, samples)
        terms = _step(run, losses, where)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value * len(batch)
        count += len(batch)
        progress.step(len(batch))
        progress.say(f"epoch {steps.epoch} loss {sums['loss'] / count:.3f}")
    means = {name: total / count for name, total in sums.items()}
    return {"epoch": steps.epoch, "lr": lr, **means, "seconds": time.perf_counter() - started}


def _losses(run: _Run, whole: Whole, samples: Sequence[Sample]) -> dict[str, Tensor]:
    images, targets = _to(samples, run.device)
    with joint_layers.together(), torch.autocast(run.device.type, run.precision, enabled=run.precision is not None):
        try:
            return whole.weighed(run.net(images, targets))
        except ValueError as error:
            if _LONELY not in str(error):
                raise
            raise DetectionError(
                f"detect.batch_size: batch normalisation sees a single value of a map of one cell ({error}). Take "
                "larger batches, larger pictures or a lower detect.detector.extra_levels."
            ) from None


def _step(run: _Run, losses: dict[str, Tensor], where: str) -> dict[str, float]:
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
    run.optimiser.zero_grad(set_to_none=True)
    run.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
    run.scaler.unscale_(run.optimiser)
    if run.holder is not None:
        run.holder.gradients_()
    norm = nn.utils.clip_grad_norm_(run.detector.parameters(), run.clip_norm or math.inf)
    run.scaler.step(run.optimiser)
    run.scaler.update()
    run.schedule.step()
    if run.holder is not None:
        run.holder.weights_()
    return {**terms, "gradient_norm": float(norm)}


# --- scoring ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def detect(
    detector: nn.Module,
    scenes: Sequence[Scene],
    *,
    channels: int,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    workers: int = 0,
) -> list[Detections]:
    """What the detector finds in each scene, best first; boxes in pixels of the original picture, labels from 0.

    Several processes share the scenes; all of them get all detections.
    """
    device = torch.device(device)
    training = detector.training
    detector.to(device).eval()
    batches = _batches(range(len(scenes)), batch_size)
    mine = batches[
        distributed.rank() :: distributed.world()
    ]  # whole ones, as its neighbours may change a picture's padding
    found = []
    for samples in _loaded(Pictures(scenes, channels), mine, workers):
        with torch.autocast(device.type, precision, enabled=precision is not None):
            outputs = detector(_to(samples, device)[0])
        found.append([_detections(output) for output in outputs])
    detector.train(training)
    return [one for batch in distributed.interleaved(found) for one in batch]


def _detections(output: Target) -> Detections:
    order = torch.argsort(output["scores"].float(), descending=True, stable=True)
    boxes, scores, labels = (output[key][order].cpu() for key in ("boxes", "scores", "labels"))
    return Detections(boxes.double().numpy(), scores.double().numpy(), labels.numpy() - 1)


def countable(scenes: Sequence[Scene]) -> int:
    """Objects that count in a score: those not flagged difficult."""
    return sum(int((~scene.difficult).sum()) for scene in scenes)


class Report(NamedTuple):
    """How good detections are. `summary`: flat, fractions in [0, 1]. `classes`: one row per class."""

    summary: dict[str, float]
    classes: list[dict[str, Any]]


def score_detections(found: Sequence[Detections], scenes: Sequence[Scene], class_names: Sequence[str]) -> Report:
    """Average precision by the rules of Pascal VOC (overlap 0.5) and of COCO.

    `summary`: `map50` (area rule of VOC 2010 and later), `map50_11point` (rule of VOC 2007), `map` and `map75` (COCO:
    mean over overlaps 0.5 to 0.95, and at 0.75). Means go over the classes that have an object to find. Each row of
    `classes`: class, pictures, objects, difficult, ap, ap_11point, recall (NaN where there is no object).

    Raises DetectionError when no scene has an object that counts (`countable`).
    """
    curves = [curve(found, scenes, label) for label in range(len(class_names))]
    if not countable(scenes):
        raise DetectionError("detect: the pictures hold no object that counts, so nothing can be scored.")
    rows = [_row(name, label, curves[label], scenes) for label, name in enumerate(class_names)]
    means = {
        "map50": float(np.nanmean([row["ap"] for row in rows])),
        "map50_11point": float(np.nanmean([row["ap_11point"] for row in rows])),
    }
    return Report(means | coco_map(found, scenes), rows)


def _row(name: str, label: int, one: Curve, scenes: Sequence[Scene]) -> dict[str, Any]:
    mine = [scene.labels == label for scene in scenes]
    return {
        "class": name,
        "pictures": sum(bool(some.any()) for some in mine),
        "objects": one.objects,
        "difficult": sum(int(scene.difficult[some].sum()) for scene, some in zip(scenes, mine, strict=True)),
        "ap": ap_area(one),
        "ap_11point": ap_11point(one),
        "recall": float(one.recall[-1]) if len(one.recall) and one.objects else (0.0 if one.objects else math.nan),
    }


def coco_map(found: Sequence[Detections], scenes: Sequence[Scene]) -> dict[str, float]:
    """`map` and `map75` as COCO counts them, at most 100 detections per picture; difficult objects are its "crowd".

    A detection on a crowd region is neither right nor wrong: what VOC does with difficult objects. Asked of the
    evaluator itself: torchmetrics in between would take a second to import.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    shown = [
        {"image_id": image, "category_id": int(label), "bbox": box, "score": float(score)}
        for image, one in enumerate(found)
        for box, label, score in zip(_corner_and_size(one.boxes), one.labels, one.scores, strict=True)
    ]
    if not shown:
        return {"map": 0.0, "map75": 0.0}
    there = [
        {"image_id": image, "category_id": int(label), "bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
        for image, scene in enumerate(scenes)
        for box, label, crowd in zip(_corner_and_size(scene.boxes), scene.labels, scene.difficult, strict=True)
    ]
    classes = np.unique([*(one["category_id"] for one in shown), *(one["category_id"] for one in there)]).tolist()
    truth = COCO(
        {
            "images": [{"id": image} for image in range(len(scenes))],
            "categories": [{"id": label, "name": str(label)} for label in classes],
            "annotations": [note | {"id": number} for number, note in enumerate(there, start=1)],
        }
    )
    judge = COCOeval_faster(truth, truth.loadRes(shown), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return {"map": max(0.0, float(judge.stats[0])), "map75": max(0.0, float(judge.stats[2]))}


def _corner_and_size(boxes: Any) -> list[list[float]]:
    """(n, 4) x0, y0, x1, y1 -> x0, y0, width, height, as COCO keeps them."""
    corners = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    pairs: list[list[float]] = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    return pairs
