"""What starting costs: importing, each stage around its work, and `dvc repro` where nothing is stale.

    python benchmarks/startup.py [--repeats 5] [--only-noop] [--write FILE]

import : a fresh interpreter, less an empty one's time.
stages : `dvc repro -s STAGE -f` of a copy of the project with next to no work to do (two images of each digit, one
    epoch, two scenes, no look-ahead), so that what is measured is DVC, interpreter, imports, checks and tracking. With
    the heavy packages that the stage's process had imported when it ended.
no-op : `dvc repro` when everything is up to date, against a pipeline of five stages that do nothing, with the same
    settings of DVC; in turns.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from epsd.project.params import override, read_yaml
from epsd.project.runtime import versions
from page import options, show

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("prepare", "prune", "train", "evaluate", "detect")
HEAVY = ("torch", "torchvision", "mlflow", "sqlalchemy", "pandas", "sklearn", "scipy", "matplotlib", "optuna", "PIL")
LITTLE = {
    "data.limit": 6,
    "prune.score.steps": 0,
    "prune.batch_size": 8,
    "prune.compare": False,
    "train.epochs": 1,
    "train.batch_size": 8,
    "evaluate.latency_repeats": 0,
    "voc.train": 2,
    "voc.validation": 1,
    "voc.test": 2,
    "detect.epochs": 1,
    "detect.batch_size": 1,
    "detect.pictures": 0,
}
WITNESS = """
import atexit, json, os, sys
def tell():
    heavy = [name for name in {heavy!r} if name in sys.modules]
    with open({path!r}, "w") as file:
        json.dump(heavy, file)
if os.environ.get("DVC_STAGE") and not os.environ.get("EPSD_WITNESS"):
    os.environ["EPSD_WITNESS"] = "1"
    atexit.register(tell)
"""
EMPTY = "stages:\n" + "".join(
    f"  s{n}:\n    cmd: touch out{n}\n    deps: [{f'out{n - 1}' if n else 'start'}]\n    outs: [out{n}]\n"
    for n in range(5)
)


def seconds(command: list[str], folder: Path, **environment: str) -> float:
    """Of one command, which must succeed."""
    return both(command, folder, **environment)[0]


def both(command: list[str], folder: Path, **environment: str) -> tuple[float, float]:
    """Seconds on the clock, and of the processor: the latter are less disturbed by other jobs on the machine."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the stages' `python` is this one
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    spent, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-800:]}{done.stderr[-800:]}")
    return spent, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def dvc(*arguments: str) -> list[str]:
    """DVC of this environment."""
    return [sys.executable, "-m", "dvc", *arguments]


def project(folder: Path) -> Path:
    """A copy of the project with next to no work in its params.yaml."""
    from ruamel.yaml import YAML

    for name in ("dvc.yaml", ".dvcignore"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    tree = read_yaml(ROOT / "params.yaml")
    for name, value in LITTLE.items():
        override(tree, name, value)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(tree, file)
    return initialised(folder)


def empty(folder: Path) -> Path:
    """Five stages that do nothing."""
    (folder / "dvc.yaml").write_text(EMPTY, encoding="utf-8")
    (folder / "start").touch()
    return initialised(folder)


def initialised(folder: Path) -> Path:
    """With the settings that this project gives DVC: no statistics sent home, no look for updates."""
    seconds(dvc("init", "--no-scm", "-q"), folder)
    settings = (ROOT / ".dvc" / "config").read_text(encoding="utf-8")  # its one section is [core]
    (folder / ".dvc" / "config").write_text(settings + "    no_scm = true\n", encoding="utf-8")
    return folder


def import_table(repeats: int) -> Iterator[str]:
    """A fresh interpreter that imports the package, and one that imports nothing."""
    times: dict[str, list[float]] = {"pass": [], "import epsd": [], "import torch": []}
    for _ in range(repeats):
        for code, found in times.items():
            found.append(seconds([sys.executable, "-c", code], ROOT))
    bare = statistics.median(times["pass"])
    yield "| `python -c ...` | seconds | above an empty interpreter |"
    yield "|---|---|---|"
    for code, found in times.items():
        middle = statistics.median(found)
        yield f"| {code} | {middle:.3f} | {middle - bare:.3f} |"


def stage_table(folder: Path, repeats: int) -> Iterator[str]:
    """Every stage with next to no work."""
    witness = folder / "witness"
    witness.mkdir()
    told = witness / "heavy.json"
    (witness / "sitecustomize.py").write_text(WITNESS.format(heavy=HEAVY, path=str(told)), encoding="utf-8")
    path = os.pathsep.join([str(witness), str(folder / "src")])
    environment = {"PYTHONPATH": path, "EPSD_COPY": str(folder / "src"), "EPSD_QUIET": "1"}
    seconds(dvc("repro"), folder, **environment)  # the first one also creates the store
    yield "| stage | seconds, all in | of the processor | heavy packages it has imported |"
    yield "|---|---|---|---|"
    for stage in STAGES:
        pairs = [both(dvc("repro", "-s", "-f", stage), folder, **environment) for _ in range(repeats)]
        times, cpu = zip(*pairs, strict=True)
        heavy = ", ".join(json.loads(told.read_text(encoding="utf-8"))) if told.exists() else "?"
        told.unlink(missing_ok=True)
        yield f"| {stage} | {statistics.median(times):.2f} | {statistics.median(cpu):.2f} | {heavy} |"


def noop_table(full: Path, bare: Path, repeats: int) -> Iterator[str]:
    """Nothing to do, here and in an empty pipeline."""
    for folder in (full, bare):
        seconds(dvc("repro"), folder, PYTHONPATH=str(folder / "src"), EPSD_COPY=str(folder / "src"), EPSD_QUIET="1")
    pairs = [(both(dvc("repro"), bare), both(dvc("repro"), full)) for _ in range(repeats)]
    yield "| `dvc repro` with nothing to do | seconds, all in | of the processor |"
    yield "|---|---|---|"
    for name, place in (("five empty stages", 0), ("this pipeline", 1)):
        times, cpu = zip(*(pair[place] for pair in pairs), strict=True)
        yield f"| {name} | {statistics.median(times):.2f} | {statistics.median(cpu):.2f} |"
    ratios = [[ours[kind] / theirs[kind] for theirs, ours in pairs] for kind in (0, 1)]
    told = [f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})" for found in ratios]
    yield f"| ratio, median (min-max) | {told[0]} | {told[1]} |"


def report(repeats: int, only_noop: bool) -> Iterator[str]:
    """The lines of the report."""
    info = versions()
    yield f"{info['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {info['python']},"
    yield f"commit {info.get('git.commit', '?')[:10]}; {repeats} repetitions, medians."
    yield ""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        full, bare = project(Path(one)), empty(Path(two))
        if not only_noop:
            yield from import_table(repeats)
            yield ""
            yield from stage_table(full, max(1, repeats // 2))
            yield ""
        yield from noop_table(full, bare, repeats)


def main() -> None:
    """Print the tables."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only-noop", action="store_true")
    arguments = parser.parse_args()
    show(report(arguments.repeats, arguments.only_noop), arguments.write)


if __name__ == "__main__":
    main()
