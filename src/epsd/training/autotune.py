"""What `auto` stands for in a training: measured on the network at hand, where the training is long enough to pay.

A processor's flags do not tell which precision is faster there: with the same flag for bf16 a step takes half of its
time in fp32 on one and a quarter more on another (benchmarks/results/training-cpu.md).
"""

import copy
import itertools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from epsd.compute import distributed, networks, shortage
from epsd.compute.cost import Meter
from epsd.compute.devices import MEMORY_FORMATS, PRECISIONS, breaks_channels_last, pick_memory_format, pick_precision
from epsd.compute.speed import compiled
from epsd.project.recipes import Compile, Recipe
from epsd.training.updates import Updates
from epsd.types import Batch, EpsdError

if TYPE_CHECKING:
    from epsd.training.fit import _Loop

ROUNDS, MOST = 3, 30
"""Steps of each way that are timed, at least and at most: as many as `SHARE` and `LONGEST` allow. The shortest counts,
which of many is one that no other job on the machine has disturbed."""
LONGEST = 60.0
"""Seconds that measuring takes at most, but for steps of seconds."""
SHARE = 0.02
"""Of the training that measuring may take."""
LEAST = 600.0
"""Seconds of training from which on it is worth it; below, no result hangs on how busy the machine is."""
COMPILING = 3600.0
"""Seconds of training from which on compiled kernels are tried: compiling takes up to a minute."""
MARGIN = 0.05
"""By so much another way must be faster than the first, so that noise alone changes no result."""


class Way(NamedTuple):
    """How the passes through a network are computed."""

    precision: torch.dtype | None
    layout: torch.memory_format
    compile: Compile

    def __str__(self) -> str:
        precision = {kind: name for name, kind in PRECISIONS.items()}[self.precision]
        layout = "channels_last" if self.layout == torch.channels_last else "contiguous"
        return f"{precision} {layout}" + ("" if self.compile in ("auto", "none") else f" {self.compile}")


def named(text: str) -> Way:
    """The way whose text this is."""
    precision, layout, *compiling = text.split()
    return Way(PRECISIONS[precision], MEMORY_FORMATS[layout], cast(Compile, compiling[0] if compiling else "none"))


def resumed(text: str, recipe: "Recipe", own: Way) -> Way:
    """The way of a checkpoint in all that the recipe leaves open; else its own."""
    was = named(text)
    return Way(
        was.precision if recipe.precision == "auto" else own.precision,
        was.layout if recipe.memory_format == "auto" else own.layout,
        was.compile if recipe.compile == "auto" else own.compile,
    )


def ways(recipe: Recipe, model: torch.nn.Module, device: torch.device) -> list[Way]:
    """What the recipe leaves open; first what is taken unmeasured. Raises EpsdError where the device cannot."""
    precisions, layouts = [recipe.precision], [recipe.memory_format]
    if networks.weight_type(model) == torch.float64:
        precisions = ["fp32"]  # which is that of the weights
    elif recipe.precision == "auto":
        precisions += ["fp32", "bf16"]
    if recipe.memory_format == "auto" and (device.type != "cpu" or breaks_channels_last(model) is None):
        layouts += ["contiguous"]
    compiling = "none" if recipe.compile == "auto" else recipe.compile
    found = [
        Way(pick_precision(precision, device), pick_memory_format(layout, model, device), compiling)
        for layout, precision in itertools.product(layouts, precisions)
    ]
    return list(dict.fromkeys(found))


def autotuned(loop: "_Loop", batch: Batch) -> dict[Way, float]:
    """Seconds of a step of `loop` on `batch`, by way; {} where nothing is open or the training is short.

    Measured on a copy of the network, in turns. In several processes those of the main one count.
    """
    open_ways = ways(loop.recipe, loop.model, loop.device)
    steps = len(loop.train) * loop.recipe.epochs
    if not (len(open_ways) > 1 or loop.recipe.compile == "auto") or steps * SHARE < 2 * ROUNDS * len(open_ways):
        return {}
    bench = _Bench(loop, batch)
    whole = steps * _agreed(bench.seconds(open_ways[0]))
    if whole < LEAST:
        return {}
    times = dict.fromkeys(open_ways, math.inf)
    seconds = min(LONGEST, whole * SHARE)
    rounds = min(MOST, max(ROUNDS, int(seconds * steps / whole / (2 * len(open_ways)))))
    for way in open_ways * (rounds if len(open_ways) > 1 else 1):
        times[way] = min(times[way], _agreed(bench.seconds(way)))
    alone = distributed.world() == 1 and loop.recipe.quantise is None  # neither is ever compiled
    if loop.recipe.compile == "auto" and whole > COMPILING and alone:
        merged = best(times)._replace(compile="kernels")
        times[merged] = _agreed(bench.seconds(merged))
    return times if len(times) > 1 else {}


def best(times: dict[Way, float]) -> Way:
    """The fastest way; the first one, where none is faster by more than `MARGIN`."""
    first, fastest = next(iter(times)), min(times, key=times.__getitem__)
    return fastest if times[fastest] < (1 - MARGIN) * times[first] else first


def _agreed(seconds: float) -> float:
    told = torch.tensor([seconds], dtype=torch.float64)
    distributed.same_everywhere([told])
    return float(told)


class _Bench:
    """Steps of a training on copies of its network, objective and optimiser. Nothing of the training moves."""

    def __init__(self, loop: "_Loop", batch: Batch) -> None:
        self._batch, self._trial = batch, copy.copy(loop)
        self._trial.model = copy.deepcopy(loop.model)
        self._rest = networks.resting(self._trial.model)
        self._trial.net = compiled(self._trial.model, loop.way.compile, loop.device)
        self._trial.objective = copy.copy(loop.objective)
        self._trial.objective.begin("score", loop.train.size, loop.train.num_classes)
        scaled = loop.updates.scaler.is_enabled()
        self._trial.updates = Updates(self._trial.model, loop.recipe, loop.recipe.update, loop.device, scaled=scaled)
        self._trial.counted_forward = Meter().through(self._trial.forward)

    def seconds(self, way: Way) -> float:
        """Of a second step; infinite where the first does not fit into memory, or cannot be computed so."""
        try:
            self._trial.take(way)
            self._step()
            return _clocked(self._step, self._trial.device)
        except (RuntimeError, MemoryError, EpsdError) as error:
            if not shortage.is_shortage(error) and way.compile == self._trial.recipe.compile:
                raise
            return math.inf

    def _step(self) -> None:
        trial = self._trial
        networks.train_(trial.model, self._rest)
        trial.backward(shortage.parts(self._batch, trial.room.parts), 0.0)
        trial.updates.take(trial.recipe.lr)


def _clocked(call: Callable[[], None], device: torch.device) -> float:
    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    start = now()
    call()
    return now() - start
