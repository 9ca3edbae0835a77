"""What the README promises of the library: its example runs as printed."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from toys import ToyBatches


def example(root: Path) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def test_the_library_example_runs_as_printed(root: Path) -> None:
    """A torchvision ResNet and a plain DataLoader of (image, label) pairs."""
    torch.manual_seed(0)
    data = ToyBatches(size=96, num_classes=10, shape=(3, 32, 32))
    names: dict[str, Any] = {"dataset": TensorDataset(data.images, data.labels)}
    exec(example(root), names)
    mask, model, history = names["mask"], names["model"], names["history"]
    assert mask.kept == mask.total - round(0.95 * mask.total)
    assert all(not p[~mask.keep[name]].any() for name, p in model.named_parameters() if name in mask.keep)
    assert len(history) == 2
    assert all(math.isfinite(record["train/loss"]) for record in history)


def test_the_three_lines_work_with_a_plain_loss_too(root: Path) -> None:
    data = ToyBatches(size=96, num_classes=10, shape=(3, 32, 32))
    code = (
        example(root).replace("CsKd()", "torch.nn.functional.cross_entropy").replace("resnet18", "mobilenet_v3_small")
    )
    names: dict[str, Any] = {"dataset": TensorDataset(data.images, data.labels)}
    exec(code, names)
    assert names["mask"].sparsity == pytest.approx(0.95, abs=1e-4)


def test_the_readme_names_the_commands_that_exist(root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    readme = (root / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
