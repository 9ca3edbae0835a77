"""What a training of a detector takes is what was foreseen: memory, on pictures of many shapes."""

import platform
import subprocess
import sys

import pytest

from devkits import scene
from epsd.detection import foreseen

RAGGED = """
import re
import tempfile
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from epsd.architectures.resnet import ResNet
from epsd.compute.speed import keep_freed_memory
from epsd.detection import fit, foreseen
from epsd.detection.score import detect
from epsd.detectors import Picture
from epsd.detectors.faster_rcnn import FasterRcnn
from epsd.project.recipes import DetectorRecipe
from epsd.voc.scenes import Scene

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder, random = Path(tempfile.mkdtemp()), np.random.default_rng(0)
def scene(number):
    wide, high = (int(side) for side in random.integers(120, 240, 2))
    Image.fromarray(random.integers(0, 256, (high, wide, 3), dtype=np.uint8)).save(path := folder / f"{number}.png")
    return Scene(path.stem, path, wide, high, np.array([[9.0, 9, 80, 90]]), np.array([number % 2]), np.array([False]))

torch.set_num_threads(1)
torch.manual_seed(0)
scenes = [scene(number) for number in range(16)]
model = ResNet(depth=8)(10, (3, 32, 32))
build = FasterRcnn(size=160, largest=320, channels=32, head_width=64, proposals=50, roi_samples=16, anchor_samples=16)
detector = build(model, ["layer1", "layer2", "layer3"], Picture(180, 180, [0.5] * 3, [0.2] * 3), 2)
found, check = [], foreseen.check
def kept(*args, **settings):
    found.append(foreseen.resident())
    found.append(check(*args, **settings))
    return found[-1]
fit.foreseen.check = kept
keep_freed_memory()
fit.fit_detector(detector, scenes, DetectorRecipe(epochs=2, batch_size=4, lr=0.01, precision="fp32"), channels=3)
detect(detector, scenes, channels=3, batch_size=4)
held, need = found
print(held, peak(), need.peak, foreseen.resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than GNU's")
def test_the_peak_of_training_and_scoring_is_what_was_foreseen() -> None:
    """Beyond what the process held before; a third of it about at least, and a tenth more at most."""
    done = subprocess.run([sys.executable, "-c", RAGGED], capture_output=True, text=True, check=True)
    held, peak, said, after = map(int, map(float, done.stdout.split()))
    assert 0.3 * (said - held) < peak - held < 1.1 * (said - held)
    assert after < peak


def test_the_narrowest_and_the_widest_picture_stand_for_all() -> None:
    sizes = [(100, 100), (300, 100), (50, 200), (400, 400)]
    assert foreseen.extremes([scene(size=size) for size in sizes]) == [2, 1]
    assert foreseen.extremes([scene()]) == [0]


def test_memory_that_is_scarce_is_not_kept() -> None:
    """`step` adds at its peak, `held` is there already; whoever has no room keeps nothing between steps."""
    assert foreseen.Need.of(100, 50, None) == (100, 200, 300)
    assert foreseen.Need.of(100, 50, 1000) == (100, 200, 300)
    assert foreseen.Need.of(100, 50, 160) == (100, 110, 210)
    assert foreseen.Need.of(100, 50, 100) == (100, 50, 150)
