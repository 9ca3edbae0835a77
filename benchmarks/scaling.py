"""What a training needs on 1, 8 and 64 GPUs: time, memory, network, computed from one device's figures.

    python benchmarks/scaling.py                              # ImageNet, ResNet-50, EPSD under CS-KD
    python benchmarks/scaling.py --images-per-second 1900     # as measured on your GPU for one plain training step

Nothing is trained. One device's rate is `--images-per-second` where you have measured it (a plain step in the
precision you train in); without it, `--peak` (what the maker states for dense bf16 products) times `--share` (assumed).
The network's operations and parameters are counted from the network itself; image passes per image are those of
`epsd.compute.cost`; the volume of an all-reduce is that of a ring, 2 (n - 1) / n times the gradients' bytes for each
GPU.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from epsd.architectures import ARCHITECTURES
from epsd.compute.cost import BACKWARD, FORWARD
from epsd.evaluation import metrics
from epsd.project import presets
from epsd.project.params import Params, parse
from epsd.registry import choose

ROOT = Path(__file__).resolve().parent.parent
IMAGES = {"imagenet": 1_281_167, "cifar": 50_000, "tiny_imagenet": 100_000, "cub": 5_994}
CLASSES = {"imagenet": 1000, "cifar": 10, "tiny_imagenet": 200, "cub": 200}
SIDE = {"imagenet": 224, "cifar": 32, "tiny_imagenet": 64, "cub": 224}
PLAIN = FORWARD + BACKWARD
"""Image passes per image of a plain training step."""
EXTRA = {"cross_entropy": 0, "pskd": 0, "cskd": FORWARD, "dlb": PLAIN}
"""And what an objective adds for every image: CS-KD its partner's forward pass, DLB every image a second time."""


class Network(NamedTuple):
    """One network, counted. `operations`: of one forward pass of one image (2 per multiply-accumulate)."""

    operations: float
    parameters: int
    batch_norms: int


class Plan(NamedTuple):
    """One row of the table."""

    gpus: int
    batch: int
    compute: float
    network: float
    steps: int

    @property
    def hours(self) -> tuple[float, float]:
        """All training, with the all-reduce hidden behind the computation where it fits, and with none of it hidden."""
        hidden = max(self.compute, self.network)
        return hidden * self.steps / 3600, (self.compute + self.network) * self.steps / 3600


def counted(params: Params) -> Network:
    """The preset's network for its images, without storage for its weights."""
    name = str(params.dataset["name"])
    shape = (3, SIDE[name], SIDE[name])
    model = choose(ARCHITECTURES, params.architecture, "architecture")(CLASSES[name], shape)
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    return Network(metrics.flops(model, shape).dense, sum(p.numel() for p in model.parameters()), norms)


def rate(arguments: argparse.Namespace, network: Network) -> float:
    """Images per second of one device in plain training steps."""
    if arguments.images_per_second:
        return float(arguments.images_per_second)
    return float(arguments.peak * 1e12 * arguments.share / (PLAIN * network.operations))


def all_reduce(arguments: argparse.Namespace, network: Network, gpus: int) -> float:
    """Seconds a step: the gradients in fp32 through the slowest link, and the statistics of the BatchNorm layers."""
    if gpus == 1:
        return 0.0
    link = arguments.inside if gpus <= arguments.per_machine else arguments.between
    gradients = 2 * (gpus - 1) / gpus * 4 * network.parameters / (link * 1e9)
    return float(gradients + 2 * network.batch_norms * arguments.latency * 1e-6)


def plans(arguments: argparse.Namespace, params: Params, network: Network) -> Iterator[Plan]:
    """Each number of GPUs with the preset's batch, and with the preset's batch on each."""
    passes = PLAIN + EXTRA[str(params.objective["name"])]
    single = rate(arguments, network) * PLAIN / passes
    for gpus in arguments.gpus:
        for batch in dict.fromkeys((params.train.batch_size, params.train.batch_size * gpus)):
            steps = IMAGES[str(params.dataset["name"])] // batch * params.train.epochs
            yield Plan(gpus, batch, batch / gpus / single, all_reduce(arguments, network, gpus), steps)


def page(arguments: argparse.Namespace) -> Iterator[str]:
    """The table and what it was computed from, as Markdown."""
    params = parse(presets.read(arguments.preset))
    network, name = counted(params), str(params.dataset["name"])
    objective, single = str(params.objective["name"]), rate(arguments, network)
    told = (
        "measured" if arguments.images_per_second else f"assumed: {arguments.share:.0%} of {arguments.peak:g} TFLOP/s"
    )
    yield f"Preset {arguments.preset}: {network.operations / 1e9:.2f} GFLOP forwards an image, {network.parameters:,}"
    yield f"parameters, {network.batch_norms} BatchNorm layers, {IMAGES[name]:,} images, {params.train.epochs} epochs, "
    yield f"objective {objective}: {PLAIN + EXTRA[objective]} image passes an image instead of {PLAIN}."
    yield f"One device: {single:,.0f} images a second in plain steps ({told})."
    yield ""
    titles = ("GPUs", "batch, all", "images on each", "compute a step, ms", "all-reduce, ms", "steps", "hours", "cores")
    yield "| " + " | ".join(titles) + " |"
    yield "|---" * len(titles) + "|"
    for plan in plans(arguments, params, network):
        best, worst = plan.hours
        decoded = plan.batch / max(plan.compute, plan.network) * (2 if objective in ("cskd", "dlb") else 1)
        cells = (plan.gpus, f"{plan.batch:,}", plan.batch // plan.gpus, f"{plan.compute * 1e3:.1f}")
        cores = f"{decoded / arguments.per_core:,.0f}"
        more = (f"{plan.network * 1e3:.1f}", f"{plan.steps:,}", f"{best:.1f} to {worst:.1f}", cores)
        yield "| " + " | ".join(str(cell) for cell in (*cells, *more)) + " |"
    yield ""
    megabytes = 4 * network.parameters / 1e6
    yield f"Network: {megabytes:.0f} MB of gradients a step; each GPU sends and receives 2 (n - 1) / n times that."
    yield f"Memory of each GPU besides its images' graph: {4 * megabytes:.0f} MB (weights, gradients, momentum, mask)."
    rows = IMAGES[name] * CLASSES[name] * 2 / 1e9
    yield f"PS-KD's memory of predictions: {rows:.1f} GB in every process (images x classes in half precision)."


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="imagenet-resnet50")
    parser.add_argument("--images-per-second", type=float, help="of one GPU in plain steps, measured")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s stated for dense bf16 (default: H100, H200)")
    parser.add_argument("--share", type=float, default=0.07, help="of the peak that a training step reaches (assumed)")
    parser.add_argument(
        "--per-core", type=float, default=125.0, help="training crops a core decodes a second (measured)"
    )
    parser.add_argument("--inside", type=float, default=300.0, help="GB/s of one GPU within a machine (assumed)")
    parser.add_argument("--between", type=float, default=25.0, help="GB/s of one GPU between machines (assumed)")
    parser.add_argument("--per-machine", type=int, default=8)
    parser.add_argument("--latency", type=float, default=30.0, help="microseconds of one small all-reduce (assumed)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    print("\n".join(page(parser.parse_args())))


if __name__ == "__main__":
    main()
