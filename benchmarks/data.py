"""How fast batches are made: from memory against the training that waits for them, from files against decoding alone.

    python benchmarks/data.py [--threads 1] [--repeats 5] [--write FILE]

Memory: CIFAR-shaped images (50,000 of 3x32x32, uint8), pad-crop 4 and flip, batches of 128, plain, with a second view,
with a partner of the same class; against the training rate of ResNet-18 with the CIFAR stem on the same cores.
Files: JPEG photographs (256 of 500x375, as ImageNet's; 32 of 4000x3000, as a telephone's), random resized crop to 224
px and flip, batches of 32, one process; against reading and decoding the same files whole (by Pillow), and against the
least that such a crop takes: decoding as the batches do, one fixed crop of the usual size, one call to resize it
(nothing drawn, mirrored, normalised or collated). What is compared takes turns; median (min-max) of the rounds.
Freed memory is kept, as the stages keep it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import training
from epsd.compute.speed import keep_freed_memory
from epsd.data.in_memory import MemoryBatches, Pixels
from epsd.data.streaming import Augmentation, Pictures, StreamedBatches
from epsd.files.archives import open_tree
from epsd.files.images import decode, decode_planes
from epsd.files.layouts import Files, Reading
from epsd.objectives import OBJECTIVES
from epsd.project.runtime import versions
from epsd.types import Batches, BatchNeeds
from page import options, show

NEEDS = {
    "pad-crop, flip": BatchNeeds(),
    "and a second view": BatchNeeds(partner="view"),
    "and a partner": BatchNeeds(partner="same_class"),
}
CIFAR, SIDE = 50_000, 224
PHOTOGRAPHS = {(500, 375): 256, (4000, 3000): 32}


def in_memory() -> MemoryBatches:
    """A data set of CIFAR's size."""
    pixels = torch.randint(0, 256, (CIFAR, *training.SHAPE), dtype=torch.uint8)
    pixels_of = Pixels.of(pixels, 4)
    return MemoryBatches(
        pixels_of,
        torch.arange(CIFAR) % 10,
        num_classes=10,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        batch_size=128,
        flip=True,
        shuffle=True,
        drop_last=True,
    )


def rate(batches: Batches, needs: BatchNeeds, limit: int) -> float:
    """Images a second over the first `limit` batches of an epoch; what an epoch does once is counted in full."""
    start, images = time.perf_counter(), 0
    for number, batch in enumerate(batches.epoch(0, needs), start=1):
        images += len(batch.labels)
        if number == limit:
            break
    return images / (time.perf_counter() - start)


def photographs(folder: Path, size: tuple[int, int], count: int) -> list[str]:
    """Smooth random pictures, which compress and decode like photographs."""
    random = np.random.default_rng(0)
    names = []
    for number in range(count):
        coarse = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(picture + random.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
        names.append(f"{number}.jpg")
        Image.fromarray(noisy).save(folder / names[-1], quality=90)
    return names


def decoding(folder: Path, names: list[str]) -> float:
    """Images a second of reading and decoding."""
    tree = open_tree(folder)
    start = time.perf_counter()
    for name in names:
        decode(tree.read(name), name)
    return len(names) / (time.perf_counter() - start)


def cropping(folder: Path, names: list[str]) -> float:
    """Images a second of reading, decoding whole and resizing a crop of 58 % of the area (the mean of 8 to 100 %)."""
    tree = open_tree(folder)
    start = time.perf_counter()
    for name in names:
        picture = decode_planes(tree.read(name), name)
        down, across = (round(0.76 * length) for length in picture.shape[1:])
        F.interpolate(picture[None, :, :down, :across], (SIDE, SIDE), mode="bilinear", antialias=True)
    return len(names) / (time.perf_counter() - start)


def streamed(folder: Path, names: list[str]) -> StreamedBatches:
    """The same files as training batches."""
    pictures = Pictures(
        Files(open_tree(folder), names), Reading(size=SIDE, resize=256, grayscale=False), (3, SIDE, SIDE)
    )
    return StreamedBatches(
        pictures,
        torch.arange(len(names)) % 10,
        num_classes=10,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        batch_size=32,
        augmentation=Augmentation(flip=True),
        shuffle=True,
    )


def memory_table(repeats: int) -> Iterator[str]:
    """Batches from memory against training."""
    batches = in_memory()
    step = training.bare_step(training.drawn(128), "auto", OBJECTIVES["cross_entropy"]())
    step()
    rates: dict[str, list[float]] = {name: [] for name in NEEDS}
    trained, ratios = [], dict[str, list[float]]((name, []) for name in NEEDS)
    for _ in range(repeats):
        trained.append(128 / training.clock(step))
        for name, needs in NEEDS.items():
            rates[name].append(rate(batches, needs, len(batches)))
            ratios[name].append(rates[name][-1] / trained[-1])
    yield "| batches from memory | images a second | times the training rate |"
    yield "|---|---|---|"
    yield f"| (training, a plain step of ResNet-18) | {training.spread(trained, 0)} | 1 |"
    for name in NEEDS:
        yield f"| {name} | {training.spread(rates[name], 0)} | {training.spread(ratios[name], 0)} |"


def file_table(repeats: int) -> Iterator[str]:
    """Batches from files against decoding alone."""
    yield (
        "| from JPEG files | reading and decoding alone, images a second | decoding, crop and resize alone "
        "| training batches | % of decoding alone | % of decoding, crop and resize alone |"
    )
    yield "|---|---|---|---|---|---|"
    for size, count in PHOTOGRAPHS.items():
        yield file_row(size, count, repeats)


def file_row(size: tuple[int, int], count: int, repeats: int) -> str:
    """Photographs of one size."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = photographs(folder, size, count)
        batches = streamed(folder, names)
        calls: dict[str, Callable[[], float]] = {
            "reading and decoding alone": lambda: decoding(folder, names),
            "decoding, crop and resize alone": lambda: cropping(folder, names),
            "training batches": lambda: rate(batches, BatchNeeds(), len(batches)),
        }
        for call in calls.values():
            call()
        rates: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                rates[name].append(call())
    *alone, made = rates.values()
    shares = [[100 * b / a for a, b in zip(other, made, strict=True)] for other in alone]
    figures = " | ".join(training.spread(values, 0) for values in (*alone, made, *shares))
    return f"| {size[0]}x{size[1]} | {figures} |"


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of the report."""
    info = versions()
    yield f"{info['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {info['python']},"
    yield f"commit {info.get('git.commit', '?')[:10]}; {arguments.repeats} rounds."
    yield ""
    yield from memory_table(arguments.repeats)
    yield ""
    yield from file_table(arguments.repeats)


def main() -> None:
    """Print the tables."""
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    show(report(arguments), arguments.write)


if __name__ == "__main__":
    main()
