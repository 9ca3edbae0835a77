"""Peak memory of every preset: one scoring, three training steps and three of its detector, each in a process.

    python benchmarks/memory.py [--presets NAME ...] [--device cpu|cuda] [--sizes 8 16] [--whole] [--write FILE]

On random images of the preset's shape; the detector (`detect.batch_size` pictures with three objects each) on those
of its scenes, VOC's being 500x375. Scoring keeps no graphs, the least it takes: `prune.memory: auto` keeps as many as
there is room for. Scoring and training are run at two small batches; what they need grows evenly with the batch, so
the figure for the preset's own batch is the line through both. `--whole` runs the preset's own batch instead, where
half as much again as the line foresees is free; such figures have no `~`. On a CPU the peak is that of the process
(with Python and torch, 0.5 GB), on a GPU that of the allocator. `data`: images that are held in memory besides, and
PS-KD's soft targets; photographs are read from files. `estimated` is what the training step is expected to need
beforehand (`epsd.compute.shortage`), beside what it took.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import training
from epsd.architectures import ARCHITECTURES
from epsd.compute import shortage
from epsd.compute.devices import pick_precision
from epsd.compute.memory import free_bytes
from epsd.detection.fit import fit_detector
from epsd.detectors import DETECTORS, Picture
from epsd.objectives import OBJECTIVES
from epsd.project import presets
from epsd.project.params import Params, parse
from epsd.project.runtime import versions
from epsd.pruning.prune import prune
from epsd.registry import choose
from epsd.scores import SCORES
from epsd.training.fit import fit
from epsd.types import Batch
from epsd.voc.scenes import Scene
from page import options, show

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


class Shape(NamedTuple):
    """Of a data set: channels, height and width, classes, images that are held in memory (train, test), padding."""

    image: tuple[int, int, int]
    classes: int
    held: int


SHAPES = {
    "digits": Shape((1, 8, 8), 10, 1_797),
    "cifar": Shape((3, 32, 32), 10, 60_000),
    "cifar100": Shape((3, 32, 32), 100, 60_000),
    "tiny_imagenet": Shape((3, 64, 64), 200, 110_000),
    "cub": Shape((3, 224, 224), 200, 0),
    "imagenet": Shape((3, 224, 224), 1000, 0),
}


def shape_of(params: Params) -> Shape:
    """What the preset's data look like."""
    name = params.dataset["name"]
    return SHAPES["cifar100" if params.dataset.get("classes") == 100 else name]


def held(params: Params) -> float:
    """MiB of images in memory, padded for the crop, and of soft targets."""
    shape, padding = shape_of(params), 2 * params.data.crop_padding
    channels, height, width = shape.image
    pixels = shape.held * channels * (height + padding) * (width + padding)
    targets = 4 * shape.held * shape.classes if params.objective["name"] == "pskd" else 0
    return (pixels + targets) / MIB


def network(params: Params, device: str) -> nn.Module:
    """The preset's network."""
    torch.manual_seed(0)
    shape = shape_of(params)
    model: nn.Module = choose(ARCHITECTURES, params.architecture)(shape.classes, shape.image)
    return model.to(device)


def drawn(params: Params, size: int, device: str) -> Batch:
    """Random images with everything that an objective may need."""
    shape = shape_of(params)
    images, partner = (torch.randn(size, *shape.image, device=device) for _ in range(2))
    numbers = torch.arange(size, device=device)
    return Batch(images, numbers % shape.classes, numbers, partner)


def scored(params: Params, size: int, device: str) -> None:
    """One mask, as the stage computes it."""
    again = {"graphs_kept": 0} if params.prune.score["name"] in ("epsd", "prospr") else {}
    score, objective = choose(SCORES, params.prune.score | again), choose(OBJECTIVES, params.objective)
    batches = [drawn(params, size, device) for _ in range(4)]
    prune(network(params, device), batches, score=score, objective=objective, sparsity=params.prune.sparsity)


def trained(params: Params, size: int, device: str) -> None:
    """Three steps."""
    model = network(params, device)
    recipe = params.train.model_copy(update={"epochs": 1, "warmup_epochs": 0})
    objective = choose(OBJECTIVES, params.objective)
    source = training.Repeated(drawn(params, size, device), 3)
    fit(model, source, objective=objective, mask=training.half(model), recipe=recipe)


def detected(params: Params, size: int, device: str) -> None:
    """Three steps of the detector around the preset's network."""
    width, height = (500, 375) if params.voc["name"] == "devkit" else (params.voc["canvas"],) * 2
    shape, model = shape_of(params), network(params, device)
    nodes = choose(ARCHITECTURES, params.architecture).feature_nodes(model)
    picture = Picture(height, width, [0.5] * shape.image[0], [0.25] * shape.image[0])
    settings = params.detect
    detector = choose(DETECTORS, settings.detector)(model, nodes, picture, 20, settings.frozen_stages)
    recipe = settings.model_copy(update={"epochs": 1})
    with tempfile.TemporaryDirectory() as folder:
        scenes = [scene(Path(folder), number, width, height) for number in range(3 * size)]
        fit_detector(
            detector,
            scenes,
            recipe,
            channels=shape.image[0],
            device=device,
        )


