"""`auto` in a detector: what it stands for on small and large pictures, and that the detector is built so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devkits import scene
from epsd.architectures.resnet import ResNet
from epsd.architectures.torchvision_zoo import TorchvisionZoo
from epsd.datasets import DEVKITS
from epsd.detection.pictures import box_shares, picture_of
from epsd.detectors import DETECTORS, Picture, Plan
from epsd.project.params import load
from epsd.registry import choose
from epsd.voc.annotations import read_index

SMALL: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"head_width": 16},
    "retinanet": {"channels": 32},
    "ssd": {"channels": 16},
}
every = pytest.mark.parametrize("name", list(DETECTORS))
SETTINGS = {
    "faster_rcnn": {"size", "finest_stride", "extra_levels", "anchor_scale"},
    "retinanet": {"size", "finest_stride", "extra_levels", "anchor_scale"},
    "ssd": {"size", "finest_stride", "extra_levels", "smallest", "biggest"},
}


def plan(name: str, picture: Picture, zoo: bool = False, **settings: object) -> tuple[Plan, Any]:
    """And the detector that is built by it, on strides 1, 2, 4 or (zoo) 2 to 32."""
    variant = TorchvisionZoo(model="mobilenet_v3_small") if zoo else ResNet(depth=8, width=0.25)
    model = variant(10, (len(picture.mean), 64, 64))
    nodes = variant.feature_nodes(model)
    detector = choose(DETECTORS, {"name": name, **SMALL[name], **settings})
    return detector.plan(model, nodes, picture), detector(model, nodes, picture, 3)


def photo(height: int, width: int, low: float, high: float) -> Picture:
    """Of square boxes whose tenth and nine tenths are these shares of the shorter side."""
    sides = np.concatenate([[low] * 20, [(low * high) ** 0.5] * 60, [high] * 20])
    return Picture(height, width, [0.5] * 3, [0.2] * 3, np.stack([sides, sides], 1))


def test_the_shipped_scenes_keep_what_was_set_by_hand(root: Path, tmp_path: Path) -> None:
    """The figures of `make repro` hang on it."""
    params = load(root / "params.yaml")
    kit = choose(DEVKITS, params.voc | {"train": 100, "validation": 0, "test": 2})
    scenes = read_index(kit(tmp_path, seed=0), **kit.reading).scenes["train"]  # type: ignore[operator]
    detector = params.detect.detector
    found, built = plan(
        "faster_rcnn", picture_of(scenes, [0.3], [0.3]), **{k: v for k, v in detector.items() if k != "name"}
    )
    assert found.settings == {"size": 64, "finest_stride": 2, "extra_levels": 0, "anchor_scale": 7.0}
    assert built.rpn.anchor_generator.sizes == ((14,), (28,))
    assert found.covered() > 0.95


@every
@pytest.mark.parametrize("zoo", [False, True])
def test_photographs_of_large_objects_and_of_small_ones(name: str, zoo: bool) -> None:
    large, _ = plan(name, photo(768, 1024, 0.2, 0.8), zoo)
    small, _ = plan(name, photo(3000, 4000, 0.02, 0.1), zoo)
    assert set(large.settings) == SETTINGS[name]
    factor = 4 / 3 if name == "ssd" else 1
    assert large.settings["size"] == round(224 * factor) and small.settings["size"] == round(600 * factor)
    for found, low, high in ((large, 45, 179), (small, 12, 60)):
        sides = np.sqrt(found.anchors.prod(1))
        assert found.covered() > 0.9
        assert 0.7 * low < sides.min() < 1.5 * low * factor and 0.7 * high < sides.max() < 3.2 * high * factor
        assert found.shorter / found.strides[0] <= 200 and found.shorter / found.strides[-1] >= 2


@every
def test_the_detector_is_built_as_planned(name: str) -> None:
    found, built = plan(name, photo(240, 320, 0.13, 0.9))
    own = {key: found.settings[key] for key in SETTINGS[name]}
    again, _ = plan(name, photo(240, 320, 0.3, 0.4), **own)
    assert again.settings == {} and again.strides == found.strides and np.array_equal(again.anchors, found.anchors)
    if name == "ssd":
        assert built.transform.min_size == (found.shorter,) and len(built.backbone.out_channels) == len(found.strides)
        return
    assert built.transform.min_size == (found.shorter,) and built.transform.max_size == found.longer
    generator = built.rpn.anchor_generator if name == "faster_rcnn" else built.anchor_generator
    sides = {round(float(side)) for side in np.sqrt(found.anchors.prod(1))}
    assert {side for level in generator.sizes for side in level} == sides
    assert built.backbone.strides == found.strides


@every
def test_what_is_set_by_hand_stays_and_what_cannot_fit_is_seen(name: str) -> None:
    picture = photo(480, 640, 0.2, 0.8)
    tiny = {"smallest": 0.02, "biggest": 0.08} if name == "ssd" else {"anchor_scale": 2.0}
    found, _ = plan(name, picture, size=480, finest_stride=2, extra_levels=0, **tiny)
    assert found.settings == {} and found.strides == [2, 4]
    assert found.covered() == 0.0
    words = found.told()
    assert "maps at strides 2, 4" in words and "100 training boxes" in words and "0% are covered" in words


@every
def test_without_boxes_it_is_what_it_was_before_there_was_auto(name: str) -> None:
    found, _ = plan(name, Picture(48, 64, [0.5], [0.2]))
    usual = {"size": None, "finest_stride": 4, "extra_levels": 1 if name == "faster_rcnn" else 2}
    assert found.settings.items() >= usual.items()
    assert found.settings.get("anchor_scale", 4.0) == 4.0 and found.settings.get("smallest", 0.2) == 0.2
    assert np.isnan(found.covered())


def test_shares_go_by_each_pictures_shorter_side_and_leave_difficult_ones_out() -> None:
    wide = scene((0, (0, 0, 50, 20)), (1, (0, 0, 9, 9), True), size=(200, 100))
    assert box_shares([wide, scene((0, (0, 0, 10, 10)), size=(20, 80)), scene()]).tolist() == [[0.5, 0.2], [0.5, 0.5]]
    assert picture_of([scene((0, (0, 0, 9, 9), True))], [0.5], [0.2]).boxes is None
