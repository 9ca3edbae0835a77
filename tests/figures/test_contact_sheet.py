"""Pages of what prepare read: every class has its row and its bar, whatever its name and however many there are."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from epsd.figures import contact_sheet, fonts, style

NAMES = ["cat", "日本", "$a$ dog $b$"]


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(fonts, "other", lambda lacked: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (channels, height, width), dtype=np.uint8)


def test_some_of_every_class_are_chosen_and_spread() -> None:
    labels = np.array([0] * 30 + [2] * 3)
    assert contact_sheet.per_class(labels, 3, each=4) == [[0, 9, 19, 29], [], [30, 31, 32]]
    assert len(contact_sheet.per_class(np.arange(100), 100)) == contact_sheet.CLASSES


def test_images_by_class(tmp_path: Path) -> None:
    rows = [[noise(20, 30)] * 8, [noise(50, 10, 1)], []]
    counts = {"train": [8, 1, 0], "validation": [0, 0, 0], "test": [2, 3, 4]}
    figure = contact_sheet.images(rows, NAMES, counts, ["mine: images of 30x20 px", "2 of test also in train"])
    style.save(figure, tmp_path / "page.png")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["cat", "#1", r"\$a\$ dog \$b\$"]
    assert [text.get_text() for text in right.get_yticklabels()] == ["cat", "#1", r"\$a\$ dog \$b\$"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["train: 9", "test: 9"]
    assert [text.get_text().strip() for text in right.texts] == ["10", "4", "4"]
    above = figure._suptitle.get_text()  # type: ignore[attr-defined]
    assert "2 of test also in train" in above and "#: number of the class" in above


def test_more_classes_than_have_a_bar(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(90)]
    rows = [[noise(8, 8, 1)]] * contact_sheet.CLASSES
    figure = contact_sheet.images(rows, names, {"train": list(range(1, 91)), "test": [3] * 90}, ["many"])
    style.save(figure, tmp_path / "page.png")
    left, right = figure.axes
    assert len(left.get_yticks()) == contact_sheet.CLASSES
    assert right.lines[0].get_ydata().tolist() == list(range(90, 0, -1)), "a line, the largest class first"
    assert "the first 40 of 90 classes" in figure._suptitle.get_text()  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [0, 1, 12])
def test_scenes_with_boxes(tmp_path: Path, count: int) -> None:
    boxes = np.array([[1.0, 1.0, 20.0, 15.0], [5.0, 5.0, 30.0, 28.0]])
    some = [contact_sheet.Boxed(noise(30 + n, 40), boxes, np.array([1, 2])) for n in range(count)]
    sides = np.full(count, 7.0) if count < 12 else np.geomspace(3, 700, 40)
    sizes = np.array([[40.0, 30.0]] * 5 + [[1000.0, 700.0]])
    figure = contact_sheet.scenes(some, NAMES, {"train": [0, count, count]}, sides, sizes, ["mine", "boxes dropped: 1"])
    style.save(figure, tmp_path / "page.png")
    titles = [axes.get_title() for axes in figure.get_axes()]
    assert "boxes of train" in titles and "6 pictures, 2 sizes" in titles
    assert "boxes dropped: 1" in figure._suptitle.get_text()  # type: ignore[attr-defined]
