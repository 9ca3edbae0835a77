"""How good a network is, and what it costs: accuracy and calibration on one split, latency."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from epsd.data.loaders import as_batches
from epsd.evaluation import metrics
from epsd.types import Batches, EpsdError

LATENCY_NOTE = (
    "Both networks run the same dense kernels: zeros scattered over a weight tensor are multiplied like any other "
    "number, so that equal times are what to expect. FLOPs (sparse) and the size of the compact file say what "
    "a runtime with sparse kernels could save."
)
WARM_UP = 3


class EvaluationError(EpsdError):
    """A split without images, or a network whose outputs are not numbers."""


class Evaluation(NamedTuple):
    """`metrics`: top1, top5, nll (nats), ece, each by name. `per_class`: (K,) accuracy, NaN where a class has no
    image. `confusion`: (K, K) int64, rows true, columns predicted. `reliability`: calibration by confidence.
    """

    metrics: dict[str, float]
    per_class: Tensor
    confusion: Tensor
    reliability: metrics.ReliabilityTable


def predict(
    model: nn.Module, batches: Batches | DataLoader[Any], device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32 and labels (N,), both on the CPU, of one pass in evaluation mode.

    `batches`: prepared ones, or a `DataLoader` of (image, label) pairs.

    The network is moved to `device` (None: stays where it is); its mode is what it was, afterwards.
    """
    if device is not None:
        model.to(device)
    place = next(model.parameters()).device
    logits, labels = [], []
    with metrics.evaluating(model), torch.no_grad():
        for batch in as_batches(batches).epoch(0):
            logits.append(model(batch.images.to(place)).float().cpu())
            labels.append(batch.labels.cpu())
    if not sum(map(len, labels)):
        raise EvaluationError("evaluate: the split has no images.")
    return torch.cat(logits), torch.cat(labels)


def measure(logits: Tensor, labels: Tensor, ece_bins: int = 15) -> Evaluation:
    """Every figure from logits (N, K) and labels (N,). top5 means the K best where K < 5."""
    broken = int((~torch.isfinite(logits)).any(dim=1).sum())
    if broken:
        raise EvaluationError(
            f"evaluate: the network's outputs are NaN or infinite for {broken} of {len(logits)} images."
        )
    table = metrics.reliability(logits, labels, ece_bins)
    confusion = metrics.confusion(logits, labels)
    figures = {
        "top1": metrics.topk(logits, labels, 1),
        "top5": metrics.topk(logits, labels, 5),
        "nll": metrics.nll(logits, labels),
        "ece": table.ece(),
    }
    return Evaluation(figures, metrics.per_class_accuracy(confusion), confusion, table)


def evaluate(
    model: nn.Module,
    batches: Batches | DataLoader[Any],
    *,
    ece_bins: int = 15,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Accuracy and calibration of `model` over `batches` (epoch 0), in evaluation mode and full precision.

    Raises EvaluationError: no images, or outputs that are NaN or infinite.
    """
    logits, labels = predict(model, batches, device)
    return measure(logits, labels, ece_bins)


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds, read after the device has finished what was asked of it."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    return now


def latency(
    models: Mapping[str, nn.Module], image_shape: tuple[int, int, int], *, batch_size: int = 1, repeats: int = 20
) -> dict[str, float]:
    """Median milliseconds of one forward pass of `batch_size` images (C, H, W), by name; {} where `repeats` is 0.

    The networks take turns, so that a busy moment of the machine hits all of them alike. See LATENCY_NOTE.
    """
    if not repeats:
        return {}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(WARM_UP + repeats):
            for name, model in models.items():
                seconds = _one_pass(model, batch_size, image_shape)
                if turn >= WARM_UP:
                    times[name].append(seconds)
    return {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}


def _one_pass(model: nn.Module, batch_size: int, image_shape: tuple[int, int, int]) -> float:
    device = next(model.parameters()).device
    images, now = torch.zeros(batch_size, *image_shape, device=device), _clock(device)
    with metrics.evaluating(model):
        start = now()
        model(images)
        return now() - start


def filled(model: nn.Module, prunable: Mapping[str, nn.Parameter]) -> nn.Module:
    """A copy of `model` whose zero weights hold small numbers: the dense network to time a pruned one against."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name in prunable:
            weight = dense.get_parameter(name)
            weight[weight == 0] = 0.01
    return dense


def cost(model: nn.Module, prunable: Mapping[str, nn.Parameter], image_shape: tuple[int, int, int]) -> dict[str, float]:
    """What `model` costs, recounted from its weights. `prunable`: `epsd.masks.prunable(model)`.

    sparsity and density (of prunable weights), compression (all parameters / nonzero ones), parameters of four kinds,
    gflops_dense and gflops_sparse of one image's forward pass (10^9; 2 per multiply-accumulate).
    """
    count, work = metrics.count_parameters(model, prunable), metrics.flops(model, image_shape)
    return {
        "sparsity": count.sparsity,
        "density": 1 - count.sparsity,
        "compression": count.compression,
        "parameters": count.total,
        "parameters_nonzero": count.nonzero,
        "prunable": count.prunable,
        "prunable_nonzero": count.kept,
        "gflops_dense": work.dense / 1e9,
        "gflops_sparse": work.sparse / 1e9,
    }


def per_class_rows(result: Evaluation, class_names: Sequence[str]) -> Iterator[tuple[str, int, float | str]]:
    """Class, test images, accuracy ("" for a class without images)."""
    for name, row, accuracy in zip(class_names, result.confusion, result.per_class.tolist(), strict=True):
        yield name, int(row.sum()), "" if math.isnan(accuracy) else accuracy


def confusion_rows(result: Evaluation, class_names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(true, predicted), one row for each image, grouped: the form that DVC's confusion template reads."""
    for true, row in zip(class_names, result.confusion.tolist(), strict=True):
        for predicted, images in zip(class_names, row, strict=True):
            yield from [(true, predicted)] * images


def reliability_rows(result: Evaluation) -> Iterator[tuple[float, ...]]:
    """lower, upper, images, confidence, accuracy of each bin."""
    yield from zip(*(column.tolist() for column in result.reliability), strict=True)
