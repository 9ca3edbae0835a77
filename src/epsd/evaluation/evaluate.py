"""How good a network is, and what it costs: accuracy and calibration on one split; weights and FLOPs."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from epsd.compute import networks
from epsd.data.loaders import as_batches
from epsd.evaluation import metrics
from epsd.losses import class_logits, logits_of
from epsd.types import Batches, EpsdError

_FEW = 5


class EvaluationError(EpsdError):
    """A split without images, or a network whose outputs are not numbers."""


class Evaluation(NamedTuple):
    """`metrics`: top1, top5 (of more than five classes), balanced_accuracy, macro_f1, lowest_recall, nll (nats), ece,
    by name. `per_class`: recall, precision and F1. `confusion`: (K, K) int64, rows true, columns predicted.
    `reliability`: calibration by confidence.
    """

    metrics: dict[str, float]
    per_class: metrics.ByClass
    confusion: Tensor
    reliability: metrics.ReliabilityTable


def predict(
    model: nn.Module, batches: Batches | DataLoader[Any], device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32 and labels (N,), both on the CPU, of one pass in evaluation mode.

    `batches`: prepared ones, or a `DataLoader` of (image, label) pairs. A network of one output z per image gives the
    logits (0, z), see `losses.class_logits`.

    The network is moved to `device` (None: stays where it is); its mode is what it was, afterwards.
    """
    if device is not None:
        model.to(device)
    networks.check(model)
    place = next(model.parameters()).device
    logits, labels = [], []
    with networks.in_mode(model), torch.no_grad():
        for batch in as_batches(batches).epoch(0):
            given = logits_of(model(networks.as_weights(batch.images.to(place), model)), named=True).float()
            logits.append(class_logits(given, batch.labels.to(place)).cpu())
            labels.append(batch.labels.cpu())
    if not sum(map(len, labels)):
        raise EvaluationError("evaluate: the split has no images.")
    return torch.cat(logits), torch.cat(labels)


def measure(logits: Tensor, labels: Tensor, ece_bins: int = 15) -> Evaluation:
    """Every figure from logits (N, K) and labels (N,). top5 of more than five classes: else it says nothing."""
    if len(labels) and int(labels.max()) >= logits.shape[1]:
        raise EvaluationError(f"evaluate: a label is {int(labels.max())}: the network has no output for it.")
    broken = int((~torch.isfinite(logits)).any(dim=1).sum())
    if broken:
        raise EvaluationError(
            f"evaluate: the network's outputs are NaN or infinite for {broken} of {len(logits)} images."
        )
    table = metrics.reliability(logits, labels, ece_bins)
    confusion = metrics.confusion(logits, labels)
    by_class = metrics.by_class(confusion)
    figures = {
        "top1": metrics.topk(logits, labels, 1),
        **({"top5": metrics.topk(logits, labels, 5)} if logits.shape[1] > _FEW else {}),
        **by_class.averages(),
        "nll": metrics.nll(logits, labels),
        "ece": table.ece(),
    }
    return Evaluation(figures, by_class, confusion, table)


def evaluate(
    model: nn.Module,
    batches: Batches | DataLoader[Any],
    *,
    ece_bins: int = 15,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Accuracy and calibration of `model` over `batches` (epoch 0), in evaluation mode and full precision.

    Raises EvaluationError: no images; outputs that are NaN or infinite; a label for which there is no output.
    EpsdError: one output and labels beyond 0 and 1; layers without weights yet; outputs that are no logits.
    """
    logits, labels = predict(model, batches, device)
    return measure(logits, labels, ece_bins)


def cost(
    model: nn.Module,
    prunable: Mapping[str, nn.Parameter],
    image_shape: tuple[int, int, int],
    whole: nn.Module | None = None,
) -> dict[str, float]:
    """What `model` costs, recounted from its weights. `prunable`: `epsd.masks.prunable(model)`.

    sparsity and density (of prunable weights), compression (all parameters / nonzero ones), parameters of four kinds,
    gflops_dense and gflops_sparse of one image's forward pass (10^9; 2 per multiply-accumulate). `whole`: of a network
    that channels were cut from, as wide as it was: compression and `macs` (share of multiply-adds) are against it.
    """
    count, work = metrics.count_parameters(model, prunable), metrics.flops(model, image_shape)
    before = count.total if whole is None else sum(p.numel() for p in whole.parameters())
    cut = {} if whole is None else {"macs": work.dense / metrics.flops(whole, image_shape).dense}
    return cut | {
        "sparsity": count.sparsity,
        "density": 1 - count.sparsity,
        "compression": before / count.total * count.compression,
        "parameters": count.total,
        "parameters_nonzero": count.nonzero,
        "prunable": count.prunable,
        "prunable_nonzero": count.kept,
        "gflops_dense": work.dense / 1e9,
        "gflops_sparse": work.sparse / 1e9,
    }


class ClassRow(NamedTuple):
    """A class by name, with its test images; "" where a share is of nothing."""

    name: str
    images: int
    recall: float | str
    precision: float | str
    f1: float | str


def per_class_rows(result: Evaluation, class_names: Sequence[str]) -> Iterator[ClassRow]:
    """One row for each class."""
    shares = zip(*(column.tolist() for column in result.per_class), strict=True)
    for name, row, each in zip(class_names, result.confusion, shares, strict=True):
        yield ClassRow(name, int(row.sum()), *("" if math.isnan(share) else share for share in each))


def recalls(rows: Iterable[ClassRow], most: int = 100) -> dict[str, float]:
    """By class, of those that have images; {} of more than `most` classes, which belong in a table."""
    found = {row.name: float(row.recall) for row in rows if row.recall != ""}
    return found if len(found) <= most else {}


def confusion_rows(result: Evaluation, class_names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(true, predicted), one row for each image, grouped: the form that DVC's confusion template reads."""
    for true, row in zip(class_names, result.confusion.tolist(), strict=True):
        for predicted, images in zip(class_names, row, strict=True):
            yield from [(true, predicted)] * images


def reliability_rows(result: Evaluation) -> Iterator[tuple[float, ...]]:
    """lower, upper, images, confidence, accuracy of each bin."""
    yield from zip(*(column.tolist() for column in result.reliability), strict=True)
