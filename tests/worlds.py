"""What `test_parallel` runs in one process and in two: `python worlds.py FOLDER` leaves its results in FOLDER."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epsd import parallel
from epsd.masks import Mask, prunable
from epsd.objectives import OBJECTIVES
from epsd.training import Recipe, fit
from toys import ToyBatches, convnet

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


def stop(record: dict[str, float]) -> None:
    if record["epoch"] == 2:
        raise Stopped


def broken(objective: str, folder: Path) -> Found:
    """Two of three epochs, then a stop: leaves its checkpoint."""
    try:
        train(objective, folder, checkpoint=folder / f"{objective}-{parallel.world()}", mark="m", on_epoch=stop)
    except Stopped:
        return {}
    raise AssertionError("it was to be stopped")


def resumed(objective: str, folder: Path) -> Found:
    """From the checkpoint that the other number of processes left, where there is one."""
    path = folder / f"{objective}-{3 - parallel.world()}"
    return train(objective, folder, checkpoint=path, mark="m") if path.exists() else {}


WORK = {"train": train, "broken": broken, "resumed": resumed}


def main(folder: Path, kinds: list[str]) -> None:
    for kind in kinds:
        for objective in OBJECTIVES:
            found = WORK[kind](objective, folder)
            torch.save(found, folder / f"{kind}-{objective}-{parallel.world()}-{parallel.rank()}.pt")


if __name__ == "__main__":
    parallel.start("cpu")
    main(Path(sys.argv[1]), sys.argv[2:])
    parallel.stop()
    sys.stdout.flush()
    os._exit(0)
