"""Detection transfer: a detector on the pruned, trained backbone, read once on test. Writes artifacts/detect/."""

import epsd.project.own_code  # noqa: F401, I001 (first, before torch: whose code runs, how threads wait)

import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from epsd.architectures import ARCHITECTURES
from epsd.compute import distributed
from epsd.compute.devices import Machine, seed_everything
from epsd.compute.seeds import mix
from epsd.compute.speed import keep_freed_memory
from epsd.data.prepared import Prepared
from epsd.detection import deploy, drawing
from epsd.detection.average_precision import Detections
from epsd.detection.backbone import follow, sparsity
from epsd.detection.fit import fit_detector
from epsd.detection.pictures import picture_of, typical_size
from epsd.detection.score import Report, countable, detect, score_detections
from epsd.detectors import DETECTORS, Detector, Picture, Plan
from epsd.figures import style as figures
from epsd.files.onnx_file import FOLDER, FP32
from epsd.masks import Mask
from epsd.pipeline.backbone import backbone, network
from epsd.pipeline.describe import opened, reopened
from epsd.pipeline.stage import run_stage
from epsd.pipeline.train import trained as train_classifier
from epsd.pipeline.weights import content_of
from epsd.project import artifacts, code
from epsd.project.params import Params
from epsd.project.runtime import counted, note, quiet, state_folder
from epsd.registry import choose
from epsd.tracking import Tracker
from epsd.tracking.models import DETECTOR
from epsd.tracking.registered import WEIGHTS
from epsd.training import checkpoints
from epsd.voc.scenes import VocIndex


class Task(NamedTuple):
    """What the detector and its twin share: parameters, the machine, scenes, the card of the trained classifier, where
    an interrupted training left off, and `detect.detector` with a number for every `auto`.
    """

    params: Params
    machine: Machine
    voc: VocIndex
    card: dict[str, Any]
    folder: Path
    mark: str
    picture: Picture
    detector: dict[str, Any]

    def saved(self, name: str) -> dict[str, Any]:
        """Settings of a training that goes on from the checkpoint `name`."""
        return {"checkpoint": self.folder / f"{name}.safetensors", "mark": self.mark}


class Trained(NamedTuple):
    """A trained detector, the mask under its names (None: dense), one row of figures per epoch."""

    detector: nn.Module
    mask: Mask | None
    history: list[dict[str, float]]


def main(params: Params, machine: Machine) -> str:
    """Train and score the detector on the pruned backbone, and its twin where one is asked for; save, log."""
    voc = VocIndex.load(artifacts.VOC_INDEX)
    if not voc.class_names:
        return nothing()
    mark = fingerprint(params)
    folder, (card, model, mask) = state_folder("checkpoints", mark), backbone(params)
    picture = picture_of(voc.scenes["train"], card["mean"], card["std"])
    nodes = choose(ARCHITECTURES, card["architecture"], "architecture").feature_nodes(model)
    plan = choose(DETECTORS, params.detect.detector, "detect.detector").plan(model, nodes, picture)
    task = Task(params, machine, voc, card, folder, mark, picture, params.detect.detector | plan.settings)
    epochs = params.detect.passes(len(voc.scenes["train"]))
    keep_freed_memory()
    if not distributed.is_main():
        followed(task, model, mask)
        return ""
    if "weight_bits" in card:
        note(f"detect: trains in full precision; its backbone begins with weights of {card['weight_bits']} bits.")
    chosen = plan.settings | ({"epochs": epochs} if params.detect.epochs == "auto" else {})
    tell(plan, f"{counted(epochs, 'epoch')}, " if "epochs" in chosen else "")
    in_run = reopened if params.detect.backbone is None else opened
    used = {f"detect.used.{name}": value for name, value in chosen.items()}
    with in_run("detect", params, {"voc.digest": task.voc.digest, "voc.dataset": params.scenes_title}, used) as tracker:
        trained = fitted(task, model, mask, on_epoch=partial(tracker.epoch, prefix="detect/train_"))
        pictures = {split: len(scenes) for split, scenes in voc.scenes.items()}
        source = str(params.voc.get("root", ""))
        tracker.dataset(params.scenes_title, voc.digest, source, pictures, context="detection")
        report = judged(task, trained) | beside(task)
        artifacts.write_json(artifacts.DETECT_METRICS, report)
        tracker.describe("Detection", told(task, report))
        version = log(tracker, report)
    shutil.rmtree(folder, ignore_errors=True)
    twin = f", {params.detect.beside} twin {report['beside_map50']:.4f}" if "beside_map50" in report else ""
    kept = f"; model 'epsd-detector' version {version} (candidate)" if version else ""
    return f"test mAP@0.5 {report['map50']:.4f}{twin}, COCO mAP {report['map']:.4f}{kept}"


