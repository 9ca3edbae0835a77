"""What came of a study of narrow networks.

    python benchmarks/channels.py .epsd/studies/channels-digits [--write FILE]

Accuracy and size of the methods of presets/studies/channels-*.yaml, as far as they are trained.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from epsd.comparison.statistics import Difference, corrected, difference, summarise
from epsd.project.runtime import versions


class Row(NamedTuple):
    """A method of the study: its finished models, as `epsd study` keeps them."""

    name: str
    results: list[dict[str, Any]]

    def top1(self) -> dict[int, float]:
        """By seed."""
        return {int(one["params"]["seed"]): one["metrics"]["test/top1"] for one in self.results}

    def mean(self, metric: str) -> float:
        """Over the seeds."""
        return statistics.fmean(one["metrics"][metric] for one in self.results)


def rows(folder: Path) -> list[Row]:
    """In the order of the study file. Of two runs of a seed the later one counts."""
    kept = [json.loads(path.read_text())["result"] for path in (folder / "cells").glob("*.json")]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for result in sorted(kept, key=lambda result: result["began"]):
        found.setdefault(result["tags"]["variant"] or "dense", {})[result["params"]["seed"]] = result
    return [Row(name, list(seeds.values())) for name, seeds in found.items()]


def study(folder: Path) -> Iterator[str]:
    """A table of a study such as presets/studies/channels-digits.yaml: dense, then methods at three shares each."""
    table = rows(folder)
    dense = table[0]
    others = {row.name: table[place] for row in table if (place := _width_at(table, row)) >= 0}
    pairs = {name: difference(row.top1(), others[name].top1()) for row in table if (name := row.name) in others}
    tested = dict(zip(pairs, corrected(list(pairs.values())), strict=True))
    yield f"{sum(len(row.results) for row in table)} models. {_DEFINED}"
    yield ""
    heads = ("", "multiply-adds", "parameters not zero", "seeds", "test top-1")
    yield f"| {' | '.join((*heads, 'minus its width row'))} |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in table:
        mean, deviation, count = summarise(list(row.top1().values()))
        spread = f" ± {deviation:.4f}" if count > 1 else ""
        share = row.mean("model/gflops_dense") / dense.mean("model/gflops_dense")
        yield (
            f"| {row.name} | {share:.1%} | {row.mean('model/parameters_nonzero'):,.0f} "
            f"| {count} | {mean:.4f}{spread} | {shown(tested[row.name]) if row.name in tested else ''} |"
        )


_DEFINED = (
    "p: two-sided t-test paired over seeds, Holm-corrected over all differences of the table. Equal latency: zeros "
    "make nothing faster, so what is unstructured and as fast is the network of the author's width whose ONNX latency "
    "is nearest that of the uniform one, with half of its weights zero."
)


def _width_at(table: list[Row], row: Row) -> int:
    """The place of the author's width at the row's share; -1 for that row itself and for the dense network.

    Rows come by threes, the shares falling; the author's widths are the rows whose name is `width` and a number.
    """
    place = table.index(row)
    widths_ = [n for n, other in enumerate(table) if other.name.startswith("width ") and "zeros" not in other.name]
    return -1 if place == 0 or place in widths_ else widths_[(place - 1) % 3]


def shown(one: Difference) -> str:
    """`+0.0123 (p 0.012)`, p corrected."""
    return f"{one.by:+.4f}" if math.isnan(one.corrected) else f"{one.by:+.4f} (p {one.corrected:.3f})"


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="state folder of a study, .epsd/studies/NAME")
    parser.add_argument("--write", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = versions()
    text = "\n".join([f"On {found['cpu']}, torch {found['torch']}.", "", *study(arguments.folder), ""])
    print(text, end="")
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
