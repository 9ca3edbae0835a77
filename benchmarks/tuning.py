"""The search on the embedded digits: how long it takes, and whether its best trial beats the shipped parameters.

    python benchmarks/tuning.py            # about 6 minutes on two quiet cores; writes results/tuning-digits.md

Runs `epsd tune` as a user does, in a folder of its own, then trains the shipped parameters and the best trial with
several seeds (each with its own split, initial weights and order of batches) and compares validation accuracy. The
first seed is the one that the search saw; the others are new to it. The test split is not read.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from epsd import artifacts
from epsd.data import Prepared
from epsd.datasets import DATASETS
from epsd.params import Params, override, parse, read_yaml
from epsd.preparing import prepare
from epsd.registry import choose
from epsd.runtime import determinism, versions
from epsd.tuning import judge, report
from epsd.tuning.space import Space
from epsd.tuning.study import Ledger, open_storage

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tuning-digits.md"


def project(folder: Path, changes: dict[str, Any]) -> Params:
    """A folder with the shipped params.yaml (and `changes`), prepared."""
    from ruamel.yaml import YAML

    tree = read_yaml(ROOT / "params.yaml")
    for key, value in changes.items():
        override(tree, key, value)
    params = parse(tree)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(tree, file)
    (folder / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    return params


def prepared(params: Params, folder: Path) -> Prepared:
    """The data set of `params` in `folder`."""
    dataset = choose(DATASETS, params.dataset, "dataset")
    shares = {"validation": params.data.validation, "test": params.data.test}
    prepare(dataset(), folder, seed=params.seed, limit=params.data.limit, **shares)
    return Prepared.load(folder)


def searched(folder: Path, trials: int, workers: int) -> float:
    """Run `epsd tune`; its seconds on the wall, from the command to its last line."""
    command = [sys.executable, "-m", "epsd.tuning", "--trials", str(trials), "--workers", str(workers)]
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True)
    return time.perf_counter() - started


def judged(tree: dict[str, Any], seed: int, folder: Path) -> judge.Figures:
    """Figures of one training with another seed of everything."""
    params = parse({**tree, "seed": seed})
    data = prepared(params, folder / f"data-{seed}")
    return judge.run(params, data, lambda record, figures: None)


def main() -> None:
    """Search, compare, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.epochs=3, for a try"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    changes = {key: YAML(typ="safe").load(value) for key, _, value in (entry.partition("=") for entry in arguments.set)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        params = project(folder, changes)
        prepared(params, folder / artifacts.DATA)
        seconds = searched(folder, arguments.trials, arguments.workers)
        tune = params.tune.model_copy(update={"storage": str(folder / "mlruns" / "optuna.journal")})
        study = Ledger(open_storage(tune), tune.study).study
        best = report.chosen(study, None)
        table = report.table(study, list(tune.objectives))
        determinism()
        torch.set_num_threads(int(best.user_attrs["threads"]))
        space = Space(params)
        trees = {"shipped": space.tree(space.current()), "best trial": space.tree(best.params)}
        rows = {
            title: [judged(tree, params.seed + step, folder) for step in range(arguments.seeds)]
            for title, tree in trees.items()
        }
        text = page(params, arguments, seconds, study, rows, table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


def page(params: Params, arguments: argparse.Namespace, seconds: float, study: Any, rows: Any, table: str) -> str:
    """The results as Markdown."""
    found = versions()
    states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    seeds = [params.seed + step for step in range(arguments.seeds)]
    header = "| parameters | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | nonzero parameters |"
    lines = [header, "|---" * (len(seeds) + 3) + "|"]
    means = {}
    for title, figures in rows.items():
        top1 = [figure["val/top1"] for figure in figures]
        means[title] = statistics.mean(top1)
        cells = " | ".join(f"{value:.4f}" for value in top1)
        lines.append(f"| {title} | {cells} | **{means[title]:.4f}** | {figures[0]['model/parameters_nonzero']:,.0f} |")
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "fail") if state in states)
    gain = means["best trial"] - means["shipped"]
    return f"""# `epsd tune` on the digits

`python benchmarks/tuning.py{"".join(f" --set {entry}" for entry in arguments.set)}`: {arguments.trials} trials \
(sampler {params.tune.sampler}, pruner {params.tune.pruner}), {arguments.workers} workers, \
{params.train.epochs} epochs, sparsity {params.tune.fixed.get("prune.sparsity", params.prune.sparsity):.0%}.
Machine: {found["cpu"]}; torch {found["torch"]}, Python {found["python"]}.

- Time of the whole command: **{seconds:.0f} s** ({counts}).
- Best trial against the shipped parameters at the same sparsity, validation top-1, mean of {len(seeds)} seeds: \
**{gain:+.4f}**.

{chr(10).join(lines)}

Every seed has its own split, initial weights and order of batches; the search saw seed {seeds[0]} only. Each value is
the accuracy after the last epoch. The test split was not read.

```
{table}
```
"""


if __name__ == "__main__":
    main()