def scene(folder: Path, number: int, width: int, height: int) -> Scene:
    """A picture of noise with three objects."""
    from PIL import Image

    path = folder / f"{number}.png"
    generator = np.random.default_rng(number)
    Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    boxes = np.array([[1, 1, width / 2, height / 2], [width / 3, 2, width - 1, height - 1], [5, 5, width / 4, height]])
    return Scene(f"{number}", path, width, height, boxes, np.arange(3), np.zeros(3, bool))


def estimated(params: Params, size: int, device: str) -> None:
    """Print what a training step is expected to need beyond the process and the network (MiB)."""
    model = network(params, device).to(memory_format=torch.channels_last)
    objective = choose(OBJECTIVES, params.objective)
    objective.begin("score", size, shape_of(params).classes)
    lower = pick_precision(params.train.precision, torch.device(device))

    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, lower, enabled=lower is not None):
            logits: torch.Tensor = model(images.contiguous(memory_format=torch.channels_last))
        return logits.float()

    found = shortage.need(model, lambda batch: objective.loss(forward, batch, 1.0), drawn(params, 4, device), 3)
    print(json.dumps(found.of(size) / MIB))


JOBS = {"score": scored, "train": trained, "detect": detected, "estimate": estimated}


def job(preset: str, kind: str, size: int, device: str) -> None:
    """One measurement, in a process of its own: prints MiB."""
    params = parse(presets.read(preset))
    if kind == "nothing":
        network(params, device)
    else:
        JOBS[kind](params, size, device)
    if kind != "estimate":
        print(json.dumps(peak(device)))


def peak(device: str) -> float:
    """MiB of this process, or of the allocator of the GPU, at its highest."""
    if device != "cpu":
        return int(torch.cuda.max_memory_allocated()) / MIB
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / (MIB if sys.platform == "darwin" else 2**10)


def measured(preset: str, kind: str, size: int, device: str) -> float:
    """MiB of one job."""
    command = [sys.executable, __file__, "--job", json.dumps([preset, kind, size, device])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{preset}, {kind}, {size} images: {done.stderr[-600:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def at(preset: str, kind: str, size: int, arguments: argparse.Namespace) -> str:
    """MiB at `size` images: measured, or (~) on the line through two smaller batches."""
    few, more = map(int, arguments.sizes)
    if size <= more:
        return f"{measured(preset, kind, size, arguments.device):,.0f}"
    low, high = (measured(preset, kind, count, arguments.device) for count in (few, more))
    foreseen = low + (high - low) / (more - few) * (size - few)
    if arguments.whole and 1.5 * foreseen * MIB < free_bytes(torch.device(arguments.device)):
        return f"{measured(preset, kind, size, arguments.device):,.0f}"
    return f"~{foreseen:,.0f}"


def rows(arguments: argparse.Namespace) -> Iterator[str]:
    """The table, one preset a line."""
    yield "| preset | batch (score, train, detect) | network alone | scoring | training | estimated | detector | data |"
    yield "|---|---|---|---|---|---|---|---|"
    for preset in arguments.presets:
        params = parse(presets.read(preset))
        sizes = params.prune.batch_size, params.train.batch_size, params.detect.batch_size
        alone = measured(preset, "nothing", 0, arguments.device)
        score, train = (
            at(preset, kind, size, arguments) for kind, size in zip(("score", "train"), sizes, strict=False)
        )
        guess = alone + measured(preset, "estimate", sizes[1], arguments.device)
        detector = measured(preset, "detect", sizes[2], arguments.device)
        figures = f"{alone:,.0f} | {score} | {train} | {guess:,.0f} | {detector:,.0f} | {held(params):,.0f}"
        yield f"| {preset} | {', '.join(map(str, sizes))} | {figures} |"


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of the report."""
    info = versions()
    how = f"measured, or (~) from batches of {arguments.sizes[0]} and {arguments.sizes[1]}"
    yield f"{info.get('gpu') if arguments.device != 'cpu' else info['cpu']}, torch {torch.__version__},"
    yield f"commit {info.get('git.commit', '?')[:10]}; MiB, {how}."
    yield ""
    yield from rows(arguments)


def main() -> None:
    """Print the table, or run one job of it."""
    parser = options(__doc__)
    parser.add_argument("--presets", nargs="+", default=presets.names())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", nargs=2, type=int, default=[8, 16])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job(*json.loads(arguments.job))
        return
    show(report(arguments), arguments.write)


if __name__ == "__main__":
    main()
