"""What a training step costs: against the machine's peak, the usual way of training, and bare loops; side by side.

    python benchmarks/training.py [--parts step objectives epoch auto] [--precisions bf16 fp32] [--rounds 5]
        [--write FILE]

ResNet-18 (CIFAR stem, 10 classes), batch 128 of 3x32x32, random images. A bare step is forward, loss, backward and SGD
with momentum in plain PyTorch, with the layout, precision, kernels and memory that `train` picks; `fit` is the
project's loop. What is compared takes turns: a ratio is that of neighbours in time, the table shows the median
(min-max) of the rounds.

step : GFLOP/s of one plain step (3 forward passes of 2 operations per multiply-accumulate) against large matrix
    products in the same precision, and its time against the usual step: fp32, default layout, default SGD.
objectives : a step of `fit`, all included, in units of the bare cross-entropy step; "least times": the shortest step of
    each against the shortest bare one, which other jobs on the machine disturb least.
epoch : epochs of `fit` with pad-crop, flip, partners, a mask at 95 % and bookkeeping, against the bare steps of the
    same objective; and what an epoch pays once: logging to MLflow, a checkpoint.
auto : shortest steps of `fit` in every way that the recipe leaves open, and in the one that `auto` takes after it has
    measured them; ResNet-18 and the narrow ResNet-20 and ResNet-8.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsd.architectures import ARCHITECTURES
from epsd.compute.devices import pick_precision
from epsd.compute.speed import keep_freed_memory, optimiser, pick_update
from epsd.data.in_memory import MemoryBatches, Pixels
from epsd.evaluation.metrics import flops
from epsd.masks import Mask, prunable
from epsd.objectives import OBJECTIVES
from epsd.project.recipes import Recipe
from epsd.project.runtime import versions
from epsd.registry import choose
from epsd.training import autotune, checkpoints
from epsd.training.fit import fit
from epsd.training.record import Record
from epsd.training.updates import MaskHolder
from epsd.types import Batch, BatchNeeds, Objective
from page import options, show

SHAPE = (3, 32, 32)
CPU = torch.device("cpu")
NAMES = ("cross_entropy", "pskd", "cskd", "dlb")
EPOCH_OF_CIFAR = 390
"""Steps of a CIFAR-10 epoch at batch 128."""

Step = Callable[[], object]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


def network(depth: int = 18) -> nn.Module:
    """A ResNet for CIFAR."""
    torch.manual_seed(0)
    model: nn.Module = choose(ARCHITECTURES, {"name": "resnet", "depth": depth, "stem": "cifar"})(10, SHAPE)
    return model


def drawn(size: int) -> Batch:
    """Random images with everything that any objective needs."""
    images = torch.randn(size, *SHAPE)
    return Batch(images, torch.arange(size) % 10, torch.arange(size), torch.randn(size, *SHAPE))


def clock(call: Step) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Enough(Exception):
    """A training has done the steps that are measured."""


class Repeated:
    """One batch again and again; `seconds`: how long training took over each. `announced`: steps of a training that
    is to be taken for longer than it is; it ends in `Enough`.
    """

    def __init__(self, batch: Batch, steps: int, announced: int = 0) -> None:
        self.size, self.num_classes = len(batch.labels), 10
        self._batch, self._steps, self._announced = batch, steps, announced
        self.seconds: list[float] = []

    def __len__(self) -> int:
        return self._announced or self._steps

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        """`steps` times the batch."""
        for _ in range(self._steps):
            start = time.perf_counter()
            yield self._batch
            self.seconds.append(time.perf_counter() - start)
        if self._announced:
            raise Enough


def usual_step(batch: Batch) -> Step:
    """As the official repositories train: fp32, default layout, default SGD."""
    model = network()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def step() -> None:
        loss = F.cross_entropy(model(batch.images), batch.labels)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()

    return step


def bare_step(batch: Batch, precision: str, objective: Objective) -> Step:
    """Forward, loss, backward, SGD, as fast as plain PyTorch does them."""
    model = network().to(memory_format=torch.channels_last)
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    sgd = optimiser("sgd", model.parameters(), pick_update("auto", CPU), **settings)
    lower = pick_precision(precision, CPU)
    objective.begin("train", len(batch.labels), 10)
    images, partner = (
        x.contiguous(memory_format=torch.channels_last) for x in (batch.images, batch.partner) if x is not None
    )
    batch = batch._replace(images=images, partner=partner)

    def forward(images: Tensor) -> Tensor:
        with torch.autocast("cpu", lower, enabled=lower is not None):
            logits: Tensor = model(images)
        return logits.float()

    def step() -> None:
        loss = objective.loss(forward, batch, 0.5)
        sgd.zero_grad()
        torch.autograd.backward(loss.total)
        sgd.step()

    return step


def fitted(batch: Batch, precision: Precision, objective: Objective) -> tuple[float, float]:
    """Seconds of a step of `fit` under a mask, after the first two: the mean of two, and the lesser.

    DLB's first step has no last batch, so its second is the first that takes all of the memory it needs.
    """
    model, source = network(), Repeated(batch, 4)
    mask = half(model)
    fit(model, source, objective=objective, mask=mask, recipe=Recipe(epochs=1, lr=0.01, precision=precision))
    return statistics.mean(source.seconds[2:]), min(source.seconds[2:])


def half(model: nn.Module) -> Mask:
    """95 % removed by magnitude."""
    return Mask.from_scores({name: p.detach().abs() for name, p in prunable(model).items()}, 0.95)


def product(dtype: torch.dtype, size: int = 4096) -> float:
    """GFLOP/s of one matrix product."""
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return float(2 * size**3 / clock(lambda: left @ right) / 1e9)


def spread(values: list[float], digits: int = 2) -> str:
    """Median (min-max)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def step_table(arguments: argparse.Namespace) -> Iterator[str]:
    """The plain step against the machine, and against the usual one."""
    batch = drawn(arguments.batch_size)
    work = 3 * flops(network(), SHAPE).dense * arguments.batch_size / 1e9
    usual = usual_step(batch)
    steps = {name: bare_step(batch, name, OBJECTIVES["cross_entropy"]()) for name in arguments.precisions}
    dtypes = {name: pick_precision(name, CPU) or torch.float32 for name in arguments.precisions}
    for call in (usual, *steps.values()):
        call()
    seconds: dict[str, list[float]] = {name: [] for name in ("usual", *steps)}
    faster: dict[str, list[float]] = {name: [] for name in steps}
    share: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, list[float]] = {name: [] for name in steps}
    through: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        keep_freed_memory(False)
        usual()
        seconds["usual"].append(clock(usual))
        keep_freed_memory()
        for name, call in steps.items():
            call()
            before = product(dtypes[name])
            seconds[name].append(statistics.mean(clock(call) for _ in range(2)))
            peaks[name].append((before + product(dtypes[name])) / 2)
            share[name].append(100 * work / seconds[name][-1] / peaks[name][-1])
            through[name].append(fitted(batch, name, OBJECTIVES["cross_entropy"]())[0] / seconds[name][-1])
            faster[name].append(seconds["usual"][-1] / seconds[name][-1])
    yield "| plain step | seconds | GFLOP/s | % of matrix products | usual / this | `fit` with mask / this |"
    yield "|---|---|---|---|---|---|"
    middle = statistics.median(seconds["usual"])
    yield f"| usual: fp32, default layout and SGD | {middle:.3f} | {work / middle:.0f} | | 1 | |"
    for name in steps:
        middle = statistics.median(seconds[name])
        yield (
            f"| {name}, channels_last, fused SGD | {middle:.3f} | {work / middle:.0f} of "
            f"{statistics.median(peaks[name]):.0f} | {spread(share[name], 0)} | {spread(faster[name])} "
            f"| {spread(through[name])} |"
        )


