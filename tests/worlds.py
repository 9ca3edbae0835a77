"""What `test_parallel` runs in one process and in two: `python worlds.py FOLDER` leaves its results in FOLDER."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epsd.architectures.resnet import ResNet
from epsd.compute import distributed, shortage
from epsd.datasets.digit_scenes import DigitScenes
from epsd.detection import score
from epsd.detection.backbone import follow
from epsd.detection.fit import fit_detector
from epsd.detectors import DETECTORS, Picture
from epsd.masks import Mask, prunable
from epsd.objectives import OBJECTIVES
from epsd.project.recipes import DetectorRecipe, Quantise, Recipe
from epsd.pruning.prune import prune, scored, signal
from epsd.pruning.scoring import Means, within
from epsd.scores import Epsd, Grasp, ProsPr, Random, Snip, SynFlow
from epsd.training.fit import fit
from epsd.types import Batch
from epsd.voc.annotations import read_index
from epsd.voc.scenes import Scene
from toys import ToyBatches, convnet, mlp

EPOCHS = 3
Found = dict[str, Tensor]


def network() -> nn.Module:
    """BatchNorm, dropout and a classifier, in double precision."""
    model = convnet(dtype=torch.float64)
    model.insert(6, nn.Dropout(0.3))
    return model


def half(model: nn.Module) -> Mask:
    return Mask.from_scores({name: p.detach().abs() for name, p in prunable(model).items()}, 0.7)


class Stopped(Exception):
    """After an epoch, as a killed training."""


def train(objective: str, folder: Path, **changed: Any) -> Found:
    """Final weights and buffers, and the figures of the last epoch."""
    model, data = network(), ToyBatches(dtype=torch.float64)
    recipe = Recipe(epochs=EPOCHS, lr=0.1, schedule="cosine", clip_norm=2.0, precision="fp32")
    options: dict[str, Any] = {"validation": ToyBatches(size=21, dtype=torch.float64), "seed": 4, **changed}
    history = fit(model, data, objective=OBJECTIVES[objective](), mask=half(model), recipe=recipe, **options)
    timed = ("time/epoch", "cost/seconds")
    figures = {key: torch.tensor(value) for key, value in history[-1].items() if key not in timed}
    return {**model.state_dict(), **figures}


def parts(objective: str, folder: Path) -> Found:
    """A batch in parts, whose number the process with least memory decides. No BatchNorm, which would see the parts."""
    model, data, each = mlp(inputs=16), ToyBatches(dtype=torch.float64), 100
    counts, split = set[int](), shortage.parts

    def counted(batch: Batch, count: int) -> list[Batch]:
        counts.add(count)
        return split(batch, count)

    free = [1400, 700][distributed.rank()] if distributed.world() > 1 else 700
    recipe = Recipe(epochs=2, lr=0.1, precision="fp32", accumulate="auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortage, "need", lambda *anything: shortage.Need(0, each))
        patch.setattr(shortage, "free", lambda device: free)
        patch.setattr(shortage, "parts", counted)
        history = fit(model, data, objective=OBJECTIVES[objective](), mask=half(model), recipe=recipe)
    return {**model.state_dict(), "loss": torch.tensor(history[-1]["train/loss"]), "parts": torch.tensor(list(counts))}


def parts_that_never_fit(objective: str, folder: Path) -> Found:
    """Two images are too many: the same line in every process, with a batch of all of them."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(shortage.OutOfMemory, match="out of memory") as caught:
        patch.setattr(shortage, "free", lambda device: 0)
        fit(mlp(inputs=16), ToyBatches(dtype=torch.float64), objective=OBJECTIVES[objective]())
    assert "Not even a batch of" in str(caught.value)
    return {}


def rounded(objective: str, folder: Path) -> Found:
    """Weights of four bits in the last of two epochs, in single precision."""
    model = convnet()
    recipe = Recipe(epochs=2, lr=0.05, precision="fp32", quantise=Quantise(bits=4, from_epoch=1))
    history = fit(model, ToyBatches(), objective=OBJECTIVES[objective](), mask=half(model), recipe=recipe)
    return {**model.state_dict(), "loss": torch.tensor(history[-1]["train/loss"])}


def tuned(objective: str, folder: Path) -> Found:
    """What is frozen thaws after the first epoch; the running mean of the best epoch is kept."""
    model, data = network(), ToyBatches(dtype=torch.float64)
    thawing: dict[str, Any] = {"freeze": ["0", "1"], "freeze_epochs": 1, "head_lr": 2.0, "decay_norms": False}
    recipe = Recipe(epochs=EPOCHS, lr=0.05, precision="fp32", ema=0.7, keep="best", **thawing)
    validation = ToyBatches(size=21, dtype=torch.float64)
    loss = OBJECTIVES[objective](class_weights=[0.5, 1.0, 2.0])
    history = fit(model, data, objective=loss, mask=half(model), recipe=recipe, validation=validation, seed=4)
    return {**model.state_dict(), "loss": torch.tensor(history[-1]["train/loss"])}


def stop(record: dict[str, float]) -> None:
    if record["epoch"] == 2:
        raise Stopped


def broken(objective: str, folder: Path) -> Found:
    """Two of three epochs, then a stop: leaves its checkpoint."""
    try:
        train(objective, folder, checkpoint=folder / f"{objective}-{distributed.world()}", mark="m", on_epoch=stop)
    except Stopped:
        return {}
    raise AssertionError("it was to be stopped")


