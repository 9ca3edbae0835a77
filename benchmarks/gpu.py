"""Training and scoring on a GPU: images per second, share of the peak, what compiling gains, a whole run.

    python benchmarks/gpu.py --write benchmarks/results/gpu.md
    python benchmarks/gpu.py --parts run --images cifar10.zip    # the preset cifar10-resnet18: scoring, 200 epochs
    python benchmarks/gpu.py --device cpu --tiny                 # seconds: whether the script works

ResNet-18 (CIFAR stem), 3x32x32, `fit` as a user runs it: mask at 95 %, bookkeeping, channels_last, the fastest update.

step : images per second in plain steps of cross entropy, share of what large matrix products reach
    in the same precision on the same device, for each batch size and `train.compile`; time until the first step is
    through is told apart.
objectives : a step of each objective in plain steps.
scoring : EPSD's exact score at three steps, in plain steps, with and without graphs kept; peak memory.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from comparison import Job, base, data, result
from epsd.compute.devices import pick_precision, to_device
from epsd.evaluation.metrics import flops
from epsd.objectives import OBJECTIVES
from epsd.project.params import override
from epsd.project.recipes import Recipe
from epsd.project.runtime import versions
from epsd.pruning.prune import prune
from epsd.scores.epsd import Epsd
from epsd.training.fit import fit
from epsd.training.record import Record
from page import options, show
from training import NAMES, SHAPE, Repeated, drawn, half, network

Compile = Literal["none", "kernels", "graphs"]
Precision = Literal["fp32", "bf16"]
MODES: tuple[Compile, ...] = ("none", "kernels", "graphs")


def wait(device: torch.device) -> None:
    """Until the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device, precision: Precision, size: int) -> float:
    """FLOP/s of large matrix products: the best of ten."""
    dtype = pick_precision(precision, device) or torch.float32
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(10):
        wait(device)
        started = time.perf_counter()
        left @ right
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def step(arguments: argparse.Namespace, size: int, objective: str, compile: Compile) -> tuple[float, float]:
    """Seconds of one step of `fit`, and of the first epoch (compiling included)."""
    device = torch.device(arguments.device)
    model = network().to(device)
    source = Repeated(to_device(drawn(size), device), arguments.steps)
    epochs: list[Record] = []
    recipe = Recipe(epochs=arguments.epochs, lr=0.01, precision=arguments.precision, compile=compile)
    chosen = OBJECTIVES[objective]()
    fit(model, source, objective=chosen, mask=half(model), recipe=recipe, on_epoch=epochs.append)
    return epochs[-1]["time/epoch"] / arguments.steps, epochs[0]["time/epoch"]


def step_table(arguments: argparse.Namespace) -> Iterator[str]:
    """Images per second."""
    device, work = torch.device(arguments.device), 3 * flops(network(), SHAPE).dense
    top = peak(device, arguments.precision, arguments.size)
    yield f"Matrix products, {arguments.precision}: {top / 1e12:.1f} TFLOP/s."
    yield ""
    yield "| batch | compile | images/s | % of matrix products | first epoch, s |"
    yield "|---|---|---|---|---|"
    for size in arguments.batch_sizes:
        for mode in arguments.compile:
            seconds, first = step(arguments, size, "cross_entropy", mode)
            share = 100 * work * size / seconds / top
            yield f"| {size} | {mode} | {size / seconds:,.0f} | {share:.1f} | {first:.1f} |"


def objective_table(arguments: argparse.Namespace) -> Iterator[str]:
    """Every objective, in steps of plain cross entropy."""
    yield "| objective | " + " | ".join(f"batch {size}" for size in arguments.batch_sizes) + " |"
    yield "|---" * (len(arguments.batch_sizes) + 1) + "|"
    plain = {size: step(arguments, size, "cross_entropy", "none")[0] for size in arguments.batch_sizes}
    for name in NAMES:
        ratios = [step(arguments, size, name, "none")[0] / plain[size] for size in arguments.batch_sizes]
        yield f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"


def scoring_table(arguments: argparse.Namespace) -> Iterator[str]:
    """EPSD's score."""
    device, size = torch.device(arguments.device), arguments.batch_sizes[0]
    plain = step(argparse.Namespace(**{**vars(arguments), "precision": "fp32"}), size, "cross_entropy", "none")[0]
    yield f"| EPSD at 3 steps, fp32, batch {size} | seconds | plain fp32 steps | peak memory, GiB |"
    yield "|---|---|---|---|"
    ways: dict[str, Literal["auto"] | int] = {"graphs kept where they fit": "auto", "graphs made again": 0}
    for title, kept in ways.items():
        model, score = network().to(device), Epsd(steps=3, graphs_kept=kept)
        source = Repeated(to_device(drawn(size), device), 4)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        wait(device)
        started = time.perf_counter()
        prune(model, source, score=score, sparsity=0.95, objective=OBJECTIVES["cskd"]())
        wait(device)
        seconds = time.perf_counter() - started
        most = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}" if device.type == "cuda" else "not measured"
        yield f"| {title} | {seconds:.2f} | {seconds / plain:.1f} | {most} |"


def run_table(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The preset cifar10-resnet18 from scoring to the test split."""
    if arguments.images is None:
        yield "Not run: it needs `--images`, a folder or archive of CIFAR-10 as images."
        return
    chosen = argparse.Namespace(preset="cifar10-resnet18", images=arguments.images, set=arguments.set)
    tree = base(chosen)
    override(tree, "device", arguments.device)
    row = result(tree, data(tree, folder), Job("epsd", "cskd", float(tree["prune"]["sparsity"]), 0))
    yield "| epochs | scoring, s | training, s | test top-1, % | ECE |"
    yield "|---|---|---|---|---|"
    figures = (
        f"{row['score_seconds']:.1f}",
        f"{row['train_seconds']:.1f}",
        f"{100 * row['top1']:.2f}",
        f"{row['ece']:.3f}",
    )
    yield f"| {tree['train']['epochs']} | " + " | ".join(figures) + " |"


def page(arguments: argparse.Namespace) -> Iterator[str]:
    """All tables that are asked for."""
    here = versions()
    yield "# On a GPU"
    yield ""
    machine = here.get("gpu", here["cpu"])
    yield f"{machine}, torch {here['torch']}, Python {here['python']}, commit {here.get('git.commit', '?')[:10]};"
    yield f"`fit`, {arguments.precision}, channels_last; {arguments.steps} steps an epoch, the third epoch is told."
    tables: dict[str, Iterator[str]] = {
        "step": step_table(arguments),
        "objectives": objective_table(arguments),
        "scoring": scoring_table(arguments),
        "run": run_table(arguments, arguments.folder),
    }
    for part in arguments.parts:
        yield ""
        yield f"## {part}"
        yield ""
        yield from tables[part]


def main() -> None:
    """Print the tables as they come, and keep them."""
    parser = options(__doc__)
    parts = ("step", "objectives", "scoring", "run")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--compile", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=100, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="of which the last one is timed")
    parser.add_argument("--size", type=int, default=8192, help="rows of the matrix products")
    parser.add_argument("--images", type=Path, help="CIFAR-10 as a folder or archive of images")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the preset of the run")
    parser.add_argument("--folder", type=Path, default=Path(".epsd/benchmark-gpu"), help="for the prepared images")
    parser.add_argument("--tiny", action="store_true", help="a few images and steps, nothing compiled")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.batch_sizes, arguments.compile, arguments.steps, arguments.size = [2, 4], ["none"], 1, 64
        arguments.epochs = 1
    show(page(arguments), arguments.write)


if __name__ == "__main__":
    main()
