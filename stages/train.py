"""Self-distilled training of the pruned network, from its initial weights. Writes artifacts/train/."""

import epsd.project.own_code  # noqa: F401, I001 (first, before torch: whose code runs, how threads wait)

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epsd.architectures import built
from epsd.compute import distributed
from epsd.compute.cost import Meter
from epsd.compute.devices import Machine
from epsd.data.prepared import Prepared
from epsd.files.digests import digest_of
from epsd.masks import Mask
from epsd.pipeline.describe import begun, run_name, story, tags
from epsd.pipeline.stage import run_stage
from epsd.pipeline.train import card, trained
from epsd.project import artifacts, code
from epsd.project.params import Params, flatten
from epsd.project.runtime import counted, state_folder
from epsd.tracking import Tracker, track
from epsd.training import checkpoints, result
from epsd.training.record import Record


def main(params: Params, machine: Machine) -> str:
    """Load mask and initial weights, train (or go on from the last finished epoch), save, log."""
    data = Prepared.load(artifacts.DATA, machine)
    network = built(params.architecture, data.num_classes, data.image_shape, artifacts.load_shapes())
    model = artifacts.load_into(network, artifacts.INITIAL)
    mask = artifacts.load_mask(model)
    model.to(machine.device)
    mark = fingerprint(params)
    folder = state_folder("checkpoints", mark)
    settings: dict[str, Any] = {"checkpoint": folder / "last.safetensors", "mark": mark}
    report = artifacts.read_report()
    settings["meter"] = Meter.of(report)
    if not distributed.is_main():
        trained(params, data, model, mask, on_epoch=lambda record: None, **settings)
        return ""
    with opened(params, data, folder) as tracker:
        history = trained(params, data, model, mask, on_epoch=tracker.epoch, **settings)
        save(params, data, model, mask, history, tracker)
        tracker.metrics({f"mask/{name}": value for name, value in report.items()})
        if params.train.keep == "best":
            best = result.kept(history, "best")
            named = {"epoch": "epoch", "val/top1": "top1", "val/nll": "nll"}
            tracker.metrics({f"train/chosen_{name}": best[key] for key, name in named.items()})
    shutil.rmtree(folder, ignore_errors=True)
    last = result.kept(history, params.train.keep)
    judged = f", validation top-1 {last['val/top1']:.4f}" if "val/top1" in last else ""
    judged += f" after epoch {last['epoch']:.0f}" if params.train.keep == "best" else ""
    return f"{counted(len(history), 'epoch')}, train loss {last['train/loss']:.4f}{judged}; run '{run_name(params)}'"


def fingerprint(params: Params) -> str:
    """Of everything this training depends on: parameters, data, mask, initial weights, code and torch."""
    values = params.marked("seed", "device", "threads", "launch", "data", "architecture", "objective", "train")
    values |= {"torch": torch.__version__, "code": code.digests(["train"], params.model_dump())}
    files = [artifacts.DATA_INDEX, artifacts.MASK, artifacts.CHANNELS, artifacts.INITIAL, Path(__file__)]
    return checkpoints.fingerprint(values, files)


def opened(params: Params, data: Prepared, folder: Path) -> Any:
    """The run of this model: a new one, or the one that an interrupted training of the same fingerprint began."""
    return track(
        "train",
        experiment=params.tracking.experiment,
        name=run_name(params),
        run_id=begun(folder),
        params=dict(flatten(params.model_dump())),
        tags=tags(params, data),
        description=story(params, data),
    )


def save(params: Params, data: Prepared, model: nn.Module, mask: Mask, history: list[Record], tracker: Tracker) -> None:
    """Weights, card, curves, and what later stages need to add to the run, or to make it anew."""
    artifacts.save_model(model, artifacts.MODEL, card(params, data, mask, model))
    artifacts.write_records(artifacts.HISTORY, history)
    about = {"tags": tags(params, data), "description": story(params, data), "history": digest_of(artifacts.HISTORY)}
    artifacts.write_json(artifacts.RUN, {"run_id": tracker.run_id, "name": run_name(params), **about})
    tracker.dataset(params.data_title, data.digest, str(data.index.get("source", "")), data.sizes)
    tracker.artifact(artifacts.MODEL, folder="model")
    tracker.artifact(artifacts.MODEL_CARD, folder="model")
    tracker.artifact(artifacts.MASK, folder="model")
    tracker.artifact(artifacts.MASK_FIGURE, folder="prune")
    for figure in filter(Path.exists, (artifacts.IMAGES_FIGURE, artifacts.SCENES_FIGURE)):
        tracker.artifact(figure, folder="prepare")
    tracker.artifact("params.yaml")


if __name__ == "__main__":
    run_stage("train", main)