def resumed(objective: str, folder: Path) -> Found:
    """From the checkpoint that the other number of processes left, where there is one."""
    path = folder / f"{objective}-{3 - distributed.world()}"
    return train(objective, folder, checkpoint=path, mark="m") if path.exists() else {}


def scores(objective: str, folder: Path) -> Found:
    """Scores of every kind that an objective enters, in every way of evaluating the steps, and how live it is."""
    model, data, loss = network(), ToyBatches(dtype=torch.float64), OBJECTIVES[objective]()
    kinds: dict[str, Any] = {
        "again": Epsd(steps=2, momentum=0.5, graphs_kept=0),
        "kept": Epsd(steps=2, momentum=0.5, graphs_kept=1),
        "parts": Epsd(steps=1, micro_batch=6),
        "local": Epsd(steps=2, reading="local"),
    }
    if objective == "cross_entropy":
        kinds |= {"prospr": ProsPr(steps=1), "snip": Snip(batches=2), "snip-eval": Snip(mode="eval")}
        kinds |= {"grasp": Grasp(samples_per_class=5), "grasp-tiny": Grasp(samples_per_class=1)}
        kinds |= {"grasp-batches": Grasp(samples_per_class=None, batches=2), "synflow": SynFlow(), "random": Random()}
    found = {}
    for kind, one in kinds.items():
        torch.manual_seed(3)
        found |= {f"{kind}/{name}": tensor for name, tensor in scored(model, data, score=one, objective=loss).items()}
    for name, value in signal(model, data, kinds["again"], loss).items():
        found[name] = torch.tensor(value)
    return found


def masks(objective: str, folder: Path) -> Found:
    """Masks in rounds, the graphs kept that a small memory allows; the model is left as it is."""
    model, data = network(), ToyBatches(dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with within(Means(memory=2.5e6)):
        mask = prune(model, data, score=Epsd(steps=2), objective=OBJECTIVES[objective](), sparsity=0.8, rounds=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return {name: keep.double() for name, keep in mask.keep.items()}


DETECTOR_SETTINGS: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"channels": 8, "head_width": 8, "proposals": 12, "roi_samples": 16, "anchor_samples": 16},
    "retinanet": {"channels": 32, "finest_stride": 4, "extra_levels": 0},
    "ssd": {"channels": 8, "extra_levels": 1},
}


def scenes(folder: Path) -> list[Scene]:
    """Seven pictures of two sizes."""
    found = []
    for canvas, count in ((48, 4), (80, 3)):
        kit = DigitScenes(train=count, validation=0, test=1, canvas=canvas, objects=3, smallest=20, largest=28)
        place = folder / f"voc-{canvas}-{distributed.world()}-{distributed.rank()}"
        found += read_index(kit(place, seed=0), **kit.reading).scenes["train"]
    return found


def detect(name: str, folder: Path, **changed: Any) -> Found:
    """A detector's weights and figures after two epochs of two steps, of which one cannot be split; what it finds."""
    torch.manual_seed(0)
    model = ResNet(depth=20, width=0.25)(10, (1, 8, 8))
    nodes = ["layer1", "layer2", "layer3"]
    detector = DETECTORS[name](**DETECTOR_SETTINGS[name])(model, nodes, Picture(48, 48, [0.2], [0.3]), 10)
    mask = follow(half(model), model, detector)
    settings: dict[str, Any] = {"clip_norm": 10.0, "warmup_steps": 1, "flip": True, "precision": "fp32"}
    recipe = DetectorRecipe(epochs=2, batch_size=4, lr=0.01, **settings)
    pictures = scenes(folder)
    options: dict[str, Any] = {"channels": 1, "mask": mask, "seed": 2, **changed}
    history = fit_detector(detector, pictures, recipe, **options)
    figures = {key: torch.tensor(value) for key, value in history[-1].items() if key != "seconds"}
    seen = score.detect(detector, pictures, channels=1, batch_size=2)
    assert len(seen) == len(pictures)
    boxes = {f"boxes{number}": torch.from_numpy(one.boxes[:3]) for number, one in enumerate(seen)}
    return {**detector.state_dict(), **figures, **boxes}


def detect_broken(name: str, folder: Path) -> Found:
    """One of two epochs."""

    def stop_at_once(row: dict[str, float]) -> None:
        raise Stopped

    with contextlib.suppress(Stopped):
        detect(name, folder, checkpoint=folder / f"{name}-{distributed.world()}", mark="m", on_epoch=stop_at_once)
    return {}


def detect_resumed(name: str, folder: Path) -> Found:
    """From the checkpoint that the other number of processes left, where there is one."""
    path = folder / f"{name}-{3 - distributed.world()}"
    return detect(name, folder, checkpoint=path, mark="m") if path.exists() else {}


WORK: dict[str, Callable[[str, Path], Found]] = {
    "train": train,
    "rounded": rounded,
    "tuned": tuned,
    "parts": parts,
    "parts_that_never_fit": parts_that_never_fit,
    "broken": broken,
    "resumed": resumed,
    "scores": scores,
    "masks": masks,
    "detect": detect,
    "detect_broken": detect_broken,
    "detect_resumed": detect_resumed,
}


def main(folder: Path, kinds: list[str]) -> None:
    for kind in kinds:
        for name in DETECTORS if kind.startswith("detect") else OBJECTIVES:
            found = WORK[kind](name, folder)
            torch.save(found, folder / f"{kind}-{name}-{distributed.world()}-{distributed.rank()}.pt")


if __name__ == "__main__":
    distributed.start("cpu")
    main(Path(sys.argv[1]), sys.argv[2:])
    distributed.stop()
    sys.stdout.flush()
    os._exit(0)
