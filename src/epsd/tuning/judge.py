"""One trial: the composition of the stages prune and train, in memory, judged on the validation split.

A trial may be repeated with other seeds, each of another split into train and validation, other initial weights and
another order of batches: the mean tells better parameters from lucky ones. Every trial has the same seeds, so that two
of them are compared pair by pair. Repeat 0 is the seed of params.yaml and the split as prepared: what `dvc repro` does.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import nn

from epsd.compute.cost import Meter
from epsd.compute.seeds import mix
from epsd.data.prepared import Prepared
from epsd.evaluation import compact_file
from epsd.evaluation import evaluate as evaluation
from epsd.masks import Mask
from epsd.pipeline import budget
from epsd.pipeline.prune import pruned
from epsd.pipeline.train import card, trained
from epsd.project.params import Params
from epsd.training.record import Record
from epsd.training.result import kept
from epsd.tuning.resplit import resplit

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

MEASURED = {"latency/onnx_batch1_one_thread_ms": "latency_ms", "deploy/onnx_bytes": "bytes"}
"""Likewise, of the trial's ONNX file on this machine (`epsd.pipeline.budget`), where they are asked for: it takes
seconds to make one.
"""


def run(params: Params, data: Prepared, watch: Callable[[Record, Callable[[], Figures]], None]) -> Figures:
    """Prune and train with `params`; the figures of the trained network after the last epoch, and what `params.tune`
    asks for of MEASURED.

    `watch` is called after each epoch with its record and a function that gives the figures as they stand; it ends the
    trial by raising.
    """
    mask, model, report, *_ = pruned(params.pruning(compare=False), data)

    asked = {
        name: what for name, what in MEASURED.items() if name in {**params.tune.objectives, **params.tune.constraints}
    }
    costs = budget.measured(params, data, model, mask, asked.values()) if asked else {}
    taken = {name: costs[what] for name, what in asked.items()}  # no training changes it

    def on_epoch(record: Record) -> None:
        watch(record, lambda: figures(params, data, model, mask, record) | taken)

    history = trained(params, data, model, mask, on_epoch=on_epoch, meter=Meter.of(report))
    return figures(params, data, model, mask, kept(history, params.train.keep)) | taken


def repeat(params: Params, data: Prepared, number: int) -> tuple[Params, Prepared]:
    """What repeat `number` is run with: 0 with what is given, the others with a seed and a split of their own."""
    if number == 0:
        return params, data
    seed = mix(params.seed, "repeat", number) % 2**31
    return params.model_copy(update={"seed": seed}), resplit(data, seed)


def repeats(
    params: Params, data: Prepared, count: int, watch: Callable[[int, Record, Callable[[], Figures]], None]
) -> Iterator[Figures]:
    """The figures of repeat 0, 1, ... `count` - 1, each when it is done. `watch`: as of `run`, the number first."""
    for number in range(count):
        yield run(*repeat(params, data, number), partial(watch, number))


def means(done: list[Figures]) -> Figures:
    """Figure by figure."""
    return {name: statistics.fmean(figures[name] for figures in done) for name in done[0]}


def deviations(done: list[Figures]) -> Figures:
    """Standard deviation of each figure over the repeats; empty where there is one alone."""
    if len(done) < 2:
        return {}
    return {name: statistics.stdev(figures[name] for figures in done) for name in done[0]}


def figures(params: Params, data: Prepared, model: nn.Module, mask: Mask, record: Record) -> Figures:
    """All of FIGURES, for the network as it is after the epoch of `record`."""
    cost = evaluation.cost(model, data.image_shape, {name: model.get_parameter(name) for name in mask.keep})
    with tempfile.TemporaryDirectory() as folder:
        size = compact_file.save(model.state_dict(), Path(folder) / "model", card(params, data, mask, model))
    known = {**record, **{f"model/{name}": float(value) for name, value in cost.items()}}
    known["model/bytes_sparse"] = float(size.file)
    return {name: known[name] for name in FIGURES}
