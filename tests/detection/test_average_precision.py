"""Average precision against hand-computed cases and a second, independent implementation."""

import math

import numpy as np
import pytest

from devkits import scene
from epsd.detection.average_precision import (
    HIT,
    IGNORED,
    MISS,
    NOTHING,
    Curve,
    Detections,
    ap_11point,
    ap_area,
    curve,
    judge,
    overlaps,
)
from epsd.voc.scenes import Scene

CAT, DOG = 0, 1


# --- by hand ---------------------------------------------------------------------------------------------------------


def found(*some: tuple[int, float, tuple[float, float, float, float]]) -> Detections:
    """(label, score, box)."""
    boxes = np.array([box for _, _, box in some], dtype=np.float64).reshape(-1, 4)
    return Detections(boxes, np.array([s for _, s, _ in some], float), np.array([n for n, _, _ in some], np.int64))


BOX, FAR = (10.0, 10.0, 30.0, 30.0), (60.0, 60.0, 80.0, 80.0)


def test_overlap_is_the_devkits_with_its_plus_one() -> None:
    random = np.random.default_rng(0)
    low = random.integers(1, 50, (40, 2))
    inclusive = np.hstack([low, low + random.integers(0, 30, (40, 2))]).astype(float)
    ours = overlaps(inclusive[:20] - [1, 1, 0, 0], inclusive[20:] - [1, 1, 0, 0])
    for row, (a, b, c, d) in enumerate(inclusive[:20]):
        for column, (e, f, g, h) in enumerate(inclusive[20:]):
            width, height = min(c, g) - max(a, e) + 1, min(d, h) - max(b, f) + 1
            shared = width * height if width > 0 and height > 0 else 0
            union = (c - a + 1) * (d - b + 1) + (g - e + 1) * (h - f + 1) - shared
            assert ours[row, column] == pytest.approx(shared / union, abs=1e-15)


def test_an_overlap_of_exactly_one_half_counts() -> None:
    verdicts = judge(found((CAT, 0.9, (0, 0, 10, 5))), scene((CAT, (0, 0, 10, 10))), CAT)
    assert verdicts.kinds.tolist() == [HIT]
    assert judge(found((CAT, 0.9, (0, 0, 10, 4.99))), scene((CAT, (0, 0, 10, 10))), CAT).kinds.tolist() == [MISS]


def test_second_detection_of_an_object_is_a_miss() -> None:
    verdicts = judge(found((CAT, 0.9, BOX), (CAT, 0.8, BOX)), scene((CAT, BOX), (CAT, FAR)), CAT)
    assert verdicts.kinds.tolist() == [HIT, MISS]
    assert verdicts.objects.tolist() == [0, NOTHING]


def test_a_detection_goes_to_its_best_object_only() -> None:
    """The second box overlaps both objects by more than a half, but mostly the one that is taken."""
    objects = scene((CAT, (0, 0, 20, 10)), (CAT, (0, 4, 20, 14)))
    verdicts = judge(found((CAT, 0.9, (0, 0, 20, 10)), (CAT, 0.8, (0, 1, 20, 11))), objects, CAT)
    assert verdicts.kinds.tolist() == [HIT, MISS]


def test_difficult_objects_are_ignored_however_often_they_are_found() -> None:
    verdicts = judge(found((CAT, 0.9, BOX), (CAT, 0.8, BOX)), scene((CAT, BOX, True)), CAT)
    assert verdicts.kinds.tolist() == [IGNORED, IGNORED]
    one = curve([found((CAT, 0.9, BOX), (CAT, 0.8, FAR))], [scene((CAT, BOX, True), (CAT, FAR))], CAT)
    assert (one.objects, one.precision.tolist(), one.recall.tolist()) == (1, [1.0], [1.0])


def test_other_classes_do_not_count() -> None:
    verdicts = judge(found((DOG, 0.9, BOX), (CAT, 0.8, BOX)), scene((CAT, BOX), (DOG, FAR)), DOG)
    assert verdicts.kinds.tolist() == [MISS]