def nothing() -> str:
    """Results that hold nothing, where nothing is to be detected: DVC shows them. Nothing goes into the run."""
    if distributed.is_main():
        shutil.rmtree(artifacts.DETECT, ignore_errors=True)
        artifacts.write_json(artifacts.DETECT_METRICS, {})
        artifacts.write_csv(artifacts.DETECT_HISTORY, ["epoch", "loss"], [])
    return "nothing to do, as voc.name is none"


COVERED = 0.5
"""Share of the training boxes that anchors cover, below which something is wrong with the settings."""


def tell(plan: Plan, epochs: str) -> None:
    """What was chosen, and what cannot fit."""
    if (plan.settings or epochs) and not quiet():
        note(f"detect: auto: {epochs}{plan.told()}.")
    if plan.covered() < COVERED:
        note(
            f"detect: the anchors hardly fit: {plan.told()}. Set size, finest_stride, extra_levels and anchor_scale "
            "(smallest, biggest) of detect.detector to auto."
        )


def fingerprint(params: Params) -> str:
    """Of everything the trainings of this stage depend on, in however many processes."""
    values = params.marked("seed", "device", "threads", "launch", "architecture", "detect")
    read, uses = [artifacts.VOC_INDEX], ["detect"]
    if params.detect.backbone is None:
        read += [artifacts.MODEL, artifacts.MODEL_CARD, artifacts.MASK]
    else:
        values["backbone"] = content_of(params.detect.backbone, "detect.backbone")
    if params.detect.beside == "dense":
        values |= params.marked("data", "objective", "train")
        read, uses = [*read, artifacts.INITIAL, artifacts.DATA_INDEX], [*uses, "train"]
    values |= {"torch": torch.__version__, "code": code.digests(uses, params.model_dump())}
    return checkpoints.fingerprint(values, [*read, Path(__file__)])


def followed(task: Task, model: nn.Module, mask: Mask) -> None:
    """Take part in all that the main process does with the others."""
    trained = fitted(task, model, mask)
    found(task, trained.detector, "test")
    if countable(task.voc.scenes["validation"]):
        found(task, trained.detector, "validation")
    beside(task)


