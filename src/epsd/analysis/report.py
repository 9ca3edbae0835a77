"""What an analysis leaves behind: a table to print, CSV and Markdown, figures. All below artifacts/analysis/."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from epsd.analysis import landscape, overlap
from epsd.analysis.distillation import CREATED_FOR
from epsd.analysis.features import project
from epsd.analysis.measuring import MEASURES, Finding, calibration
from epsd.evaluation import metrics
from epsd.figures import analysis
from epsd.figures import style as figures
from epsd.project import artifacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

FOLDER = artifacts.ROOT / "analysis"
OPTIONAL = ("landscape.csv", "landscape.png", "features.png")
"""What an analysis without a loss slice does not write."""


class Report:
    """Tables and figures of some findings, the methods in the order of their first finding.

    objective : its name, which decides what the divergences are titled. ece_bins : of the reliability diagram.
    """

    def __init__(self, findings: Sequence[Finding], class_names: Sequence[str], objective: str, ece_bins: int) -> None:
        self.findings, self.class_names, self.objective, self.ece_bins = findings, class_names, objective, ece_bins
        self.methods = list(dict.fromkeys(finding.method for finding in findings))
        self.seeds = sorted({finding.seed for finding in findings})
        self.measured, self.expected = self._overlaps()
        self.summary = self._frame(lambda finding: [self._row(finding)])
        self.history = self._frame(lambda finding: finding.history)
        self.layers = self._frame(lambda finding: finding.layers)

    def _frame(self, rows: Callable[[Finding], Iterable[Mapping[str, Any]]]) -> pd.DataFrame:
        """The rows of every finding, each with its method and seed."""
        return pd.DataFrame(
            {"method": finding.method, "seed": finding.seed, **row}
            for finding in self.findings
            for row in rows(finding)
        )

    def _overlaps(self) -> tuple[Tensor, Tensor]:
        """Measured and expected (M, M), means over seeds."""
        of_seed = [
            [finding.mask for method in self.methods for finding in self.of(method) if finding.seed == seed]
            for seed in self.seeds
        ]
        return tuple(  # type: ignore[return-value]
            torch.stack([table(masks) for masks in of_seed]).mean(0) for table in (overlap.measured, overlap.expected)
        )

    def of(self, method: str) -> list[Finding]:
        """Its findings, one per seed."""
        return [finding for finding in self.findings if finding.method == method]

    def _row(self, finding: Finding) -> dict[str, Any]:
        first = next(other for other in self.of(self.methods[0]) if other.seed == finding.seed)
        known = {**finding.figures, "mask/jaccard_epsd": finding.mask.jaccard(first.mask)}
        return {name: known[name] for name in MEASURES if name in known}

    # --- tables ---

    def cells(self) -> Iterator[tuple[str, list[str]]]:
        """Each measure with its mean (± one standard deviation) by method."""
        grouped = self.summary.groupby("method", sort=False)
        for name, meaning in MEASURES.items():
            if name in self.summary:
                mean, spread = grouped[name].mean(), grouped[name].std()
                yield meaning, [_cell(float(mean[method]), float(spread[method])) for method in self.methods]

    def table(self) -> "Table":
        """For the terminal: a row per measure, a column per method."""
        from rich.table import Table

        table = Table("", *self.methods)
        for column in table.columns[1:]:
            column.justify = "right"
        for meaning, cells in self.cells():
            table.add_row(meaning, *cells)
        return table

    def markdown(self) -> str:
        """The same for a document."""
        lines = [f"| | {' | '.join(self.methods)} |", "|---|" + "---:|" * len(self.methods)]
        lines += [f"| {meaning} | {' | '.join(cells)} |" for meaning, cells in self.cells()]
        count = len(self.seeds)
        seeds = f"{count} seed" if count == 1 else f"mean ± standard deviation over {count} seeds"
        return f"Objective `{self.objective}`, {seeds}; validation split.\n\n" + "\n".join(lines) + "\n"

    # --- files ---

    def write(self, folder: Path = FOLDER) -> list[Path]:
        """Every table and figure; the paths. What an earlier analysis left of others goes first.

        Raises ArtifactError: cannot be written.
        """
        for name in OPTIONAL:
            (folder / name).unlink(missing_ok=True)
        tables = {
            "summary": self.summary,
            "history": self.history,
            "overlap": self._pairs(),
            "layers": self.layers,
            "landscape": self._frame(self._slice),
        }
        written = []
        for name, table in tables.items():
            if len(table):
                artifacts.write_text(folder / f"{name}.csv", table.to_csv(index=False))
                written.append(folder / f"{name}.csv")
        artifacts.write_text(folder / "summary.md", self.markdown())
        written.append(folder / "summary.md")
        for name, draw in self._figures():
            figures.save(draw(), folder / f"{name}.png")
            written.append(folder / f"{name}.png")
        return written

    def _pairs(self) -> pd.DataFrame:
        return pd.DataFrame(
            {"method": one, "other": other, "jaccard": float(measured), "expected": float(expected)}
            for one, row, by_chance in zip(self.methods, self.measured, self.expected, strict=True)
            for other, measured, expected in zip(self.methods, row, by_chance, strict=True)
        )

    @staticmethod
    def _slice(finding: Finding) -> Iterator[dict[str, float]]:
        if finding.surface is not None:
            places = landscape.coordinates(len(finding.surface))
            for y, row in zip(places, finding.surface, strict=True):
                yield from ({"x": x, "y": y, "loss": float(loss)} for x, loss in zip(places, row, strict=True))

    def _figures(self) -> "Iterator[tuple[str, Callable[[], Figure]]]":
        yield "overlap", self.overlap_figure
        yield "layers", self.layers_figure
        yield "trainability", self.trainability_figure
        yield "distillation", self.distillation_figure
        yield "calibration", self.calibration_figure
        if any(finding.surface is not None for finding in self.findings):
            yield "landscape", self.landscape_figure
        if any(finding.features is not None for finding in self.findings):
            yield "features", self.features_figure

    # --- figures ---

    def overlap_figure(self) -> "Figure":
        """See `figures.analysis.mask_overlap`."""
        uniform = overlap.uniform(1 - self.findings[0].mask.sparsity)
        return analysis.mask_overlap(self.methods, self.measured, self.expected, uniform)

    def layers_figure(self) -> "Figure":
        """See `figures.analysis.layers`; beside the methods a random mask of ERK densities."""
        rows = self.layers
        shown = [rows, rows[rows["method"] == self.methods[0]].assign(method="random ERK")]
        chance = {f"random_erk_{name}": name for name in ("density", "live", "channels", "gini")}
        shown[1] = shown[1].drop(columns=list(chance.values())).rename(columns=chance)
        table = pd.concat(shown)
        return analysis.layers(table.assign(live=table["live"] / table["channels"], gini=table["gini"].astype(float)))

    def trainability_figure(self) -> "Figure":
        """See `figures.analysis.trainability`."""
        short = {f"trainability/{name}": name for name in analysis.NORMS}
        losses = self.history.rename(columns={"train/loss": "value"})
        return analysis.trainability(self.summary.rename(columns=short), losses)

    def distillation_figure(self) -> "Figure":
        """See `figures.analysis.distillation`."""
        rows = self.history.reindex(columns=["method", "seed", "epoch", *analysis.KL])
        return analysis.distillation(rows, CREATED_FOR.get(self.objective))

    def calibration_figure(self) -> "Figure":
        """Of the predictions of all seeds together."""
        tables, judged = {}, {}
        for method in self.methods:
            logits = torch.cat([finding.logits for finding in self.of(method)])
            labels = torch.cat([finding.labels for finding in self.of(method)])
            tables[method] = metrics.reliability(logits, labels, self.ece_bins)
            judged[method] = calibration(logits, labels, self.ece_bins)
        return analysis.calibration(tables, judged)

    def landscape_figure(self) -> "Figure":
        """Of the first seed."""
        surfaces = {f.method: f.surface for f in self.findings if f.surface is not None}
        return analysis.loss_landscapes(surfaces, landscape.REACH)

    def features_figure(self) -> "Figure":
        """Of the first seed."""
        planes = {f.method: (project(f.features), f) for f in self.findings if f.features is not None}
        titles = {
            name: f"{name}, {plane.method}\nclasses apart / within {finding.figures['features/separation']:.2f}"
            for name, (plane, finding) in planes.items()
        }
        points = {name: (plane.points, plane.labels, plane.right) for name, (plane, _) in planes.items()}
        return analysis.features(points, self.class_names, titles=titles)


def _cell(mean: float, spread: float) -> str:
    text = f"{mean:.1f}" if abs(mean) >= 100 else f"{mean:.4f}" if abs(mean) >= 0.001 or mean == 0 else f"{mean:.2e}"
    return text if spread != spread else f"{text} ± {spread:.2g}"
