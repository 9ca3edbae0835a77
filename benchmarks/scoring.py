"""What scoring costs: seconds and peak memory, as multiples of one plain training step, side by side in one run.

    python benchmarks/scoring.py [--architectures resnet18 vgg19] [--steps 1 3 10] [--repeats 1] [--batch-size 128]

Each row is a process of its own: a unit to warm up, then unit / operation / unit for the ratio; the peak is that of the
operation, which needs more than a unit. The unit is a plain training step (forward, cross entropy, backward, SGD with
momentum and weight decay) on the same batch, fp32. `unrolled` is plain automatic differentiation through all steps, the
baseline for `full`. Prints a Markdown table; `--write FILE` keeps it.
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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from epsd.architectures import ARCHITECTURES
from epsd.masks import prunable
from epsd.metagradients import scoring
from epsd.objectives import OBJECTIVES
from epsd.pruning import prune
from epsd.registry import choose
from epsd.runtime import versions
from epsd.scores import SCORES
from epsd.types import Batch

NETS = {
    "resnet18": {"name": "resnet", "depth": 18, "stem": "cifar"},
    "vgg19": {"name": "vgg", "depth": 19},
}
LR = 0.1


def build(name: str) -> nn.Module:
    """A net of the benchmark for 32 px images of 10 classes."""
    torch.manual_seed(0)
    model: nn.Module = choose(ARCHITECTURES, NETS[name])(10, (3, 32, 32))
    return model


def batches(count: int, size: int) -> list[Batch]:
    """Random images, the same for every operation."""
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.arange(size) % 10,
            torch.arange(size),
        )
        for _ in range(count)
    ]


def unit(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """One plain training step."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(F.cross_entropy(model(batch.images), batch.labels))
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


def operation(name: str, steps: int, model: nn.Module, size: int) -> Callable[[], object]:
    """What a row runs, ready to call."""
    drawn = batches(steps + 1, size)
    plain = OBJECTIVES["cross_entropy"]()
    if name == "plain step":
        return unit(model, drawn[0])
    if name == "unrolled":

        def run() -> object:
            with scoring(model):
                return unrolled(model, drawn)

        return run
    if name == "synflow-100":
        return lambda: prune(model, drawn, score=SCORES["synflow"](), sparsity=0.9, rounds=100)
    choice: dict[str, Any]
    if name in ("snip", "grasp"):
        choice = {"name": name}
    else:
        kept = steps if name == "full, graphs kept" else 0
        reading = "first_order" if name == "first_order" else "full"
        choice = {"name": "prospr", "steps": steps, "lr": LR, "reading": reading, "graphs_kept": kept}
    score = choose(SCORES, choice)
    return lambda: score(model, iter(drawn), plain)


def peak() -> float:
    """MiB of this process at its highest."""
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def measure(architecture: str, name: str, steps: int, size: int, repeats: int) -> dict[str, float]:
    """In a process of its own: unit / operation / unit, and the peak memory, which is the operation's."""
    model = build(architecture)
    call = operation(name, steps, model, size)
    before = peak()
    one = unit(build(architecture), batches(1, size)[0])
    one()
    ratios, seconds = [], []
    for _ in range(repeats):
        first, middle, last = clock(one), clock(call), clock(one)
        seconds.append(middle)
        ratios.append(2 * middle / (first + last))
    highest = peak()
    parameters = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    return {
        "ratio": statistics.median(ratios),
        "seconds": statistics.median(seconds),
        "peak": highest,
        "extra": highest - before,
        "parameters": parameters,
    }


def clock(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rows(steps: list[int]) -> Iterator[tuple[str, int]]:
    """(operation, look-ahead steps) of the table."""
    yield "plain step", 0
    for name in ("full", "full, graphs kept", "unrolled", "first_order"):
        for count in steps:
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


def child(arguments: argparse.Namespace, architecture: str, name: str, steps: int) -> dict[str, float] | None:
    """Run one row in a fresh process; None where it does not fit into memory."""
    job = json.dumps([architecture, name, steps, arguments.batch_size, arguments.repeats])
    done = subprocess.run([sys.executable, __file__, "--job", job], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stderr[-400:], file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of the report."""
    info = versions()
    yield f"{info['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {info['python']},"
    yield (
        f"commit {info.get('git.commit', '?')[:10]}; batch {arguments.batch_size} of 3x32x32, fp32, "
        f"{arguments.repeats} repeats."
    )
    for architecture in arguments.architectures:
        yield ""
        yield (
            f"| {architecture}: operation | steps | x plain step | seconds | peak MiB | extra MiB "
            "| extra less parameter copies |"
        )
        yield "|---|---|---|---|---|---|---|"
        per_step = 0.0
        for name, steps in rows(arguments.steps):
            if name in ("unrolled", "full, graphs kept") and per_step * (steps + 1) > 0.8 * free_memory():
                yield f"| {name} | {steps} | not run | | | needs about {per_step * (steps + 1):.0f} | |"
                continue
            found = child(arguments, architecture, name, steps)
            if found is None:
                yield f"| {name} | {steps} | failed | | | | |"
                continue
            if name in ("unrolled", "full, graphs kept"):
                per_step = max(per_step, found["extra"] / (steps + 1))
            less = found["extra"] - found["parameters"] * (steps + 1)
            yield (
                f"| {name} | {steps} | {found['ratio']:.2f} | {found['seconds']:.2f} | {found['peak']:.0f} "
                f"| {found['extra']:.0f} | {less:.0f} |"
            )


def main() -> None:
    """Print the table, or run one row of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 3, 10])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measure(*json.loads(arguments.job))))
        return
    lines = []
    for line in table(arguments):
        print(line, flush=True)
        lines.append(line)
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
