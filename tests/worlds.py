"""What `test_parallel` runs in one process and in two: `python worlds.py FOLDER` leaves its results in FOLDER."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epsd import parallel
from epsd.masks import Mask, prunable
from epsd.metagradients import Means, within
from epsd.objectives import OBJECTIVES
from epsd.pruning import prune, scored, signal
from epsd.scores import Epsd, Grasp, ProsPr, Random, Snip, SynFlow
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
    for kind, score in kinds.items():
        torch.manual_seed(3)
        found |= {f"{kind}/{name}": tensor for name, tensor in scored(model, data, score=score, objective=loss).items()}
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


WORK = {"train": train, "broken": broken, "resumed": resumed, "scores": scores, "masks": masks}


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
