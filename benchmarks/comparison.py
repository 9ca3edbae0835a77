"""Scores side by side: prune and train each at each sparsity, objective and seed, read the test split once per model.

    python benchmarks/comparison.py --preset cifar10-quick --set train.epochs=5 --images cifar10.zip --out results.jsonl

Stops and goes on: every finished model is one line of `--out`, and a model that is there is not trained again. The
order is seed by seed, so that a table of all configurations exists early. Prints a Markdown table (mean ± standard
deviation over seeds of the last epoch's test accuracy, in percent) with the machine and the settings; `--write FILE`
keeps it.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ruamel.yaml import YAML

from epsd.compute.devices import Machine, pick_device
from epsd.compute.seeds import mix
from epsd.data.prepared import Prepared
from epsd.datasets import DATASETS
from epsd.evaluation import evaluate as evaluation
from epsd.pipeline.prune import pruned
from epsd.pipeline.train import trained
from epsd.preparing.write import prepare
from epsd.project import presets
from epsd.project.params import override, parse
from epsd.project.runtime import versions
from epsd.registry import choose
from page import of_preset, options, show

ROOT = Path(__file__).resolve().parent.parent
SCORES: dict[str, dict[str, Any]] = {
    "epsd": {"prune.score": {"name": "epsd"}},
    "epsd shuffled": {"prune.score": {"name": "epsd"}, "prune.control": "shuffled"},
    "epsd reinitialised": {"prune.score": {"name": "epsd"}, "prune.control": "reinitialised"},
    "epsd spread": {
        "prune.score": {"name": "epsd"},
        "prune.rounds": 5,
        "prune.scope": "erk",
        "prune.channel_cap": 1.5,
    },
    "prospr": {"prune.score": {"name": "prospr"}},
    "snip": {"prune.score": {"name": "snip"}},
    "grasp": {"prune.score": {"name": "grasp"}},
    "synflow": {"prune.score": {"name": "synflow"}, "prune.rounds": 100},
    "magnitude": {"prune.score": {"name": "magnitude"}},
    "random": {"prune.score": {"name": "random"}},
    "random erk": {"prune.score": {"name": "random", "distribution": "erk"}},
}


class Job(NamedTuple):
    """One model."""

    score: str
    objective: str
    sparsity: float
    seed: int


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """All models, seed by seed."""
    for seed in range(arguments.seeds):
        for objective, sparsity, score in itertools.product(
            arguments.objectives, arguments.sparsities, arguments.scores
        ):
            yield Job(score, objective, sparsity, seed)


def base(arguments: argparse.Namespace) -> dict[str, Any]:
    """The preset with the changes of the command line."""
    tree = presets.read(arguments.preset)
    if arguments.images:
        tree["dataset"] = {"name": "image_folder", "root": str(arguments.images.resolve()), "size": 32}
    for change in arguments.set:
        name, _, value = change.partition("=")
        override(tree, name, YAML(typ="safe").load(value))
    override(tree, "prune.compare", False)
    return tree


def data(tree: dict[str, Any], folder: Path) -> Prepared:
    """The images, prepared once for all models (split by seed 0, so that every model sees the same test split)."""
    params = parse(tree)
    dataset = choose(DATASETS, params.dataset, "dataset")
    prepare(dataset(), folder, seed=0, **params.data.model_dump(include={"validation", "test", "limit", "classes"}))
    return Prepared.load(folder, Machine(pick_device(params.device), workers=params.data.workers))


def result(tree: dict[str, Any], prepared: Prepared, job: Job) -> dict[str, Any]:
    """Prune, train, test."""
    for name, value in {
        **SCORES[job.score],
        "objective": tree["objective"] if job.objective == tree["objective"]["name"] else {"name": job.objective},
        "prune.sparsity": job.sparsity,
        "seed": job.seed,
    }.items():
        override(tree, name, value)
    params = parse(tree)
    start = time.perf_counter()
    found = pruned(params, prepared)
    middle = time.perf_counter()
    history = trained(params, prepared, found.model, found.mask, on_epoch=lambda record: None)
    end = time.perf_counter()
    test = prepared.batches("test", batch_size=params.evaluate.batch_size, seed=mix(params.seed, "test"))
    figures = evaluation.evaluate(found.model, test, ece_bins=params.evaluate.ece_bins).metrics
    return {
        **job._asdict(),
        "top1": figures["top1"],
        "ece": figures["ece"],
        "nll": figures["nll"],
        "validation": history[-1].get("val/top1"),
        "kept": found.mask.kept,
        "dead_layers": len(found.mask.dead_layers()),
        "score_seconds": middle - start,
        "train_seconds": end - middle,
    }


def finished(path: Path) -> dict[Job, dict[str, Any]]:
    """What `--out` holds. A line that was cut short by a kill is left out and trained again."""
    found: dict[Job, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            found[Job(*(row[name] for name in Job._fields))] = row
        except (ValueError, KeyError):
            continue
    return found


def table(arguments: argparse.Namespace, rows: dict[Job, dict[str, Any]]) -> Iterator[str]:
    """Markdown: scores down, objective and sparsity across."""
    info = versions()
    changes = ", ".join(arguments.set) or "none"
    yield (
        f"Preset {arguments.preset}, changes: {changes}. {info['cpu']}, {torch.get_num_threads()} threads, "
        f"{info.get('gpu', 'no GPU')}, torch {info['torch']}, commit {info.get('git.commit', '?')[:10]}."
    )
    yield "Last epoch, test top-1 in percent, mean ± standard deviation (number of seeds); seconds: mean of the row."
    yield ""
    columns = list(itertools.product(arguments.objectives, arguments.sparsities))
    yield "| score | " + " | ".join(f"{o}, {s:.0%}" for o, s in columns) + " | seconds to score | seconds to train |"
    yield "|---" * (len(columns) + 3) + "|"
    for score in arguments.scores:
        cells = [
            cell([row for job, row in rows.items() if job[:3] == (score, objective, sparsity)])
            for objective, sparsity in columns
        ]
        own = [row for job, row in rows.items() if job.score == score]
        seconds = [f"{statistics.mean(row[key] for row in own):.1f}" if own else "" for key in _SECONDS]
        yield f"| {score} | " + " | ".join(cells + seconds) + " |"


_SECONDS = ("score_seconds", "train_seconds")


def cell(rows: list[dict[str, Any]]) -> str:
    """Mean ± sd (n), and whether a layer lost all its weights."""
    if not rows:
        return ""
    values = [100 * row["top1"] for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    dead = ", dead layers" if any(row["dead_layers"] for row in rows) else ""
    return f"{statistics.mean(values):.2f}{spread} ({len(values)}{dead})"


def main() -> None:
    """Train what is missing, print the table."""
    parser = options(__doc__)
    of_preset(parser, "cifar10-quick")
    parser.add_argument("--scores", nargs="+", choices=list(SCORES), default=["epsd", "prospr", "snip", "random"])
    parser.add_argument("--objectives", nargs="+", default=["cskd"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.98, 0.9])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no model after this long")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per finished model")
    arguments = parser.parse_args()
    rows, started = finished(arguments.out), time.monotonic()
    waiting = [job for job in jobs(arguments) if job not in rows]
    if waiting:
        with tempfile.TemporaryDirectory() as folder:
            prepared = data(base(arguments), Path(folder))
            for job in waiting:
                if time.monotonic() - started > 60 * arguments.minutes:
                    break
                rows[job] = result(base(arguments), prepared, job)
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[job]) + "\n")
                print(f"{' '.join(map(str, job))}: {rows[job]['top1']:.4f}", flush=True)
    show(table(arguments, rows), arguments.write)


if __name__ == "__main__":
    main()