def test_average_precision_by_hand() -> None:
    """Hit, miss, hit over two pictures with four objects: precision 1, 1/2, 2/3 at recall 1/4, 1/4, 1/2."""
    scenes = [scene((CAT, BOX), (CAT, FAR)), scene((CAT, BOX), (CAT, FAR))]
    detections = [found((CAT, 0.5, FAR), (CAT, 0.9, BOX)), found((CAT, 0.7, (0, 0, 5, 5)))]
    one = curve(detections, scenes, CAT)
    assert one.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert one.recall.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    assert ap_area(one) == pytest.approx(1 / 4 * 1 + 1 / 4 * 2 / 3)
    assert ap_11point(one) == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)  # recall 0, 0.1, 0.2; then 0.3, 0.4, 0.5


def test_nothing_found_and_nothing_to_find() -> None:
    missed = curve([found()], [scene((CAT, BOX))], CAT)
    assert (ap_area(missed), ap_11point(missed)) == (0.0, 0.0)
    nothing = curve([found((CAT, 0.9, BOX))], [scene((DOG, BOX))], CAT)
    assert math.isnan(ap_area(nothing))
    assert math.isnan(ap_11point(nothing))


def test_perfect_is_one() -> None:
    one = curve([found((CAT, 0.9, BOX), (CAT, 0.3, FAR))], [scene((CAT, BOX), (CAT, FAR))], CAT)
    assert (ap_area(one), ap_11point(one)) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize(("hits", "points"), [(3, 3), (6, 7), (7, 8)])
def test_eleven_points_are_matlabs(hits: int, points: int) -> None:
    """Recall of exactly 0.3 misses MATLAB's third step, which is 3 * 0.1; 0.6 and 0.7 reach theirs."""
    one = Curve(np.arange(1, hits + 1) / 10, np.ones(hits), 10)
    assert ap_11point(one) == pytest.approx(points / 11)


# --- against a second implementation ----------------------------------------------------------------------------------


def _reference(detections: list[Detections], scenes: list[Scene], label: int) -> tuple[float, float]:
    """The devkit's VOCevaldet and VOCap, written again from their description, slowly, in its own pixel numbers."""
    ranked = [
        (float(score), picture, [box[0] + 1, box[1] + 1, box[2], box[3]])
        for picture, one in enumerate(detections)
        for box, score, kind in zip(one.boxes, one.scores, one.labels, strict=True)
        if kind == label
    ]
    ranked.sort(key=lambda item: -item[0])
    truth = {
        (picture, number): [box[0] + 1, box[1] + 1, box[2], box[3]]
        for picture, one in enumerate(scenes)
        for number, (box, kind) in enumerate(zip(one.boxes, one.labels, strict=True))
        if kind == label
    }
    hard = {key for key in truth if scenes[key[0]].difficult[key[1]]}
    positives, right, wrong, used = len(truth) - len(hard), 0, 0, set()
    points = []
    for _, picture, box in ranked:
        best, chosen = -math.inf, None
        for key, other in truth.items():
            if key[0] != picture:
                continue
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if width > 0 and height > 0:
                shared = width * height
                area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
                area += (other[2] - other[0] + 1) * (other[3] - other[1] + 1)
                if shared / (area - shared) > best:
                    best, chosen = shared / (area - shared), key
        if best >= 0.5 and chosen in hard:
            continue
        if best >= 0.5 and chosen not in used:
            used.add(chosen)
            right += 1
        else:
            wrong += 1
        points.append((right / positives, right / (right + wrong)))
    area, recall = 0.0, 0.0
    for here, _ in points:
        if here > recall:
            area += (here - recall) * max(p for r, p in points if r >= here)
            recall = here
    steps = [0, 0.1, 0.2, 3 * 0.1, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    eleven = sum(max([p for r, p in points if r >= step], default=0.0) for step in steps) / 11
    return area, eleven


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_a_second_implementation(seed: int) -> None:
    random = np.random.default_rng(seed)
    scenes, detections = [], []
    for _ in range(6):
        low = random.integers(0, 40, (5, 2))
        boxes = np.hstack([low, low + random.integers(4, 30, (5, 2))]).astype(float)
        labels = random.integers(0, 2, 5)
        hard = random.random(5) < 0.3
        scenes.append(scene(*zip(labels.tolist(), map(tuple, boxes.tolist()), hard.tolist(), strict=True)))
        guesses = np.repeat(boxes, 3, 0) + random.normal(0, 2.5, (15, 4))
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        detections.append(Detections(guesses, random.random(15), random.integers(0, 2, 15)))
    for label in (CAT, DOG):
        one = curve(detections, scenes, label)
        assert (ap_area(one), ap_11point(one)) == pytest.approx(_reference(detections, scenes, label), abs=1e-12)
