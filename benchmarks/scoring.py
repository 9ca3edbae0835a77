"""What scoring costs: seconds and peak memory, as multiples of one plain training step, side by side in one run.

    python benchmarks/scoring.py [--architectures resnet18 vgg19] [--steps 3] [--repeats 1] [--batch-size 128]

Each row is a process of its own: units to warm up, then unit / operation / unit for the ratio; the peak is that of the
operation, which needs more than a unit. The unit is a plain training step (forward, cross entropy, backward, SGD with
momentum and weight decay) on the same batch, fp32: in PyTorch's default layout, which is what the official code runs
in, and in channels_last, which scoring runs in here. `unrolled` is plain automatic differentiation through all steps
in torch's own layers and default layout, as the official code does it: the baseline for `full`. `half` is `full` with
half the memory that `unrolled` took as its budget. As the stage `prune` does, rows in which memory is not counted keep
what they free (`epsd.compute.speed.keep_freed_memory`). `official` is the setting of ProsPr's README (momentum 0.9, the
first buffer detached), graphs kept. `bf16` rows give the overlap of their mask (95 % sparsity) with that
of fp32. Images are the digits that come with scikit-learn, enlarged to 32 px. Prints a Markdown table; `--write FILE`
keeps it.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from epsd.architectures import ARCHITECTURES
from epsd.compute.speed import keep_freed_memory
from epsd.masks import Mask, prunable
from epsd.objectives import OBJECTIVES
from epsd.project.runtime import versions
from epsd.pruning.prune import prune
from epsd.pruning.scoring import Means, within
from epsd.registry import choose
from epsd.scores import SCORES
from epsd.types import Batch, Scores
from page import options, show

NETS = {
    "resnet18": {"name": "resnet", "depth": 18, "stem": "cifar"},
    "vgg19": {"name": "vgg", "depth": 19},
}
LR = 0.1
SPARSITY = 0.95
FULL = ("full, graphs kept", "full, half", "full, made again", "bf16, graphs kept", "bf16, made again")


class Job(NamedTuple):
    """One row. memory: MiB of the budget of "full, half"."""

    architecture: str
    name: str
    steps: int
    size: int
    repeats: int
    memory: float


def build(name: str) -> nn.Module:
    """A net of the benchmark for 32 px images of 10 classes."""
    torch.manual_seed(0)
    model: nn.Module = choose(ARCHITECTURES, NETS[name])(10, (3, 32, 32))
    return model


def batches(count: int, size: int) -> list[Batch]:
    """Handwritten digits, the same for every operation, all classes in every batch."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(1))
    known = torch.from_numpy(digits.target)[order]
    least = int(torch.bincount(known).min())
    order = torch.stack([order[known == label][:least] for label in range(10)], 1).flatten()  # 0 1 2 ... 9 0 1 ...
    rows = torch.arange(count * size).remainder(len(order))
    images = torch.from_numpy(digits.images).float().div(8).sub(1)[order][rows]
    images = F.interpolate(images[:, None].expand(-1, 3, -1, -1), scale_factor=4).contiguous()
    labels = torch.from_numpy(digits.target)[order][rows]
    return [Batch(*parts) for parts in zip(*(torch.split(t, size) for t in (images, labels, rows)), strict=True)]


def unit(model: nn.Module, batch: Batch, layout: torch.memory_format) -> Callable[[], None]:
    """One plain training step."""
    model, images = model.to(memory_format=layout), batch.images.contiguous(memory_format=layout)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(F.cross_entropy(model(images), batch.labels))
        optimiser.step()

    return step


def unrolled(model: nn.Module, drawn: list[Batch]) -> list[Tensor]:
    """The same meta-gradient by plain automatic differentiation through every step."""
    names = list(prunable(model))
    start = {name: p.detach() for name, p in model.named_parameters()}
    masks = {name: torch.ones_like(start[name]).requires_grad_() for name in names}
    theta = {n: (w * masks[n] if n in masks else w.clone().requires_grad_()) for n, w in start.items()}

    def loss(batch: Batch) -> Tensor:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return F.cross_entropy(functional_call(model, {**theta, **buffers}, (batch.images,)), batch.labels)

    for batch in drawn[:-1]:
        gradient = torch.autograd.grad(loss(batch), list(theta.values()), create_graph=True)
        theta = {name: w - LR * g for (name, w), g in zip(theta.items(), gradient, strict=True)}
    return list(torch.autograd.grad(loss(drawn[-1]), list(masks.values())))


def choice(name: str, steps: int) -> dict[str, Any]:
    """The score of a row, as in params.yaml."""
    if name in ("snip", "grasp"):
        return {"name": name}
    if name == "first_order":
        return {"name": "prospr", "steps": steps, "lr": LR, "reading": name}
    if name == "official":
        momentum = {"momentum": 0.9, "detach_first_step": True}
        return {"name": "prospr", "steps": steps, "lr": LR, "graphs_kept": steps, **momentum}
    kept = {"graphs kept": steps, "made again": 0, "half": "auto"}[name.split(", ")[1]]
    return {"name": "prospr", "steps": steps, "lr": LR, "graphs_kept": kept}


