"""What a search gains on the shipped digits at 98 % sparsity, how long it takes, and whether its best trial holds.

    python benchmarks/tuning.py                          # three searches and their comparison, then the table
    python benchmarks/tuning.py --seeds 0 --only search  # one step: what is done already lies in --folder

Each search is `epsd tune` as a user runs it, in a folder of its own, timed from the command to its last line. Its
study seed decides the split into train, validation and test, the sampler and the seeds of the trials. Then the shipped
parameters and the best trial are trained on further repeats, whose seeds and validation splits the search has not used,
and compared pair by pair. The test split is not read.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from epsd.compute.devices import open_machine
from epsd.data.prepared import Prepared
from epsd.datasets import DATASETS
from epsd.engine.ledger import Ledger
from epsd.preparing.write import prepare
from epsd.project import artifacts
from epsd.project.artifacts import read_json, write_json
from epsd.project.params import Params, load, override, parse, read_yaml
from epsd.project.runtime import versions
from epsd.registry import choose
from epsd.tuning import judge, report
from epsd.tuning.space import Space
from epsd.tuning.study import open_storage

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tuning-digits.md"
FIRST = 3
"""Unseen seeds whose mean is reported by itself, beside that of all."""


def project(folder: Path, seed: int, changes: dict[str, Any]) -> Params:
    """A folder with the shipped params.yaml (and `seed`, `changes`), prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = read_yaml(ROOT / "params.yaml")
    for key, value in {**changes, "seed": seed}.items():
        override(tree, key, value)
    params = parse(tree)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(tree, file)
    (folder / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    dataset = choose(DATASETS, params.dataset, "dataset")
    shares = params.data.model_dump(include={"validation", "test", "limit", "classes"})
    prepare(dataset(), folder / artifacts.DATA, seed=seed, dataset=params.dataset, **shares)
    return params


def search(folder: Path, resume: bool = False) -> None:
    """Run `epsd tune` and keep its seconds on the wall and what it printed."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "epsd.cli", "tune", *(["--resume"] if resume else [])]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    write_json(folder / "search.json", {"seconds": time.perf_counter() - started, "printed": done.stdout})


def compare(folder: Path, fresh: int, processes: int) -> None:
    """Train the shipped parameters and the best trial on `fresh` seeds that the search has not used."""
    params = load(folder / "params.yaml")
    space, best = Space(params), found(folder, params)[1]
    threads = int(best.user_attrs["threads"])
    trees = {"shipped": space.tree(space.current()), "best trial": space.tree(best.params)}
    numbers = range(params.tune.repeats, params.tune.repeats + fresh)
    jobs = [(folder, title, tree, number, threads) for number in numbers for title, tree in trees.items()]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(train, jobs)


def found(folder: Path, params: Params) -> tuple[Ledger, Any]:
    """The study in `folder` and its best trial."""
    tune = params.tune.model_copy(update={"storage": str(folder / "mlruns" / "optuna.journal")})
    ledger = Ledger(open_storage(tune), tune.study)
    return ledger, report.chosen(ledger.study, None)


def place(folder: Path, title: str, number: int) -> Path:
    """Where the figures of one training lie."""
    return folder / f"{title.replace(' ', '-')}-{number}.json"


def train(folder: Path, title: str, tree: dict[str, Any], number: int, threads: int) -> None:
    """Figures of one training, unless they are there."""
    if place(folder, title, number).exists():
        return
    params = parse(tree)
    data = Prepared.load(folder / artifacts.DATA, open_machine(params.device, threads, params.data.workers))
    figures = judge.run(*judge.repeat(params, data, number), lambda record, figures: None)
    write_json(place(folder, title, number), figures)


def main() -> None:
    """Search, compare, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="study seeds: one search for each")
    parser.add_argument("--fresh", type=int, default=9, help="seeds of the comparison")
    parser.add_argument("--processes", type=int, default=2, help="of the comparison; a search has tune.workers")
    parser.add_argument("--folder", type=Path, default=ROOT / ".epsd" / "benchmark-tuning", help="keeps what is done")
    parser.add_argument("--only", choices=["search", "compare"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.epochs=3")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    changes = {key: YAML(typ="safe").load(value) for key, _, value in (entry.partition("=") for entry in arguments.set)}
    for seed in arguments.seeds:
        folder = arguments.folder.resolve() / f"seed-{seed}"
        if arguments.only != "compare" and not (folder / "search.json").exists():
            project(folder, seed, changes)
            search(folder)
        if arguments.only != "search":
            compare(folder, arguments.fresh, arguments.processes)
    if arguments.only != "search":
        text = page(arguments)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
        print(text)


def page(arguments: argparse.Namespace) -> str:
    """The results as Markdown."""
    parts = [section(arguments.folder.resolve() / f"seed-{seed}", seed, arguments.fresh) for seed in arguments.seeds]
    params = load(arguments.folder.resolve() / f"seed-{arguments.seeds[0]}" / "params.yaml")
    tune, here = params.tune, versions()
    sets = "".join(f" --set {entry}" for entry in arguments.set)
    rows = "\n".join(row for row, _ in parts)
    return f"""# `epsd tune` on the digits

`python benchmarks/tuning.py{sets}`: {tune.trials} trials of up to {tune.repeats} seeds each (sampler {tune.sampler}, \
pruner {tune.pruner}), {tune.workers} workers, {params.train.epochs} epochs, sparsity \
{tune.fixed.get("prune.sparsity", params.prune.sparsity):.0%}.
Machine: {here["cpu"]}; torch {here["torch"]}, Python {here["python"]}.

Best trial of each search against the shipped parameters at the same sparsity: validation top-1 after the last epoch,
on seeds (split, initial weights, order of batches) that the search has not used. ± is the standard error of the paired
difference. A search has its own study seed. The test split was not read.

| study seed | whole command | trials run to the end | trainings | gain on the {tune.repeats} seeds of the search | \
gain on {FIRST} unseen seeds | gain on {arguments.fresh} unseen seeds |
|---|---|---|---|---|---|---|
{rows}

{"".join(text for _, text in parts)}"""


def section(folder: Path, seed: int, fresh: int) -> tuple[str, str]:
    """One search as a line of the overview, and in full."""
    params = load(folder / "params.yaml")
    ledger, best = found(folder, params)
    first = report.current(ledger.study)
    assert first is not None  # tune.current_first
    told = read_json(folder / "search.json")
    trials = ledger.trials()
    complete = sum(trial.state.name == "COMPLETE" for trial in trials)
    trainings = sum(len(trial.user_attrs.get("repeats") or []) for trial in trials)
    numbers = range(params.tune.repeats, params.tune.repeats + fresh)
    rows = {
        title: [read_json(place(folder, title, number)) for number in numbers] for title in ("shipped", "best trial")
    }
    top1 = {title: [figures["val/top1"] for figures in row] for title, row in rows.items()}
    seen = [[figures["val/top1"] for figures in trial.user_attrs["repeats"]] for trial in (best, first)]
    gains = [
        gain(*seen),
        gain(top1["best trial"][:FIRST], top1["shipped"][:FIRST]),
        gain(top1["best trial"], top1["shipped"]),
    ]
    counts = [f"{told['seconds']:.0f} s", f"{complete} of {len(trials)}", str(trainings)]
    row = "| " + " | ".join([str(seed), *counts, *gains]) + " |"
    lines = [
        f"## Study seed {seed}",
        "",
        "| parameters | " + " | ".join(str(number) for number in numbers) + " | mean | nonzero parameters |",
        "|---" * (fresh + 3) + "|",
        *(
            f"| {title} | "
            + " | ".join(f"{value:.4f}" for value in values)
            + f" | **{statistics.mean(values):.4f}** | {rows[title][0]['model/parameters_nonzero']:,.0f} |"
            for title, values in top1.items()
        ),
    ]
    return row, "\n".join([*lines, "", "```", told["printed"].rstrip().replace(f"{folder}/", ""), "```", "", ""])


def gain(after: list[float], before: list[float]) -> str:
    """Mean paired difference and its standard error."""
    differences = [a - b for a, b in zip(after, before, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return f"{statistics.fmean(differences):+.4f} ± {error:.4f}"


if __name__ == "__main__":
    main()
