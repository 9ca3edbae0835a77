"""What a trained network costs to keep and to compute; the files that are deployed, each judged and timed beside torch.

For the stage `evaluate` and for a study's cells.
"""

import copy
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from epsd.architectures import built
from epsd.compute import timing
from epsd.compute.devices import pick_memory_format
from epsd.compute.speed import lay_out_
from epsd.data.prepared import Prepared
from epsd.evaluation import compact_file, deploy
from epsd.evaluation import evaluate as evaluation
from epsd.evaluation.intake import Ask, Intake
from epsd.evaluation.servable import levels
from epsd.files.digests import digest_of
from epsd.files.onnx_file import FP32, INT8, OnnxFile, fill
from epsd.masks import prunable
from epsd.project.params import EvaluateParams
from epsd.project.runtime import brief, note
from epsd.types import Batches

Figures = dict[str, float]

LATENCY_NOTE = (
    "Medians of passes in turns, an unmeasured pass before each: on one thread of processor time, which other "
    "processes do not disturb; on all threads of the wall clock. torch runs the network alone, in fp32, channels_last, "
    "on prepared images; the ONNX files run as deployed, from pixels to probabilities. The dense twin is the network "
    "as wide as its architecture has it, with a number for every zero: dense kernels multiply zeros like any other."
)
_HEADLINE = timing.setting(1, 1)
_DENSE = "dense.onnx"


def measured(model: nn.Module, card: Mapping[str, Any], *, dense: Path, compact: Path) -> Figures:
    """Parameters, FLOPs, bytes on disk.

    `card` describes the network (`image_shape`: channels, height, width in pixels). `dense` is the file that holds all
    its weights; `compact`, with the nonzero ones, is written here.
    """
    written = compact_file.save(model.state_dict(), compact, card)
    shape = tuple(card["image_shape"])
    whole = built(card["architecture"], card["num_classes"], shape) if card.get("shapes") else None
    costs = evaluation.cost(model, shape, masked(model, card), whole)
    return {**costs, "bytes_dense": dense.stat().st_size, "bytes_sparse": written.file}