def scores(job: Job, model: nn.Module, drawn: list[Batch], precision: torch.dtype | None) -> Scores:
    """What the row's score gives."""
    with within(Means(job.memory * 2**20 if job.name == "full, half" else None, precision)):
        return choose(SCORES, choice(job.name, job.steps))(model, iter(drawn), OBJECTIVES["cross_entropy"]())


def operation(job: Job, model: nn.Module, drawn: list[Batch]) -> Callable[[], object]:
    """What a row runs, ready to call."""
    if job.name == "plain step":
        return unit(model, drawn[0], torch.contiguous_format)
    if job.name == "unrolled":
        return lambda: unrolled(model, drawn)
    if job.name == "synflow-100":
        return lambda: prune(model, drawn, score=SCORES["synflow"](), sparsity=0.9, rounds=100)
    precision = torch.bfloat16 if job.name.startswith("bf16") else None
    return lambda: scores(job, model, drawn, precision)


def overlap(job: Job, model: nn.Module, drawn: list[Batch]) -> float:
    """Jaccard overlap of the masks of bf16 and of fp32."""
    low, high = (Mask.from_scores(scores(job, model, drawn, p), SPARSITY) for p in (torch.bfloat16, None))
    return low.jaccard(high)


def peak() -> float:
    """MiB of this process at its highest."""
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def measure(job: Job) -> dict[str, float]:
    """In a process of its own: units / operation / units, and the peak memory, which is the operation's."""
    keep_freed_memory(not job.name.endswith(("plain step", "unrolled", "half", "made again")))
    drawn = batches(job.steps + 1, job.size)
    model = build(job.architecture)
    call = operation(job, model, drawn)
    before = peak()
    one = unit(build(job.architecture), drawn[0], torch.contiguous_format)
    own = unit(build(job.architecture), drawn[0], torch.channels_last)
    one(), own()
    ratios, owns, seconds = [], [], []
    for _ in range(job.repeats):
        first, before_it, middle, after_it, last = (clock(work) for work in (one, own, call, own, one))
        seconds.append(middle)
        ratios.append(2 * middle / (first + last))
        owns.append(2 * middle / (before_it + after_it))
    highest = peak()
    return {
        "ratio": statistics.median(ratios),
        "own": statistics.median(owns),
        "seconds": statistics.median(seconds),
        "peak": highest,
        "extra": highest - before,
        **({"overlap": overlap(job, model, drawn)} if job.name == "bf16, graphs kept" else {}),
    }


def clock(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rows(steps: list[int]) -> Iterator[tuple[str, int]]:
    """(operation, look-ahead steps) of the table."""
    yield "plain step", 0
    for count in steps:
        for name in ("unrolled", *FULL, "official", "first_order"):
            yield name, count
    for name in ("snip", "grasp", "synflow-100"):
        yield name, 0


def free_memory() -> float:
    """MiB that can be had without swapping; infinite where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return float("inf")
    line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**10


def child(job: Job) -> dict[str, float] | None:
    """Run one row in a fresh process; None where it does not fit into memory."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stderr[-400:], file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of the report."""
    info = versions()
    yield f"{info['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {info['python']},"
    yield f"commit {info.get('git.commit', '?')[:10]}; batch {arguments.batch_size} of 3x32x32, "
    yield f"{arguments.repeats} repeat(s)."
    for architecture in arguments.architectures:
        yield ""
        yield (
            f"| {architecture}: operation | steps | x plain step | x channels_last step | seconds | peak MiB "
            "| extra MiB | mask overlap |"
        )
        yield "|---|---|---|---|---|---|---|---|"
        yield from lines_of(arguments, architecture)


def lines_of(arguments: argparse.Namespace, architecture: str) -> Iterator[str]:
    """One line per row of the table."""
    extra = 0.0  # of the unrolled graph, MiB
    for name, steps in rows(arguments.steps):
        if name == "unrolled" and extra * 3 > 0.8 * free_memory():
            yield f"| {name} | {steps} | not run: too little memory | | | | | |"
            continue
        job = Job(architecture, name, steps, arguments.batch_size, arguments.repeats, extra / 2)
        found = child(job)
        if found is None:
            yield f"| {name} | {steps} | failed | | | | | |"
            continue
        extra = found["extra"] if name == "unrolled" else extra
        shared = f"{found['overlap']:.3f}" if "overlap" in found else ""
        yield (
            f"| {name} | {steps} | {found['ratio']:.2f} | {found['own']:.2f} | {found['seconds']:.2f} "
            f"| {found['peak']:.0f} | {found['extra']:.0f} | {shared} |"
        )


def main() -> None:
    """Print the table, or run one row of it."""
    parser = options(__doc__)
    parser.add_argument("--architectures", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--steps", nargs="+", type=int, default=[3])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measure(Job(*json.loads(arguments.job)))))
        return
    show(table(arguments), arguments.write)


if __name__ == "__main__":
    main()
