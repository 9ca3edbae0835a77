"""What it costs that a stage compares the digests of all that it reads.

    python benchmarks/digests.py [--mb 100] [--repeats 5] [--write FILE]

Weights: a safetensors file, with and without its digest compared. Arrays: the file of a prepared split. JSON: the list
of files of a streamed split. Image files: 256 JPEG photographs of 500x375, of which the digest is taken after each is
read. Median (min-max) of the rounds; the files are in the memory of the system, as after the stage that wrote them.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from data import photographs
from epsd.files import digests
from epsd.files.images import decode_planes
from epsd.project import artifacts
from epsd.project.runtime import versions
from page import options, show

MB = 1_000_000


def timed(work: Callable[[], object], repeats: int) -> str:
    """Milliseconds."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(1000 * (time.perf_counter() - began))
    return f"{statistics.median(found):.0f} ({min(found):.0f}-{max(found):.0f})"


def rows(folder: Path, size: int, repeats: int) -> Iterator[tuple[str, str, str]]:
    """What, milliseconds with the digest compared, milliseconds of reading alone."""
    weights, images, listed = (folder / name for name in ("w.safetensors", "images.npy", "files.json"))
    layers = {f"layer{number}": torch.randn(size // 40) for number in range(10)}
    digests.save_tensors(weights, "weights", layers, {})
    compared = timed(lambda: digests.load_tensors(weights, "weights"), repeats)
    yield f"weights, {size / MB:g} MB", compared, timed(lambda: load_file(weights), repeats)

    np.save(images, np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    wanted = digests.digest_of(images)
    compared = timed(lambda: digests.check(images, wanted), repeats)
    yield f"images of a split, {size / MB:g} MB", compared, "mapped, not read"

    names = [f"train/n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG" for number in range(size // 50)]
    artifacts.write_json(listed, {"files": names, "digests": ["0123abcd"] * len(names)})
    compared = timed(lambda: artifacts.read_json(listed), repeats)
    alone = timed(lambda: json.loads(listed.read_bytes()), repeats)
    yield f"JSON: a list of {len(names):,} files, {listed.stat().st_size / MB:.0f} MB", compared, alone

    contents = [(folder / name).read_bytes() for name in photographs(folder, (500, 375), 256)]
    compared = timed(lambda: [digests.digest([content]) for content in contents], repeats)
    alone = timed(lambda: [decode_planes(content, "photograph") for content in contents], repeats)
    volume = sum(map(len, contents)) / MB
    yield f"256 photographs, {volume:.0f} MB: the digests alone, beside decoding", compared, alone


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """The table in Markdown, line by line."""
    found = versions()
    yield "# What the digests cost that a stage compares"
    yield ""
    yield f"`python benchmarks/digests.py --mb {arguments.mb} --repeats {arguments.repeats}`"
    yield ""
    yield f"{found['cpu']}, {arguments.threads} thread, torch {found['torch']}, Python {found['python']}."
    yield ""
    yield "| read | ms, digest compared | ms, reading alone |"
    yield "|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder), arguments.mb * MB, arguments.repeats):
            yield f"| {' | '.join(row)} |"


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    show(report(arguments), arguments.write)


if __name__ == "__main__":
    main()