def objective_table(arguments: argparse.Namespace) -> Iterator[str]:
    """Every objective through `fit`, in bare cross-entropy steps."""
    batch = drawn(arguments.batch_size)
    least = [f"{name}, least times" for name in arguments.precisions]
    head = " | ".join([*arguments.precisions, *least])
    yield f"| objective, step of `fit` with mask / bare cross-entropy step | {head} |"
    yield "|---" * (1 + 2 * len(arguments.precisions)) + "|"
    ratios: dict[tuple[str, str], list[float]] = {(n, p): [] for n in NAMES for p in arguments.precisions}
    fastest: dict[tuple[str, str], float] = {}
    for precision in arguments.precisions:
        bare = bare_step(batch, precision, OBJECTIVES["cross_entropy"]())
        bare()
        before = plain = clock(bare)
        shortest = dict.fromkeys(NAMES, float("inf"))
        for _ in range(arguments.rounds):
            for name in NAMES:
                middle, least_of = fitted(batch, precision, OBJECTIVES[name]())
                after = clock(bare)
                ratios[name, precision].append(2 * middle / (before + after))
                shortest[name], plain = min(shortest[name], least_of), min(plain, after)
                before = after
        fastest |= {(name, precision): shortest[name] / plain for name in NAMES}
    for name in NAMES:
        cells = [spread(ratios[name, p]) for p in arguments.precisions]
        cells += [f"{fastest[name, p]:.2f}" for p in arguments.precisions]
        yield f"| {name} | " + " | ".join(cells) + " |"


