"""What many trainings cost beside the trainings: a study of 57 tiny cells, and a search of 20 trials.

    python benchmarks/engine.py [--repeats 3] [--before FOLDER] [--write FILE]

Each run is one `epsd study` or `epsd tune` in a fresh project: twelve images of each digit, one epoch, one thread.
beside : processor seconds of all processes, less those of all trainings (`cost/seconds`, as MLflow has them): what
    other jobs on the machine disturb least. The trainings' clock is set to processor time for that.
clock : seconds of the whole command, trainings included.
--before : the folder of another version (`src`, `stages`, `presets`, `params.yaml`), measured in turns with this one.
"""

import itertools
import os
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from epsd.project.params import override, read_yaml
from epsd.project.runtime import versions
from page import options, show

ROOT = Path(__file__).resolve().parent.parent
CELLS, TRIALS = 57, 20
TINY: dict[str, Any] = {
    "data.limit": 12, "architecture.width": 0.25, "train.epochs": 1, "train.warmup_epochs": 0, "train.batch_size": 32,
    "prune.batch_size": 32, "prune.compare": False, "evaluate.latency_repeats": 0, "threads": 1, "device": "cpu",
    "voc.train": 1, "voc.validation": 0, "voc.test": 1,
}  # fmt: skip
SEARCH: dict[str, Any] = {"tune.trials": TRIALS, "tune.repeats": 1, "tune.pruner": "none"}
CLOCK = "import time\ntime.perf_counter = time.process_time\n"
Kind = Callable[[Path, Path, int], list[str]]


def project(root: Path, folder: Path, changes: dict[str, Any]) -> None:
    """Make `folder` one with the params.yaml of the version in `root`, changed."""
    tree = read_yaml(root / "params.yaml")
    for name, value in changes.items():
        override(tree, name, value)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(tree, file)
    (folder / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")


def study(root: Path, folder: Path, workers: int) -> list[str]:
    """The grid of the shipped study `digits` with tiny cells; the command that trains it."""
    project(root, folder, {})
    content = read_yaml(root / "presets" / "studies" / "digits.yaml")
    content |= {"base": "params.yaml", "set": TINY}
    with (folder / "digits.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(content, file)
    return ["study", "digits.yaml", "--workers", str(workers)]


def search(root: Path, folder: Path, workers: int) -> list[str]:
    """Tiny prepared digits; the command that searches."""
    project(root, folder, {**TINY, **SEARCH})
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    subprocess.run([sys.executable, root / "stages" / "prepare.py"], cwd=folder, env=environment, check=True)
    return ["tune", "--workers", str(workers)]


def trainings(folder: Path, expected: int) -> float:
    """Seconds of all of them, from the finished runs below the first one."""
    query = """SELECT r.run_uuid, MAX(m.value) FROM runs r JOIN metrics m ON m.run_uuid = r.run_uuid
               WHERE m.key = 'cost/seconds' AND r.status = 'FINISHED' GROUP BY r.run_uuid"""
    with sqlite3.connect(folder / "mlflow.db") as link:
        found = [float(seconds) for _, seconds in link.execute(query)]
    if len(found) > expected or len(found) < expected - 2:  # equal trials of a search are run once
        raise SystemExit(f"{len(found)} trainings instead of {expected}")
    return sum(found)


def measured(kind: Kind, workers: int, root: Path) -> tuple[float, float]:
    """(beside, clock) of one run with the version in `root`."""
    folder = Path(tempfile.mkdtemp(prefix="engine-"))
    try:
        command = [sys.executable, "-m", "epsd.cli", *kind(root, folder, workers), "--quiet"]
        (folder / "clock").mkdir()
        (folder / "clock" / "sitecustomize.py").write_text(CLOCK, encoding="utf-8")
        kept = {name: value for name, value in os.environ.items() if name not in ("DVC_ROOT", "MLFLOW_TRACKING_URI")}
        path = os.pathsep.join([str(folder / "clock"), str(root / "src")])
        environment = {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return processor - trainings(folder, CELLS if kind is study else TRIALS), clock
    finally:
        shutil.rmtree(folder)


def table(repeats: int, sources: dict[str, Path]) -> Iterator[str]:
    """One line for each kind of work, number of workers, and version; medians, the versions in turns."""
    yield "| work | workers | version | beside the trainings, s | on the clock, s |"
    yield "|---|---|---|---|---|"
    works: tuple[tuple[str, Kind], ...] = ((f"study of {CELLS} cells", study), (f"search of {TRIALS} trials", search))
    for (what, kind), workers in itertools.product(works, (1, 2)):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
        for _ in range(repeats):
            for name, source in sources.items():
                found[name].append(measured(kind, workers, source))
        for name, pairs in found.items():
            columns = [
                f"{statistics.median(of):.1f} ({min(of):.1f} to {max(of):.1f})" for of in zip(*pairs, strict=True)
            ]
            yield f"| {what} | {workers} | {name} | {' | '.join(columns)} |"


def main() -> None:
    """Print, and write where asked."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", type=Path, help="the folder of another version")
    arguments = parser.parse_args()
    sources = {"before": arguments.before.resolve()} if arguments.before else {}
    info = versions()
    head = [
        "# What many trainings cost beside the trainings",
        "",
        f"`python benchmarks/engine.py --repeats {arguments.repeats}`: {info['cpu']}, torch {torch.__version__},",
        f"Python {info['python']}; medians (smallest to largest) of {arguments.repeats}.",
        "",
    ]
    show(itertools.chain(head, table(arguments.repeats, {**sources, "now": ROOT})), arguments.write)


if __name__ == "__main__":
    main()
