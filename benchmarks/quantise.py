"""When does training with rounded weights pay? The same network trained in full precision and with `train.quantise`,
each as the int8 file that is deployed, beside full-precision weights rounded afterwards.

    python benchmarks/quantise.py [--images cifar10.zip] [--preset digits] [--set KEY=VALUE ...] [--sparsities 0 0.95]
        [--seeds 5] --out results.jsonl [--write FILE]

Mask, initial weights and batches of a seed are the same for all rows. Stops and goes on: a model that `--out` has is
not trained again. Prints a Markdown table.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import comparison
from epsd.data.prepared import Prepared
from epsd.evaluation import evaluate as evaluation
from epsd.pipeline import deploy
from epsd.pipeline.prune import pruned
from epsd.pipeline.train import card, trained
from epsd.project import artifacts
from epsd.project.params import Params, override, parse
from epsd.project.runtime import versions

LATER = "half"
ROWS: dict[str, tuple[dict[str, Any] | None, int]] = {
    "full precision, rounded to 8 bits": (None, 8),
    "full precision, rounded to 4 bits": (None, 4),
    "trained with 8 bits": ({"bits": 8}, 8),
    "trained with 4 bits": ({"bits": 4}, 4),
    "trained with 4 bits from half of the epochs on": ({"bits": 4, "from_epoch": LATER}, 4),
}
"""What a reader is told -> `train.quantise`, and bits of the file's weights."""

Row = dict[str, Any]


def settings(quantise: dict[str, Any] | None, epochs: int) -> dict[str, Any] | None:
    """`LATER` as a number."""
    return quantise and {key: epochs // 2 if value == LATER else value for key, value in quantise.items()}


def outcomes(tree: dict[str, Any], data: Prepared, sparsity: float, seed: int, names: list[str]) -> Iterator[Row]:
    """Prune; train in one way; test each file that is made of it."""
    override(tree, "seed", seed)
    override(tree, "prune.sparsity", sparsity)
    override(tree, "train.quantise", settings(ROWS[names[0]][0], tree["train"]["epochs"]))
    params = parse(tree)
    found = pruned(params, data)
    start = time.perf_counter()
    trained(params, data, found.model, found.mask, on_epoch=lambda record: None)
    seconds = time.perf_counter() - start
    about = card(params, data, found.mask, found.model)
    for name in names:
        figures = tested(params, data, found.model, about | {"weight_bits": ROWS[name][1]})
        yield {"row": name, "sparsity": sparsity, "seed": seed, "seconds": seconds, **figures}


def tested(params: Params, data: Prepared, model: torch.nn.Module, about: dict[str, Any]) -> dict[str, float]:
    """Top-1 of torch and of the int8 file on test, how often they agree, bytes of the files."""
    export = params.evaluate.export.model_copy(update={"int8": True})
    evaluate = params.evaluate.model_copy(update={"latency_repeats": 0, "export": export})
    answers = evaluation.predict(model, data.batches("test", batch_size=evaluate.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.safetensors"
        artifacts.save_model(model, weights, about)
        subject = deploy.Subject(model, about, weights, data, answers)
        figures = deploy.deployed(subject, evaluate, Path(folder)).figures["deploy"]
    return {"torch_top1": float((answers[0].argmax(1) == answers[1]).double().mean()), **figures}


def finished(path: Path) -> list[Row]:
    """What `--out` holds."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def todo(arguments: argparse.Namespace, done: list[Row]) -> Iterator[tuple[int, float, list[str]]]:
    """Seed, sparsity and the rows of one training, for those that are not done; seed by seed."""
    have = {(row["seed"], row["sparsity"], row["row"]) for row in done}
    ways = [list(names) for _, names in itertools.groupby(ROWS, key=lambda name: ROWS[name][0])]
    for seed, sparsity, names in itertools.product(range(arguments.seeds), arguments.sparsities, ways):
        if not all((seed, sparsity, name) in have for name in names):
            yield seed, sparsity, names


def table(arguments: argparse.Namespace, rows: list[Row]) -> Iterator[str]:
    """Markdown: for each sparsity the rows, in percent, mean ± standard deviation over seeds."""
    info, changes = versions(), ", ".join(arguments.set) or "none"
    yield f"Preset {arguments.preset}, changes: {changes}. {info['cpu']}, {torch.get_num_threads()} threads,"
    yield f"torch {info['torch']}, commit {info.get('git.commit', '?')[:10]}."
    for sparsity in arguments.sparsities:
        own = [row for row in rows if row["sparsity"] == sparsity]
        yield from ("", f"**{sparsity:.0%} of the weights removed**" if sparsity else "**dense**", "")
        yield "| | seeds | torch, test top-1 | file, test top-1 | they agree | file, bytes | fp32 file | seconds |"
        yield "|---|---:|---:|---:|---:|---:|---:|---:|"
        for name in ROWS:
            if found := [row for row in own if row["row"] == name]:
                yield line(name, found)


def line(name: str, found: list[Row]) -> str:
    """A row over its seeds."""
    shares = [cell([100 * row[key] for row in found]) for key in ("torch_top1", "int8_top1", "int8_agreement")]
    sizes = [f"{statistics.mean(row[key] for row in found):,.0f}" for key in ("int8_bytes", "onnx_bytes")]
    seconds = f"{statistics.median(row['seconds'] for row in found):.0f}"
    return f"| {name} | {len(found)} | " + " | ".join([*shares, *sizes, seconds]) + " |"


def cell(values: list[float]) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--images", type=Path, help="folder or archive of images instead of the preset's data set")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the preset")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.95, 0.0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per file that was tested")
    parser.add_argument("--write", type=Path, help="file for the table")
    arguments = parser.parse_args()
    rows = finished(arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        waiting = list(todo(arguments, rows))
        data = comparison.data(comparison.base(arguments), Path(folder)) if waiting else None
        for seed, sparsity, names in waiting:
            assert data is not None
            for row in outcomes(comparison.base(arguments), data, sparsity, seed, names):
                rows.append(row)
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"seed {seed}, {sparsity:.0%}, {row['row']}: {row['int8_top1']:.4f}", flush=True)
    lines = list(table(arguments, rows))
    print("\n".join(lines))
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