def epoch_table(arguments: argparse.Namespace) -> Iterator[str]:
    """Whole epochs against the bare steps of the same objective, and what an epoch pays once."""
    precision, size = arguments.precisions[0], arguments.batch_size
    batch, steps = drawn(size), 6
    pixels = torch.randint(0, 256, (steps * size, *SHAPE), dtype=torch.uint8)
    yield f"| epoch of {steps} steps of `fit` / bare steps, {precision} | ratio |"
    yield "|---|---|"
    plain = 0.0
    for name in NAMES:
        bare = bare_step(batch, precision, OBJECTIVES[name]())
        bare(), bare()
        ratios = []
        before = clock(bare)
        for _ in range(max(2, arguments.rounds // 2)):
            spent = whole_epoch(pixels, size, precision, OBJECTIVES[name]())
            after = clock(bare)
            ratios.append(2 * spent / steps / (before + after))
            before = after
        plain = before if name == "cross_entropy" else plain
        yield f"| {name} | {spread(ratios)} |"
    yield ""
    yield f"| once an epoch | milliseconds | of an epoch of {EPOCH_OF_CIFAR} plain steps, % |"
    yield "|---|---|---|"
    for label, spent in (
        ("metrics to MLflow (SQLite)", logging()),
        ("checkpoint, written through to the disk", saving()),
    ):
        yield f"| {label} | {1000 * spent:.0f} | {100 * spent / (EPOCH_OF_CIFAR * plain):.2f} |"
    masking = holding()
    yield ""
    share = 100 * masking / plain
    yield f"The mask takes {1000 * masking:.1f} ms of a step: {share:.1f} % of a plain one in {precision}."


def whole_epoch(pixels: Tensor, size: int, precision: Precision, objective: Objective) -> float:
    """Seconds of the second epoch of `fit`: data, objective, mask, bookkeeping."""
    labels = torch.arange(len(pixels)) % 10
    figures: dict[str, Any] = {"num_classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3, "batch_size": size}
    batches = MemoryBatches(Pixels.of(pixels, 4), labels, flip=True, shuffle=True, drop_last=True, **figures)
    model = network()
    seen: list[Record] = []
    recipe = Recipe(epochs=2, lr=0.01, precision=precision)
    fit(model, batches, objective=objective, mask=half(model), recipe=recipe, on_epoch=seen.append)
    return seen[1]["time/epoch"]


def holding() -> float:
    """Seconds that the mask takes in one step."""
    model = network().to(memory_format=torch.channels_last)
    holder = MaskHolder(half(model), model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return statistics.median(clock(holder.gradients_) for _ in range(20))


def logging() -> float:
    """Seconds to log one epoch's figures to a store of its own."""
    from epsd.tracking import track

    figures = {f"train/figure{number}": 0.5 for number in range(9)}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DVC_ROOT"] = folder
        with track("train", experiment="benchmark", name="benchmark", params={}, tags={}) as tracker:
            return statistics.median(clock(partial(tracker.metrics, figures, step=step)) for step in range(9))


def saving() -> float:
    """Seconds to write weights and momentum."""
    model = network()
    state = {"model": model.state_dict(), "momentum": [torch.zeros_like(p) for p in model.parameters()]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.safetensors"
        return statistics.median(clock(lambda: checkpoints.save(path, state, "mark")) for _ in range(3))


def auto_table(arguments: argparse.Namespace) -> Iterator[str]:
    """What `auto` takes, and how much faster the best candidate is."""
    yield "| network | candidates, seconds of a step | `auto` takes | slower than the best by at most |"
    yield "|---|---|---|---|"
    batch = drawn(arguments.batch_size)
    for depth in (18, 20, 8):
        ways = list(map(str, autotune.ways(Recipe(), network(depth), CPU)))
        first = stepped(depth, batch, explicit(ways[0]), 2)[0]
        steps = min(40, 2 + int(2 / first))
        measured = int(2 * autotune.ROUNDS * len(ways) / autotune.SHARE) + 1  # steps from which on it is
        announced = max(measured, int(3 * autotune.LEAST / first))
        seconds, taken = dict.fromkeys(ways, float("inf")), list[str]()
        for _ in range(arguments.rounds):
            for name in ways:
                seconds[name] = min(seconds[name], stepped(depth, batch, explicit(name), steps)[0])
            taken.append(stepped(depth, batch, Recipe(lr=0.01, epochs=1, compile="none"), 2, announced)[1] or ways[0])
        each, best = ", ".join(f"{name} {least:.3f}" for name, least in seconds.items()), min(seconds.values())
        slower = max(100 * (seconds[name] / best - 1) for name in taken)
        yield f"| ResNet-{depth} | {each} | {', '.join(taken)} | {slower:.1f} % |"


def explicit(way: str) -> Recipe:
    """The recipe that leaves nothing open."""
    precision, layout = way.split()
    open_ways: dict[str, Any] = {"precision": precision, "memory_format": layout, "compile": "none"}
    return Recipe(lr=0.01, epochs=1, **open_ways)


def stepped(depth: int, batch: Batch, recipe: Recipe, steps: int, announced: int = 0) -> tuple[float, str]:
    """The shortest step of a training after its first, and the way that it says it takes."""
    model, source, said = network(depth), Repeated(batch, steps, announced), io.StringIO()
    with contextlib.suppress(Enough), contextlib.redirect_stderr(said):
        fit(model, source, objective=OBJECTIVES["cross_entropy"](), mask=half(model), recipe=recipe)
    return min(source.seconds[1:]), said.getvalue().partition("train: ")[2].partition(" is taken")[0]


PARTS = {"step": step_table, "objectives": objective_table, "epoch": epoch_table, "auto": auto_table}


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of the report."""
    info = versions()
    yield f"{info['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {info['python']},"
    yield f"commit {info.get('git.commit', '?')[:10]}; batch {arguments.batch_size}, {arguments.rounds} rounds."
    for part in arguments.parts:
        yield ""
        yield from PARTS[part](arguments)


def main() -> None:
    """Print the tables."""
    parser = options(__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["bf16", "fp32"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    show(report(arguments), arguments.write)


if __name__ == "__main__":
    main()
