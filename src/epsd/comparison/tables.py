"""A comparison written down: for the terminal, as Markdown, CSV and LaTeX."""

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from epsd.comparison.metrics import better
from epsd.comparison.statistics import Difference
from epsd.comparison.types import Cell, Row, Table
from epsd.project.progress import drawn

Format = Literal["terminal", "markdown", "csv", "latex"]
ENDINGS: dict[str, Format] = {".md": "markdown", ".csv": "csv", ".tex": "latex", ".txt": "terminal"}

CSV_COLUMNS = (
    "method", "objective", "differs", "sparsity", "metric", "mean", "standard_deviation", "seeds", "best", "baseline",
    "difference", "test", "pairs", "p", "p_holm", "reason",
)  # fmt: skip


def written(table: Table, style: Format) -> str:
    """`table` in one of the formats, notes included (CSV has none: its columns say it)."""
    return {"terminal": terminal, "markdown": markdown, "csv": comma_separated, "latex": latex}[style](table)


def all_written(parts: Mapping[str, Table], style: Format) -> str:
    """One table after the other, each below its name; notes that all have in common once, at the end."""
    if len(parts) == 1:
        return written(next(iter(parts.values())), style)
    shared = [n for n in next(iter(parts.values())).notes if all(n in part.notes for part in parts.values())]
    own = {name: replace(part, notes=[n for n in part.notes if n not in shared]) for name, part in parts.items()}
    before, after = {"latex": "% ", "markdown": "## "}.get(style, ""), {"latex": "% ", "markdown": "* "}.get(style, "")
    texts = [f"{before}{name}\n\n{written(part, style)}" for name, part in own.items()]
    return "\n\n".join([*texts, "\n".join(f"{after}{n}" for n in shared)]).rstrip("\n")


def decimals(table: Table) -> int:
    """Digits after the point that show four significant ones of the largest mean; more for a spread that is finer."""
    means = [abs(cell.summary.mean) for row in table.rows for cell in row.cells.values()]
    largest = max(means, default=0.0)
    return 4 if largest == 0 else min(6, max(0, 3 - math.floor(math.log10(largest))))


def value(cell: Cell, places: int) -> str:
    """`0.9861 ± 0.0031`, without ± for one seed."""
    mean, deviation, count = cell.summary
    return f"{mean:,.{places}f}" + (f" ± {deviation:,.{places}f}" if count > 1 else "")


def probability(found: Difference | None) -> str:
    """`p 0.012`, `p < 0.001 w` (w: Welch); "" where there is none."""
    if found is None or math.isnan(found.corrected):
        return ""
    shown = f"p {found.corrected:.3f}" if found.corrected >= 0.001 else "p < 0.001"
    return shown + (" w" if found.test == "welch" else "")


def _small(cell: Cell) -> str:
    return ", ".join(filter(None, [f"n {len(cell.values)}", probability(cell.against)]))


def _title(table: Table) -> str:
    way = better(table.metric)
    return f"{table.metric}{f' ({way} is better)' if way else ''}, mean ± standard deviation over n seeds"


def _header(table: Table) -> list[str]:
    return ["method", "objective", *(f"sparsity {sparsity:g}" for sparsity in table.columns)]


def terminal(table: Table) -> str:
    """A table of rich, best values bold where a terminal can."""
    from rich.markup import escape
    from rich.table import Table as Grid

    places, tty = decimals(table), sys.stdout.isatty()
    grid = Grid(title=_title(table), title_justify="left", header_style="bold")
    for number, name in enumerate(_header(table)):
        grid.add_column(name, justify="left" if number < 2 else "right")
    for row in table.rows:
        cells = []
        for sparsity in table.columns:
            cell = row.cells.get(sparsity)
            text = "" if cell is None else f"{value(cell, places)}\n{_small(cell)}"
            head, _, tail = text.partition("\n")
            cells.append(
                (f"[bold]{head}[/bold]{'' if tty else ' *'}\n{tail}") if cell is not None and cell.best else text
            )
        grid.add_row(escape(row.label), row.objective, *cells)
    notes = table.notes if tty else [note.replace("Bold:", "*:", 1) for note in table.notes]
    return "\n".join([drawn(grid), *notes])


def markdown(table: Table) -> str:
    """A pipe table, notes below."""
    places = decimals(table)
    lines = [_title(table), "", "| " + " | ".join(_header(table)) + " |"]
    lines.append("|---|---|" + "---:|" * len(table.columns))
    for row in table.rows:
        cells = [_inline(row.cells.get(sparsity), places, "**", "**") for sparsity in table.columns]
        label = row.label.replace("|", "\\|")
        lines.append(f"| {' | '.join([label, row.objective, *cells])} |")
    return "\n".join([*lines, "", *(f"* {note}" for note in table.notes)])


def _inline(cell: Cell | None, places: int, before: str, after: str) -> str:
    if cell is None:
        return ""
    shown = value(cell, places)
    return f"{before}{shown}{after} ({_small(cell)})" if cell.best else f"{shown} ({_small(cell)})"


def comma_separated(table: Table) -> str:
    """One line per cell, every number in full."""
    import pandas as pd

    cells = [_csv_row(table, row, *pair) for row in table.rows for pair in sorted(row.cells.items())]
    return pd.DataFrame(cells, columns=CSV_COLUMNS, dtype=object).to_csv(index=False).rstrip("\n")


def _csv_row(table: Table, row: Row, sparsity: float, cell: Cell) -> list[object]:
    mean, deviation, count = cell.summary
    differs = "; ".join(f"{key}={shown}" for key, shown in row.context.items())
    about = [row.method, row.objective, differs, sparsity, table.metric, mean, deviation, count, cell.best]
    found = cell.against
    if found is None:
        return [*about, *[None] * (len(CSV_COLUMNS) - len(about))]
    return [*about, table.baseline, found.by, found.test, found.seeds, found.p, found.corrected, found.reason]


def latex(table: Table) -> str:
    """A `tabular` for booktabs, with the notes as comments after it."""
    places = decimals(table)
    lines = [f"% {_title(table)}", "% needs \\usepackage{booktabs}"]
    lines += [f"\\begin{{tabular}}{{ll{'r' * len(table.columns)}}}", "\\toprule"]
    lines += [" & ".join(map(_escaped, _header(table))) + r" \\", "\\midrule"]
    for row in table.rows:
        cells = [_escaped(_inline(row.cells.get(sparsity), places, "<<", ">>")) for sparsity in table.columns]
        line = " & ".join([_escaped(row.label), _escaped(row.objective), *cells])
        lines.append(line.replace("<<", r"\textbf{").replace(">>", "}") + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", *(f"% {note}" for note in table.notes)])


_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
          "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}  # fmt: skip


def _escaped(text: str) -> str:
    escaped = "".join(_LATEX.get(letter, letter) for letter in text)
    return escaped.replace("p < ", "p $<$ ")
