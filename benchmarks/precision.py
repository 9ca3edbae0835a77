"""Does training in bf16 cost accuracy? The same networks trained in fp32 and in bf16, several seeds, test top-1.

    python benchmarks/precision.py [--images cifar10.zip] [--preset cifar10-quick] [--set KEY=VALUE ...] [--seeds 3]

Mask and initial weights of a seed are the same for both. The first seed is trained in fp32 once more: weights must come
out the same, bit for bit. Prints a Markdown table; `--write FILE` keeps it.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import comparison
from epsd.data.prepared import Prepared
from epsd.evaluation import evaluate as evaluation
from epsd.pipeline.prune import pruned
from epsd.pipeline.train import trained
from epsd.project.params import override, parse
from epsd.project.runtime import versions
from page import of_preset, options, show

PRECISIONS = ("fp32", "bf16")


class Outcome(NamedTuple):
    """Of one training: accuracy [0, 1], seconds, digest of all weights and buffers."""

    top1: float
    seconds: float
    digest: str


def outcome(tree: dict[str, Any], prepared: Prepared, seed: int, precision: str) -> Outcome:
    """Prune, train, test."""
    override(tree, "seed", seed)
    override(tree, "train.precision", precision)
    params = parse(tree)
    found = pruned(params, prepared)
    start = time.perf_counter()
    trained(params, prepared, found.model, found.mask, on_epoch=lambda record: None)
    seconds = time.perf_counter() - start
    test = prepared.batches("test", batch_size=params.evaluate.batch_size)
    return Outcome(evaluation.evaluate(found.model, test).metrics["top1"], seconds, digest(found.model))


def digest(model: nn.Module) -> str:
    """Of every bit of the state."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of the report."""
    info = versions()
    tree = comparison.base(arguments)
    changes = ", ".join(arguments.set) or "none"
    yield f"{info['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {info['python']},"
    yield f"commit {info.get('git.commit', '?')[:10]}; preset {arguments.preset}, changes: {changes}."
    yield ""
    with tempfile.TemporaryDirectory() as folder:
        prepared = comparison.data(tree, Path(folder))
        rows = {
            (precision, seed): outcome(tree, prepared, seed, precision)
            for seed in range(arguments.seeds)
            for precision in PRECISIONS
        }
        again = outcome(tree, prepared, 0, "fp32")
    yield "| precision | " + " | ".join(f"seed {seed}" for seed in range(arguments.seeds)) + " | mean ± sd | seconds |"
    yield "|---" * (arguments.seeds + 3) + "|"
    for precision in PRECISIONS:
        own = [rows[precision, seed] for seed in range(arguments.seeds)]
        values = [100 * row.top1 for row in own]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        cells = [f"{value:.2f}" for value in values] + [f"{statistics.mean(values):.2f}{spread}"]
        yield f"| {precision} | " + " | ".join(cells) + f" | {statistics.median(row.seconds for row in own):.1f} |"
    yield ""
    same = again.digest == rows["fp32", 0].digest
    yield f"fp32, seed 0 once more: {'the same weights, bit for bit' if same else 'OTHER WEIGHTS'}."


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    of_preset(parser, "cifar10-quick")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    show(report(arguments), arguments.write)


if __name__ == "__main__":
    main()
