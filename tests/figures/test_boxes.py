"""Words at boxes: none hides another while there is room, all stay inside the picture."""

import numpy as np
import pytest
from PIL import Image

from epsd.figures.boxes import COLOURS, Label, boxed, placed


def hidden(labels: list[Label], corners: list[tuple[float, float]]) -> float:
    """Area of words that lie on words."""
    found = 0.0
    for number, ((x, y), one) in enumerate(zip(corners, labels, strict=True)):
        for (left, top), other in zip(corners[:number], labels[:number], strict=True):
            wide = min(x + one.width, left + other.width) - max(x, left)
            high = min(y + one.height, top + other.height) - max(y, top)
            found += max(0.0, wide) * max(0.0, high)
    return found


def test_alone_they_stand_above_or_below_and_inside() -> None:
    box = (20.0, 30.0, 60.0, 50.0)
    assert placed([Label(box, 30, 8)], 100, 100) == [(20, 22)]
    assert placed([Label(box, 30, 8, below=True)], 100, 100) == [(20, 50)]
    assert placed([Label((0, 0, 100, 100), 30, 8)], 100, 100) == [(0, 0)]
    assert placed([Label((90, 40, 99, 60), 30, 8)], 100, 100) == [(70, 32)]
    assert placed([Label(box, 300, 8)], 100, 100) == [(0, 22)], "wider than the picture"


@pytest.mark.parametrize("same", [True, False])
def test_in_a_crowd_none_hides_another(same: bool) -> None:
    random = np.random.default_rng(0)
    corners = np.full((40, 2), 50.0) if same else random.uniform(0, 300, (40, 2))
    labels = [Label((x, y, x + 40, y + 30), 60, 10, bool(n % 2)) for n, (x, y) in enumerate(corners.tolist())]
    found = placed(labels, 400, 400)
    assert hidden(labels, found) == 0
    assert all(0 <= x <= 340 and 0 <= y <= 390 for x, y in found)
    assert hidden(labels, [(x, y - 10) for x, y in corners.tolist()]) > 500, "at their boxes they would"


def test_a_full_picture_still_takes_all() -> None:
    assert len(placed([Label((0, 0, 9, 9), 50, 10)] * 30, 60, 60)) == 30


def test_boxes_are_drawn_in_the_colours_of_their_classes_however_small_the_picture() -> None:
    boxes = np.array([[2.0, 4.0, 10.0, 12.0], [0.0, 0.0, 16.0, 16.0]])
    drawn = np.asarray(boxed(Image.new("L", (16, 16)), boxes, [1, 6], ["a 0.9", "b 0.5"]))
    assert drawn.shape == (400, 400, 3)
    for number in (1, 6):
        colour = [int(COLOURS[number][at : at + 2], 16) for at in (1, 3, 5)]
        assert (drawn == colour).all(2).sum() > 500
