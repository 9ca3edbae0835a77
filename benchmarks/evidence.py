"""What studies have shown so far, finished or not: accuracy with paired tests, what of the masks is in effect, costs.

    python benchmarks/evidence.py .epsd/studies/high-sparsity-digits --against "random erk" epsd --write table.md
    python benchmarks/evidence.py models.csv .epsd/studies/high-sparsity-digits --keep models.csv

Reads the finished models that `epsd study` keeps under its state folder, and those that `--keep` has written: several
places are one table, as of a study that was gone on with by other code or on another machine. The p of all comparisons
are corrected by Holm together. Rows are in the order of their mean, the best first.

    python benchmarks/evidence.py models.csv --across cross_entropy     # the objectives against one of them, instead
"""

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

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
IDENTITY = ("method", "objective", "sparsity", "seed")
KEPT = [*IDENTITY, "processor", "began", "test/top1", "test/nll", "test/ece", *COSTS.values()]
"""What of a model a file of `--keep` has."""


class Row(NamedTuple):
    """A method under an objective at a sparsity: metrics by seed."""

    method: str
    objective: str
    sparsity: float
    seeds: dict[int, dict[str, float]]

    def values(self, metric: str) -> dict[int, float]:
        """By seed, of those that have it."""
        return {seed: figures[metric] for seed, figures in self.seeds.items() if metric in figures}


def models(places: list[Path]) -> pd.DataFrame:
    """A line for each finished model: IDENTITY, processor, when it began, metrics. Of two runs the later counts."""
    frames = [pd.read_csv(place) if place.suffix == ".csv" else _finished(place) for place in places]
    found = pd.concat(frames).sort_values("began", kind="stable") if frames else pd.DataFrame()
    return found.drop_duplicates(list(IDENTITY), keep="last") if len(found) else found


def _finished(folder: Path) -> pd.DataFrame:
    found = []
    for path in sorted((folder / "cells").glob("*.json")):
        content = json.loads(path.read_text())
        if content.get("format") != RESULT:
            continue
        params, tags, metrics = (content["result"][part] for part in ("params", "tags", "metrics"))
        sparsity = float(params["prune.sparsity"])
        method = (tags["variant"] or params["prune.score.name"]) if sparsity else "dense"
        key = (method, params["objective.name"], sparsity, int(params["seed"]))
        rest = {"began": content["result"]["began"], "processor": tags.get("versions.cpu", "")}
        found.append(dict(zip(IDENTITY, key, strict=True)) | rest | metrics)
    return pd.DataFrame(found)


def rows(table: pd.DataFrame) -> list[Row]:
    """One for each method, objective and sparsity."""
    found: dict[Any, dict[int, Any]] = {}
    for key, part in table.groupby(list(IDENTITY[:3]), sort=False):
        figures = part.set_index("seed").select_dtypes("number")
        found[key] = {int(str(seed)): dict(line.dropna().items()) for seed, line in figures.iterrows()}
    return [Row(method, objective, sparsity, seeds) for (method, objective, sparsity), seeds in found.items()]


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


def across(table: list[Row], base: str, metric: str) -> tuple[str, int]:
    """A Markdown table for each sparsity: each method under objective `base`, what the others change; how many tests.

    Under the methods stands the mean of those that ran under every objective of the sparsity, seed by seed.
    """
    values = {row[:3]: row.values(metric) for row in table}
    for sparsity in sorted({key[2] for key in values}):
        at = {key[:2]: one for key, one in values.items() if key[2] == sparsity}
        objectives = {objective for _, objective in at}
        whole = [name for name in {name for name, _ in at} if all((name, one) in at for one in objectives)]
        if len(whole) > 1:
            for objective in objectives:
                shared = set.intersection(*(set(at[name, objective]) for name in whole))
                mean = {seed: statistics.fmean(at[name, objective][seed] for name in whole) for seed in sorted(shared)}
                values[f"mean of {len(whole)}", objective, sparsity] = mean
    changes = {
        key: difference(one, values[key[0], base, key[2]])
        for key, one in values.items()
        if key[1] != base and (key[0], base, key[2]) in values
    }
    known = dict(zip(changes, corrected(list(changes.values())), strict=True))
    others = sorted({key[1] for key in known})
    parts = []
    for sparsity in sorted({key[2] for key in known}):
        names = {key[0] for key in known if key[2] == sparsity}
        lines = [f"### Sparsity {sparsity:g}", "", f"| method | {base} | {' | '.join(others)} |"]
        lines.append("|---|---:|" + "---:|" * len(others))
        ranked = sorted(names, key=lambda name: -statistics.fmean(values[name, base, sparsity].values()))
        for name in sorted(ranked, key=lambda name: name.startswith("mean of ")):
            level = statistics.fmean(values[name, base, sparsity].values())
            cells = [_with_seeds(known.get((name, objective, sparsity))) for objective in others]
            lines.append(f"| {name} | {level:.4f} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts), len(known)


def _with_seeds(one: Difference | None) -> str:
    return f"{shown(one)[:-1]}, {one.seeds})" if one and not math.isnan(one.corrected) else shown(one)


def _mean(row: Row, metric: str) -> str:
    values = list(row.values(metric).values())
    if not values:
        return ""
    mean = statistics.fmean(values)
    return f"{mean:,.0f}" if mean >= 1000 else f"{mean:.1f}" if mean >= 1 else f"{mean:.4f}"


def main() -> None:
    """Print the tables; `--write FILE` keeps them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("places", nargs="+", type=Path, help="state folders of studies, .epsd/studies/NAME; CSV files")
    parser.add_argument(
        "--against", nargs="+", default=["random erk"], help="methods that the others are tested against"
    )
    parser.add_argument("--across", metavar="OBJECTIVE", help="compare objectives with this one instead of methods")
    parser.add_argument("--metric", default="test/top1")
    parser.add_argument("--title", default="Studies so far")
    parser.add_argument("--note", nargs="*", default=[], help="lines to put under the title")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--keep", type=Path, help="CSV file that gets every model of the table")
    arguments = parser.parse_args()
    found = models(arguments.places)
    table = [row for row in rows(found) if row.values(arguments.metric)] if len(found) else []
    if not table:
        parser.error(f"no finished model with {arguments.metric} in {', '.join(map(str, arguments.places))}.")
    if arguments.keep:
        lines = found.reindex(columns=KEPT).dropna(axis="columns", how="all").sort_values(list(IDENTITY))
        lines.to_csv(arguments.keep, index=False, float_format="%.10g")
    if arguments.across:
        body, count = across(table, arguments.across, arguments.metric)
        if not count:
            parser.error(f"no method has models under {arguments.across} and under another objective.")
    else:
        known = tests(table, arguments.against, arguments.metric)
        count = len({(frozenset((baseline, row[0])), *row[1:]) for baseline, row in known})
        body = written(table, arguments.against, arguments.metric)
    head = [
        f"# {arguments.title}",
        "",
        *arguments.note,
        f"{sum(len(row.seeds) for row in table)} models. Two-sided t-tests paired over seeds; p by Holm's correction "
        f"over all {count} comparisons of this page. Bold: p below 0.05.",
        "",
    ]
    text = "\n".join([*head, body, ""])
    print(text, end="")
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