def masked(model: nn.Module, card: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """The weights of which the sparsity is a share: all that are prunable but those that the mask did not cover."""
    whole = card.get("not_covered", ())
    return {name: weight for name, weight in prunable(model).items() if name not in whole}


class Subject(NamedTuple):
    """What is deployed. `network` in evaluation mode, `card` as beside its `weights`, the file of which is hashed.

    `answers`: logits (N, K) and labels (N,) of the test split by this network in torch.
    """

    network: nn.Module
    card: Mapping[str, Any]
    weights: Path
    data: Prepared
    answers: tuple[Tensor, Tensor]

    @property
    def narrow(self) -> bool:
        """Whether channels were removed, so that the dense twin is a wider network."""
        return bool(self.card.get("shapes"))

    def dense(self) -> nn.Module:
        """The dense twin, on the processor: as wide as the architecture has it, and without zeros."""
        if self.narrow:
            return built(self.card["architecture"], self.card["num_classes"], tuple(self.card["image_shape"])).eval()
        return timing.filled(self.network).cpu()


class Deployed(NamedTuple):
    """`figures` by group, `deploy` and `latency`. `said`: what became of it, for the line that closes the stage."""

    figures: dict[str, Figures]
    said: str


def deployed(subject: Subject, settings: EvaluateParams, folder: Path) -> Deployed:
    """Write the files to `folder` as `evaluate.export` says; judge every form and time it beside the dense twin.

    Where torch cannot export the network, a line says why, and torch is timed alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as elsewhere:
        files = _written(subject, settings, folder, Path(elsewhere)) if settings.export.onnx else {}
        figures = {"deploy": _judged(subject, settings, files), "latency": _timed(subject, settings, files)}
    said = _told(figures["latency"], files)
    if "int8" in files:
        failed = _failed(figures, settings)
        kept = settings.export.int8 is True or not failed
        figures["deploy"]["int8_kept"] = float(kept)
        said += f"; int8{_rounded(subject.card)} {'kept' if kept else 'left out'}" + (
            f": {' and '.join(failed)}" if failed else ""
        )
        if not kept:
            files["int8"].unlink()
    return Deployed(figures, said)


# --- files ----------------------------------------------------------------------------------------------------------


def _written(subject: Subject, settings: EvaluateParams, folder: Path, elsewhere: Path) -> dict[str, Path]:
    """The files by form; {} where the network cannot be exported. The dense twin lies `elsewhere`."""
    files = {"onnx": folder / FP32, "dense_onnx": elsewhere / _DENSE}
    try:
        export(subject.network, subject.card, subject.weights, files["onnx"])
    except OSError:  # a full disk
        raise
    except Exception as error:  # torch.export raises nearly any type
        note(f"evaluate: no ONNX file: torch cannot export this network ({type(error).__name__}: {brief(error)}).")
        return {}
    if subject.narrow:
        export(subject.dense(), subject.card, subject.weights, files["dense_onnx"])
    else:
        fill(files["onnx"], files["dense_onnx"])
    if settings.export.int8 is not False:
        files["int8"] = folder / INT8
        bits = subject.card.get("weight_bits")
        deploy.quantise(files["onnx"], files["int8"], _calibration(subject, settings), bits)
    return files


def export(network: nn.Module, card: Mapping[str, Any], weights: Path, path: Path) -> None:
    """`network` with its preprocessing as an ONNX file that knows its card. Errors: see `deploy.export`."""
    deploy.export_whole(network, {**card}, path, digest_of(weights))


def _calibration(subject: Subject, settings: EvaluateParams) -> NDArray[np.float32]:
    """Training images, drawn at random but always the same, as they are sent to be classified."""
    batches = subject.data.batches("train", batch_size=min(64, settings.batch_size), shuffle=True)
    intake, found, wanted = Intake.of(subject.card), [], settings.export.calibration
    for batch in batches.epoch(0):
        found.append(levels(batch.images, intake))
        if sum(map(len, found)) >= wanted:
            break
    return np.concatenate(found)[:wanted].astype(np.float32)


# --- accuracy -------------------------------------------------------------------------------------------------------


def _judged(subject: Subject, settings: EvaluateParams, files: Mapping[str, Path]) -> Figures:
    """Top-1 on test and agreement with torch, bytes; what int8 loses on validation."""
    intake, data, figures = Intake.of(subject.card), subject.data, Figures()
    logits, labels = subject.answers
    for form in files.keys() - {"dense_onnx"}:
        chosen = _chosen(OnnxFile(files[form]), _batches(data, "test", settings), intake)
        figures[f"{form}_top1"] = float((chosen == labels).double().mean())
        figures[f"{form}_agreement"] = float((chosen == logits.argmax(1)).double().mean())
        figures[f"{form}_bytes"] = float(files[form].stat().st_size)
    if "int8" in files and data.sizes["validation"]:
        logits, labels = evaluation.predict(subject.network, _batches(data, "validation", settings))
        chosen = _chosen(OnnxFile(files["int8"]), _batches(data, "validation", settings), intake)
        right = [float((found == labels).double().mean()) for found in (logits.argmax(1), chosen)]
        figures["int8_validation_drop"] = right[0] - right[1]
    return dict(sorted(figures.items()))


def _batches(data: Prepared, split: Any, settings: EvaluateParams) -> Batches:
    return data.batches(split, batch_size=settings.batch_size)


def _chosen(ask: Ask, batches: Batches, intake: Intake) -> Tensor:
    """(N,) the most probable class of each image."""
    answers = [ask(levels(batch.images, intake).astype(np.float32)).argmax(1) for batch in batches.epoch(0)]
    return torch.from_numpy(np.concatenate(answers))


# --- time -----------------------------------------------------------------------------------------------------------


def _timed(subject: Subject, settings: EvaluateParams, files: Mapping[str, Path]) -> Figures:
    """Every form beside the dense twin in torch and in ONNX fp32: see `timing.sweep`."""
    shape, machine, session = tuple(subject.card["image_shape"]), subject.data.machine, functools.cache(OnnxFile)
    modules = functools.cache(lambda: _in_torch(subject))  # not where nothing is timed

    def passes(threads: int, batch: int) -> dict[str, timing.Pass]:
        images = np.zeros((batch, *shape), dtype=np.float32)
        found = {form: timing.in_torch(module, torch.from_numpy(images)) for form, module in modules().items()}
        return found | {form: functools.partial(session(path, threads), images) for form, path in files.items()}

    return timing.sweep(passes, settings.latency_batch_sizes, machine, settings.latency_repeats)


def _in_torch(subject: Subject) -> dict[str, nn.Module]:
    """The network and its dense twin as they run fastest on the processor; on a GPU, the network there, too."""
    device = subject.data.machine.device
    there = {} if device.type == "cpu" else {f"torch_{device.type}": subject.network}
    here = {"torch": copy.deepcopy(subject.network).cpu(), "dense_torch": subject.dense()}
    for module in here.values():
        lay_out_(module, pick_memory_format("auto", module, torch.device("cpu")))
    return here | there


# --- in words -------------------------------------------------------------------------------------------------------


def _failed(figures: Mapping[str, Figures], settings: EvaluateParams) -> list[str]:
    """Why int8 is not worth it: it is no faster than fp32 over all settings, or loses too much on validation."""
    failed, drop = [], figures["deploy"].get("int8_validation_drop")
    ratios = [
        figures["latency"][name.replace("int8_", "onnx_", 1)] / value
        for name, value in figures["latency"].items()
        if name.startswith("int8_") and name.endswith("_ms")
    ]
    faster = float(np.exp(np.mean(np.log(ratios)))) if ratios else None
    if faster is None or faster <= 1:
        failed.append("not timed" if faster is None else f"{faster:.2f} times as fast as fp32")
    if drop is None or drop > settings.export.max_drop:
        failed.append(
            "no validation images to judge it by" if drop is None else f"{drop:.4f} of top-1 lost on validation"
        )
    return failed


def _rounded(card: Mapping[str, Any]) -> str:
    return f" with weights of {card['weight_bits']} bits" if "weight_bits" in card else ""


def _told(latency: Figures, files: Mapping[str, Path]) -> str:
    if not files:
        return ""
    ratio = latency.get(f"onnx_{_HEADLINE}_times_dense_torch")
    return "ONNX" + (f" {ratio:.1f} times as fast as dense torch" if ratio else "")
