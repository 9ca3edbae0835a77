"""What studies have shown so far, finished or not: accuracy with paired tests, what of the masks is in effect, costs.

    python benchmarks/evidence.py .epsd/studies/high-sparsity-digits --against "random erk" epsd --write table.md

Reads the finished models that `epsd study` keeps under its state folder; several folders are one table, as of a study
that was gone on with by other code. The p of all comparisons are corrected by Holm together. Rows are in the order of
their mean, the best first.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from epsd.comparison.statistics import Difference, corrected, difference, summarise

RESULT = "epsd-cell-1"
COSTS = {
    "seconds": "cost/seconds",
    "image passes": "cost/image_passes",
    "pruning s": "time/prune",
    "sparsity in effect": "mask/effective_sparsity",
    "live channels": "mask/live_channels",
    "Gini": "mask/gini",
}
"""Heading -> metric, the mean of which is shown."""


class Row(NamedTuple):
    """A method under an objective at a sparsity: metrics by seed."""

    method: str
    objective: str
    sparsity: float
    seeds: dict[int, dict[str, float]]

    def values(self, metric: str) -> dict[int, float]:
        """By seed, of those that have it."""
        return {seed: figures[metric] for seed, figures in self.seeds.items() if metric in figures}


def results(folders: list[Path]) -> Iterator[dict[str, object]]:
    """Every finished model, the earlier ones first."""
    found = [json.loads(path.read_text()) for folder in folders for path in sorted((folder / "cells").glob("*.json"))]
    kept = [content["result"] for content in found if content.get("format") == RESULT]
    yield from sorted(kept, key=lambda result: result["began"])


def rows(folders: list[Path]) -> list[Row]:
    """One for each method, objective and sparsity; of two runs of a seed the later one counts."""
    grouped: dict[tuple[str, str, float], dict[int, dict[str, float]]] = {}
    for result in results(folders):
        params, tags, metrics = (dict(result[part]) for part in ("params", "tags", "metrics"))  # type: ignore[call-overload]
        sparsity = float(params["prune.sparsity"])
        method = str(tags["variant"] or params["prune.score.name"]) if sparsity else "dense"
        grouped.setdefault((method, params["objective.name"], sparsity), {})[int(params["seed"])] = metrics
    return [Row(*key, seeds) for key, seeds in grouped.items()]


Tests = dict[tuple[str, tuple[str, str, float]], Difference]
"""(baseline, row) -> how the row differs from it."""


def tests(table: list[Row], baselines: list[str], metric: str) -> Tests:
    """Each row against each baseline under the same objective and sparsity, corrected over all pairs that have a p."""
    known = {(row.method, row.objective, row.sparsity): row for row in table}
    found: Tests = {}
    for baseline, row in itertools.product(baselines, table):
        other = known.get((baseline, row.objective, row.sparsity))
        if other is not None and row.method != baseline:
            found[baseline, row[:3]] = difference(row.values(metric), other.values(metric))
    pairs = {key: (frozenset((key[0], key[1][0])), *key[1][1:]) for key in found}  # a baseline may be a row of another
    once = {pair: found[key] for key, pair in pairs.items()}
    level = {pair: one.corrected for pair, one in zip(once, corrected(list(once.values())), strict=True)}
    return {key: one._replace(corrected=level[pairs[key]]) for key, one in found.items()}


def shown(one: Difference | None) -> str:
    """`+0.0123 (p 0.012)`, p corrected; "" for the baseline itself."""
    if one is None:
        return ""
    if math.isnan(one.corrected):
        return f"{one.by:+.4f}"
    mark = "**" if one.corrected < 0.05 else ""
    chance = f"p {one.corrected:.3f}" if one.corrected >= 0.001 else "p < 0.001"
    return f"{mark}{one.by:+.4f}{mark} ({chance}{', unpaired' if one.test != 'paired' else ''})"


def written(table: list[Row], baselines: list[str], metric: str) -> str:
    """A Markdown table for each objective and sparsity, the best mean first."""
    known = tests(table, baselines, metric)
    groups = sorted({(row.objective, row.sparsity) for row in table})
    return "\n\n".join(
        group([row for row in table if (row.objective, row.sparsity) == key], baselines, known, metric)
        for key in groups
    )


def group(table: list[Row], baselines: list[str], known: Tests, metric: str) -> str:
    """One of these tables."""
    costs = {name: key for name, key in COSTS.items() if any(row.values(key) for row in table)}
    heads = ["method", "seeds", f"{metric}, mean ± sd", *(f"minus {name}" for name in baselines), *costs]
    lines = [f"### {table[0].objective}, sparsity {table[0].sparsity:g}", "", f"| {' | '.join(heads)} |"]
    lines.append("|---|" + "---:|" * (len(heads) - 1))
    for row in sorted(table, key=lambda row: -statistics.fmean(row.values(metric).values())):
        mean, deviation, count = summarise(list(row.values(metric).values()))
        spread = f" ± {deviation:.4f}" if count > 1 else ""
        paired = [shown(known.get((baseline, row[:3]))) for baseline in baselines]
        cells = [row.method, str(count), f"{mean:.4f}{spread}", *paired, *(_mean(row, key) for key in costs.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(row: Row, metric: str) -> str:
    values = list(row.values(metric).values())
    if not values:
        return ""
    mean = statistics.fmean(values)
    return f"{mean:,.0f}" if mean >= 1000 else f"{mean:.1f}" if mean >= 1 else f"{mean:.4f}"


def main() -> None:
    """Print the tables; `--write FILE` keeps them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="state folders of studies, .epsd/studies/NAME")
    parser.add_argument(
        "--against", nargs="+", default=["random erk"], help="methods that the others are tested against"
    )
    parser.add_argument("--metric", default="test/top1")
    parser.add_argument("--title", default="Studies so far")
    parser.add_argument("--note", nargs="*", default=[], help="lines to put under the title")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    table = [row for row in rows(arguments.folders) if row.values(arguments.metric)]
    if not table:
        parser.error(f"no finished model with {arguments.metric} in {', '.join(map(str, arguments.folders))}.")
    known = tests(table, arguments.against, arguments.metric)
    count = len({(frozenset((baseline, row[0])), *row[1:]) for baseline, row in known})
    head = [
        f"# {arguments.title}",
        "",
        *arguments.note,
        f"{sum(len(row.seeds) for row in table)} models. Two-sided t-tests paired over seeds; p by Holm's correction "
        f"over all {count} comparisons of this page. Bold: p below 0.05.",
        "",
    ]
    text = "\n".join([*head, written(table, arguments.against, arguments.metric), ""])
    print(text, end="")
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