def fitted(
    task: Task,
    model: nn.Module,
    mask: Mask | None,
    name: str = "detector",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Trained:
    """A detector around `model`, trained on the training scenes; the mask of `model` moves along and holds."""
    settings = task.params.detect
    nodes = choose(ARCHITECTURES, task.card["architecture"], "architecture").feature_nodes(model)
    seed_everything(mix(task.params.seed, "detect"))
    build: Detector = choose(DETECTORS, task.detector, "detect.detector")
    detector = build(model, nodes, task.picture, len(task.voc.class_names), settings.frozen_stages)
    moved = None if mask is None else follow(mask, model, detector)
    history = fit_detector(
        detector,
        task.voc.scenes["train"],
        settings,
        channels=task.card["image_shape"][0],
        mask=moved,
        seed=task.params.seed,
        device=task.machine.device,
        workers=task.machine.workers,
        on_epoch=on_epoch,
        **task.saved(name),
    )
    return Trained(detector, moved, history)


def found(task: Task, detector: nn.Module, split: str) -> list[Detections]:
    """What the detector finds in the scenes of a split."""
    return detect(
        detector,
        task.voc.scenes[split],
        channels=task.card["image_shape"][0],
        batch_size=task.params.detect.batch_size,
        device=task.machine.device,
        workers=task.machine.workers,
    )


def scored(task: Task, detections: Sequence[Detections], split: str) -> Report:
    """Average precision on a split."""
    return score_detections(detections, task.voc.scenes[split], task.voc.class_names)


def judged(task: Task, trained: Trained) -> dict[str, float]:
    """Read the test scenes; save the detector, its tables and its pictures. Returns the headline figures."""
    detections = found(task, trained.detector, "test")
    summary, rows = scored(task, detections, "test")
    card = task.card | {"detector": task.detector, "detected": task.voc.class_names}
    card |= {"typical_size": typical_size(task.voc.scenes["train"]), "dataset": task.params.scenes_title}
    artifacts.save_model(trained.detector, artifacts.DETECTOR, card)
    artifacts.write_records(artifacts.DETECT_PER_CLASS, rows)
    artifacts.write_records(artifacts.DETECT_HISTORY, trained.history)
    draw(task, detections)
    summary |= deployed(task, trained.detector, card)
    if countable(task.voc.scenes["validation"]):
        validation = scored(task, found(task, trained.detector, "validation"), "validation")
        summary |= {"validation_map50": validation.summary["map50"]}
    if trained.mask is not None:
        summary |= {"sparsity": sparsity(trained.detector, trained.mask)}
    return summary | {"seconds": sum(row["seconds"] for row in trained.history)}


def deployed(task: Task, detector: nn.Module, card: dict[str, Any]) -> dict[str, float]:
    """Write the model that is served where an ONNX file is asked for and torch can export it; what it is worth."""
    shutil.rmtree(artifacts.DETECT_MODEL, ignore_errors=True)
    if not task.params.detect.onnx:
        return {}
    scenes, repeats = task.voc.scenes["test"], task.params.detect.latency_repeats
    with tempfile.TemporaryDirectory() as elsewhere:
        onnx = Path(elsewhere) / FOLDER
        onnx.mkdir()
        figures = deploy.deployed(detector, scenes, card, artifacts.DETECTOR, onnx / FP32, task.machine, repeats)
        if figures:
            deploy.served(detector, scenes[0], card, onnx, artifacts.DETECT_MODEL, artifacts.DETECTOR_CARD)
    return figures


def draw(task: Task, detections: Sequence[Detections]) -> None:
    """Test pictures with their detections: one file each, and all of them on one page."""
    shutil.rmtree(artifacts.DETECT_PICTURES, ignore_errors=True)
    scenes, names, channels = task.voc.scenes["test"], task.voc.class_names, task.card["image_shape"][0]
    chosen = drawing.choose_pictures(detections, scenes, names, task.params.detect.pictures)
    for position in chosen:
        alone = drawing.gallery([scenes[position]], [detections[position]], names, channels)
        figures.save(alone, artifacts.DETECT_PICTURES / f"{scenes[position].id}.png")
    if chosen:
        some = [scenes[position] for position in chosen], [detections[position] for position in chosen]
        figures.save(drawing.gallery(*some, names, channels), artifacts.DETECT_GALLERY)


def beside(task: Task) -> dict[str, float]:
    """Test figures of the same detector on another backbone: dense and trained alike, or dense and untrained."""
    params = task.params
    if params.detect.beside == "none":
        return {}
    seed_everything(mix(params.seed, "beside"))
    model = network(task.card)
    if params.detect.beside == "dense":
        artifacts.load_into(model, artifacts.INITIAL).to(task.machine.device)
        train_dense(task, model)
    twin = fitted(task, model, None, "twin")
    detections = found(task, twin.detector, "test")
    if not distributed.is_main():
        return {}
    return {f"beside_{name}": value for name, value in scored(task, detections, "test").summary.items()}


def train_dense(task: Task, model: nn.Module) -> None:
    """Train the whole network as `train` trains the pruned one: same recipe, objective, batches and seed; in place."""
    data, mask = Prepared.load(artifacts.DATA, task.machine), Mask.dense(model)
    train_classifier(task.params, data, model, mask, on_epoch=lambda record: None, **task.saved("dense"))


def log(tracker: Tracker, report: dict[str, float]) -> str | None:
    """Headline figures; the page of pictures at the artifact root, tables and weights in folders; the model.

    Returns the version under which it is registered, None where there is no ONNX file, and while the store is away.
    """
    tracker.metrics({f"detect/{name}": value for name, value in report.items()})
    if artifacts.DETECT_GALLERY.exists():
        tracker.artifact(artifacts.DETECT_GALLERY)
    if artifacts.SCENES_FIGURE.exists():
        tracker.artifact(artifacts.SCENES_FIGURE, folder="prepare")
    for table in (artifacts.DETECT_METRICS, artifacts.DETECT_PER_CLASS, artifacts.DETECT_HISTORY):
        tracker.artifact(table, folder="detect")
    for file in (artifacts.DETECTOR, artifacts.DETECTOR_CARD):
        tracker.artifact(file, folder=WEIGHTS[DETECTOR])
    return tracker.model(artifacts.DETECT_MODEL) if (artifacts.DETECT_MODEL / "MLmodel").is_file() else None


def told(task: Task, report: dict[str, float]) -> str:
    """What came out, in plain words, for the run's page."""
    params, epochs = task.params, task.params.detect.passes(len(task.voc.scenes["train"]))
    twin = f" (its {params.detect.beside} twin: {report['beside_map50']:.4f})" if "beside_map50" in report else ""
    return (
        f"As backbone of `{params.detect.detector['name']}`, trained for {counted(epochs, 'epoch')} on "
        f"`{params.scenes_title}`: mAP@0.5 {report['map50']:.4f}{twin}, COCO mAP {report['map']:.4f} on "
        f"{len(task.voc.scenes['test'])} test scenes."
    )


if __name__ == "__main__":
    run_stage("detect", main)
