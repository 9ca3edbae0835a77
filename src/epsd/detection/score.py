"""What a detector finds, and how good that is by the rules of Pascal VOC and of COCO."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from epsd.compute import distributed, networks
from epsd.compute.speed import give_back, resident
from epsd.detection.average_precision import Curve, Detections, ap_11point, ap_area, curve
from epsd.detection.backbone import DetectionError
from epsd.detection.pictures import Pictures, Target, in_batches, loaded, moved_to
from epsd.voc.scenes import Scene


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
    detector.to(device)
    batches = in_batches(range(len(scenes)), batch_size)
    mine = batches[
        distributed.rank() :: distributed.world()
    ]  # whole ones, as its neighbours may change a picture's padding
    found = []
    with networks.in_mode(detector), torch.autocast(device.type, precision, enabled=precision is not None):
        held = resident()
        for samples in loaded(Pictures(scenes, channels, again=False), mine, workers):
            found.append([as_detections(output) for output in detector(moved_to(samples, device)[0])])
            give_back(above=2 * held)
    return [one for batch in distributed.interleaved(found) for one in batch]


def as_detections(output: Target) -> Detections:
    """What a detector says of one picture: best first, labels from 0."""
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
