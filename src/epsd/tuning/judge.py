"""One trial: the composition of the stages prune and train, in memory, judged on the validation split."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from epsd import evaluation, sparse
from epsd.data import Prepared
from epsd.masks import Mask, prunable
from epsd.params import Params
from epsd.passes import Meter
from epsd.pipeline.pruned import pruned
from epsd.pipeline.trained import card, trained
from epsd.training import Record

Figures = dict[str, float]

FIGURES = (
    "val/top1",
    "val/nll",
    "train/top1",
    "train/loss",
    "model/parameters_nonzero",
    "model/gflops_sparse",
    "model/bytes_sparse",
    "model/compression",
    "model/sparsity",
)
"""What a trial can be judged by or held to, under the names that the stages log. The test split is not among them."""


def run(params: Params, data: Prepared, watch: Callable[[Record, Callable[[], Figures]], None]) -> Figures:
    """Prune and train with `params`; the figures of the trained network after the last epoch.

    `watch` is called after each epoch with its record and a function that gives the figures as they stand; it ends the
    trial by raising.
    """
    mask, model, report = pruned(
        params.model_copy(update={"prune": params.prune.model_copy(update={"compare": False})}), data
    )

    def on_epoch(record: Record) -> None:
        watch(record, lambda: figures(params, data, model, mask, record))

    history = trained(params, data, model, mask, on_epoch=on_epoch, meter=Meter.of(report))
    return figures(params, data, model, mask, history[-1])


def figures(params: Params, data: Prepared, model: nn.Module, mask: Mask, record: Record) -> Figures:
    """All of FIGURES, for the network as it is after the epoch of `record`."""
    cost = evaluation.cost(model, prunable(model), data.image_shape)
    with tempfile.TemporaryDirectory() as folder:
        size = sparse.save(model.state_dict(), Path(folder) / "model", card(params, data, mask))
    known = {**record, **{f"model/{name}": float(value) for name, value in cost.items()}}
    known["model/bytes_sparse"] = float(size.file)
    return {name: known[name] for name in FIGURES}
