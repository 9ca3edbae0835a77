"""Detections against the truth: hits, misses, and average precision as the devkit of Pascal VOC counts it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from epsd.voc.scenes import Floats, Scene


class Detections(NamedTuple):
    """What a detector found in one picture: `boxes` (n, 4) corners of pixels, `scores` (n,), `labels` (n,)."""

    boxes: Floats
    scores: Floats
    labels: npt.NDArray[np.int64]


class Curve(NamedTuple):
    """One class on a split: detections in descending order of score, each a hit, a miss, or ignored (left out here).

    `recall`, `precision` (m,) after each counted detection; `objects`: how many there are to find (not difficult).
    """

    recall: Floats
    precision: Floats
    objects: int


def overlaps(some: Floats, others: Floats) -> Floats:
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4) in corners of pixels.

    Equal to the devkit's on its own inclusive pixel numbers, where it adds 1 to each width and height.
    """
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (some, others)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    result: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return result


HIT, MISS, IGNORED = 1, 0, -1

NOTHING = -1


class Verdicts(NamedTuple):
    """For each detection of a class in a picture: HIT, MISS or IGNORED, and the object it hit, or NOTHING (n,).

    Objects are positions in the scene.
    """

    kinds: npt.NDArray[np.int64]
    objects: npt.NDArray[np.int64]


def judge(found: Detections, scene: Scene, label: int, threshold: float = 0.5) -> Verdicts:
    """What each detection of class `label` in one picture is worth, in the order given (best first).

    The devkit's rule (VOCevaldet.m): a detection goes to the object of its class that it overlaps most; below
    `threshold` it is a miss; at a difficult object it is ignored; the first at an object is the hit, later ones
    are misses, even where another object would have been free.
    """
    mine = found.labels == label
    theirs = np.flatnonzero(scene.labels == label)
    verdicts = Verdicts(np.full(int(mine.sum()), MISS), np.full(int(mine.sum()), NOTHING))
    if not len(theirs) or not mine.any():
        return verdicts
    overlap = overlaps(found.boxes[mine], scene.boxes[theirs])
    taken: set[int] = set()
    for position, best in enumerate(overlap.argmax(1)):
        if overlap[position, best] < threshold:
            continue
        target = int(theirs[best])
        if scene.difficult[target]:
            verdicts.kinds[position] = IGNORED
        elif target not in taken:
            verdicts.kinds[position], verdicts.objects[position] = HIT, target
            taken.add(target)
    return verdicts


def curve(found: Sequence[Detections], scenes: Sequence[Scene], label: int, threshold: float = 0.5) -> Curve:
    """Precision and recall of one class over a split. `found[i]` belongs to `scenes[i]`."""
    scores, verdicts = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    for one, scene in zip(found, scenes, strict=True):
        order = np.argsort(-one.scores, kind="stable")
        ranked = Detections(one.boxes[order], one.scores[order], one.labels[order])
        scores.append(ranked.scores[ranked.labels == label])
        verdicts.append(judge(ranked, scene, label, threshold).kinds)
    every = np.concatenate(verdicts)[np.argsort(-np.concatenate(scores), kind="stable")]
    counted = every[every != IGNORED]
    objects = sum(int(((scene.labels == label) & ~scene.difficult).sum()) for scene in scenes)
    hits = np.cumsum(counted == HIT)
    return Curve(hits / max(objects, 1), hits / np.arange(1, len(hits) + 1), objects)


# MATLAB's 0:0.1:1, bit for bit: it counts up to the middle and down from the end, so that its 0.3 is 3 * 0.1, a
# little above 0.3, while its 0.6 and 0.7 are the plain numbers (numpy's arange differs there).
_ELEVEN = [step * 0.1 for step in range(6)] + [1 - (10 - step) * 0.1 for step in range(6, 11)]


def ap_11point(one: Curve) -> float:
    """Average precision as VOC 2007 counts it: mean over recall 0, 0.1, ... 1 of the best precision at or beyond it.

    NaN where there is nothing to find.
    """
    if one.objects == 0:
        return math.nan
    best = [one.precision[one.recall >= recall].max(initial=0.0) for recall in _ELEVEN]
    return float(sum(best) / 11)


def ap_area(one: Curve) -> float:
    """Average precision as VOC 2010 and later count it: area under the precision made monotonically decreasing.

    NaN where there is nothing to find.
    """
    if one.objects == 0:
        return math.nan
    recall = np.concatenate([[0.0], one.recall, [1.0]])
    precision = np.concatenate([[0.0], one.precision, [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))
