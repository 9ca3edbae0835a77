"""Detectors as ONNX files: boxes where torch has them, whatever the picture's size, and said where it cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from epsd.architectures import ARCHITECTURES, built
from epsd.compute.devices import Machine
from epsd.detection import deploy
from epsd.detection.average_precision import Detections
from epsd.detectors import DETECTORS, Picture
from epsd.files.onnx_file import FP32
from epsd.registry import choose
from epsd.voc.scenes import Scene

NET = {"name": "resnet", "depth": 8, "width": 0.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"finest_stride": 2, "extra_levels": 0, "channels": 16, "head_width": 32, "proposals": 40},
    "retinanet": {},
    "ssd": {},
}
CARD = {"image_shape": [1, 8, 8], "class_names": ["a", "b"]}


def detector(name: str) -> nn.Module:
    """With random weights, and so many boxes that every part of it is at work."""
    torch.manual_seed(0)
    net = built(NET, 10, (1, 8, 8))
    nodes = choose(ARCHITECTURES, NET, "architecture").feature_nodes(net)
    build = choose(DETECTORS, {"name": name, "score_threshold": 0.0, **SETTINGS[name]}, "detect.detector")
    return build(net, nodes, Picture(48, 48, [0.3], [0.35]), 3, 0).eval()


@pytest.fixture
def scenes(tmp_path: Path) -> list[Scene]:
    """Pictures of several sizes."""
    random, made = np.random.default_rng(0), []
    for number, (height, width) in enumerate([(48, 48), (40, 60), (64, 48)]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (height, width), dtype=np.uint8)).save(path)
        nothing: Any = np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
        made.append(Scene(str(number), path, width, height, *nothing))
    return made


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_finds_the_same_boxes_as_in_torch(name: str, scenes: list[Scene], tmp_path: Path) -> None:
    path = tmp_path / FP32
    figures = deploy.deployed(detector(name), scenes, CARD, scenes[0].image, path, Machine(), 2)
    assert figures["onnx_agreement"] == 1 and figures["onnx_bytes"] == path.stat().st_size
    for form in ("torch", "onnx", "dense_torch", "dense_onnx"):
        assert figures[f"latency_{form}_batch1_one_thread_ms"] > 0
    assert figures["latency_onnx_batch1_one_thread_times_dense_torch"] > 0
    content = path.read_bytes()
    assert b".py" not in content and b"site-packages" not in content
    assert [path.name for path in tmp_path.glob("*.onnx")] == [FP32], "the dense twin is not left there"
    assert {output.name for output in onnx.load(path).graph.output} == {"boxes", "labels", "scores"}
    found = deploy.OnnxDetector(path)([torch.rand(1, 33, 57), torch.rand(1, 48, 48)])
    assert len(found) == 2 and len(found[0]["boxes"]) == len(found[0]["scores"]) > 3


class Stubborn(nn.Module):
    """Works, but cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pictures: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError("not\nme")
        return [{name: torch.zeros(0) for name in ("boxes", "labels", "scores")} for _ in pictures]


def test_one_that_cannot_be_exported_is_one_line(
    scenes: list[Scene], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy.deployed(Stubborn(), scenes, CARD, scenes[0].image, tmp_path / FP32, Machine(), 2) == {}
    line = "detect: no ONNX file: torch cannot export this detector (RuntimeError: not me).\n"
    assert capsys.readouterr().err == line
    assert not list(tmp_path.glob("*.onnx"))


def found(boxes: list[list[float]], labels: list[int]) -> Detections:
    return Detections(np.array(boxes, dtype=float).reshape(-1, 4), np.ones(len(labels)), np.array(labels))


def test_agreement_is_by_box_and_class_in_any_order() -> None:
    one = found([[0, 0, 9, 9], [5, 5, 20, 20]], [1, 2])
    other = found([[5, 5.9, 20, 20], [0, 0, 9, 9]], [2, 1])
    nothing = found([], [])
    assert deploy.agreement([one], [other]) == 1
    assert deploy.agreement([one], [other], pixels=0.5) == 0
    assert deploy.agreement([one, one, nothing, nothing], [found([[0, 0, 9, 9]], [1]), one, nothing, one]) == 0.5
    assert deploy.agreement([one], [found([[0, 0, 9, 9], [5, 5, 20, 20]], [2, 1])]) == 0
