"""How good a network is, and what it costs: accuracy and calibration on one split; weights and FLOPs."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from epsd.compute import networks
from epsd.data.loaders import Source, as_batches
from epsd.evaluation import metrics as figures_of
from epsd.losses import Metric, are_classes, class_logits, logits_of
from epsd.masks import prunable
from epsd.project.runtime import counted
from epsd.types import EpsdError

_FEW = 5


class EvaluationError(EpsdError):
    """A split without images, or a network whose outputs are not numbers."""


class Evaluation(NamedTuple):
    """`metrics`: top1, top5 (of more than five classes), balanced_accuracy, macro_f1, lowest_recall, nll (nats), ece,
    by name. `per_class`: recall, precision and F1. `confusion`: (K, K) int64, rows true, columns predicted.
    `reliability`: calibration by confidence.
    """

    metrics: dict[str, float]
    per_class: figures_of.ByClass
    confusion: Tensor
    reliability: figures_of.ReliabilityTable

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"Evaluation: {figures}; {counted(int(self.confusion.sum()), 'image')}, {len(self.confusion)} classes"


def predict(model: nn.Module, batches: Source, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32 and labels (N,), both on the CPU, of one pass in evaluation mode.

    `batches`: see `as_batches`. A network of one output z per image gives the logits (0, z), see
    `losses.class_logits`.

    The network is moved to `device` (None: stays where it is); its mode is what it was, afterwards.
    """

    def logits(given: Tensor, labels: Tensor) -> Tensor:
        if not are_classes(labels):
            raise EvaluationError("evaluate: the labels are no classes: pass metrics of your own, by name.")
        return class_logits(given, labels)

    return _answers(model, batches, device, logits)


def _answers(
    model: nn.Module, batches: Source, device: torch.device | str | None, read: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """What `read` makes of outputs and labels, and the labels, of all images."""
    if device is not None:
        model.to(device)
    networks.check(model)
    place = next(model.parameters()).device
    found, labels = [], []
    with networks.in_mode(model), torch.no_grad():
        for batch in as_batches(batches).epoch(0):
            given = logits_of(model(networks.as_weights(batch.images.to(place), model)), named=True).float()
            found.append(read(given, batch.labels.to(place)).cpu())
            labels.append(batch.labels.cpu())
    if not sum(map(len, labels)):
        raise EvaluationError("evaluate: the split has no images.")
    return torch.cat(found), torch.cat(labels)


def measure(logits: Tensor, labels: Tensor, ece_bins: int = 15) -> Evaluation:
    """Every figure from logits (N, K) and labels (N,). top5 of more than five classes: else it says nothing."""
    if len(labels) and int(labels.max()) >= logits.shape[1]:
        raise EvaluationError(f"evaluate: a label is {int(labels.max())}: the network has no output for it.")
    broken = int((~torch.isfinite(logits)).any(dim=1).sum())
    if broken:
        raise EvaluationError(
            f"evaluate: the network's outputs are NaN or infinite for {broken} of {len(logits)} images."
        )
    table = figures_of.reliability(logits, labels, ece_bins)
    confusion = figures_of.confusion(logits, labels)
    by_class = figures_of.by_class(confusion)
    figures = {
        "top1": figures_of.topk(logits, labels, 1),
        **({"top5": figures_of.topk(logits, labels, 5)} if logits.shape[1] > _FEW else {}),
        **by_class.averages(),
        "nll": figures_of.nll(logits, labels),
        "ece": table.ece(),
    }
    return Evaluation(figures, by_class, confusion, table)


@overload
def evaluate(
    model: nn.Module,
    batches: Source,
    *,
    metrics: None = None,
    ece_bins: int = 15,
    device: torch.device | str | None = None,
) -> Evaluation: ...


@overload
def evaluate(
    model: nn.Module, batches: Source, *, metrics: Mapping[str, Metric], device: torch.device | str | None = None
) -> dict[str, float]: ...


def evaluate(
    model: nn.Module,
    batches: Source,
    *,
    metrics: Mapping[str, Metric] | None = None,
    ece_bins: int = 15,
    device: torch.device | str | None = None,
) -> Evaluation | dict[str, float]:
    """Accuracy and calibration of `model` over `batches` (epoch 0), in evaluation mode and full precision.

    metrics : judged instead, whatever the labels are: functions of all outputs (N, ...) and labels (N, ...), by name.

    Raises EvaluationError: no images; outputs that are NaN or infinite; a label for which there is no output; labels
    that are no classes, without `metrics`. EpsdError: one output and labels beyond 0 and 1; layers without weights yet;
    outputs that are no logits.
    """
    if metrics is None:
        return measure(*predict(model, batches, device), ece_bins)
    answers = _answers(model, batches, device, lambda given, labels: given)
    return {name: float(metric(*answers)) for name, metric in metrics.items()}


def cost(
    model: nn.Module,
    image_shape: Sequence[int],
    weights: Mapping[str, nn.Parameter] | None = None,
    whole: nn.Module | None = None,
) -> dict[str, float]:
    """What `model` costs, recounted from its weights. `image_shape`: of one image, or other input, without the batch.
    `weights`: those of which the sparsity is a share, all that are prunable (None).

    sparsity and density (of prunable weights), compression (all parameters / nonzero ones), parameters of four kinds,
    gflops_dense and gflops_sparse of one image's forward pass (10^9; 2 per multiply-accumulate). `whole`: of a network
    that channels were cut from, as wide as it was: compression and `macs` (share of multiply-adds) are against it.
    """
    counted_ones = prunable(model) if weights is None else weights
    count, work = figures_of.count_parameters(model, counted_ones), figures_of.flops(model, image_shape)
    before = count.total if whole is None else sum(p.numel() for p in whole.parameters())
    cut = {} if whole is None else {"macs": work.dense / figures_of.flops(whole, image_shape).dense}
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
