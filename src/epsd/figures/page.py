"""`epsd report`: recorded runs as one page of HTML that needs no network: tables, figures, pictures, commands."""

import base64
import html
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from epsd.comparison import command
from epsd.comparison.types import ComparisonError, Entry
from epsd.figures import deployed, study, style
from epsd.files.regular import read_bytes
from epsd.project.artifacts import write_text
from epsd.project.runtime import brief, counted, versions
from epsd.tracking.store import connection

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PICTURED = 12
"""Runs whose curves and pictures are on the page, the newest first: a picture takes 50 kB. The tables have all."""

COLUMNS = {
    "params.prune.score.name": "score", "params.objective.name": "objective", "params.prune.sparsity": "sparsity",
    "params.prune.structure": "structure", "params.prune.macs": "share of multiply-adds", "params.seed": "seed",
    "metrics.test/top1": "test top-1", "metrics.test/ece": "test ECE", "metrics.detect/map50": "mAP@0.5",
    "metrics.model/parameters_nonzero": "nonzero parameters", "metrics.model/bytes_sparse": "bytes, compact",
    "metrics.deploy/int8_top1": "int8 top-1", "metrics.latency/torch_batch1_one_thread_ms": "torch, ms",
    "metrics.latency/onnx_batch1_one_thread_ms": "ONNX fp32, ms",
    "metrics.latency/int8_batch1_one_thread_ms": "ONNX int8, ms", "metrics.cost/seconds": "training, s",
}  # fmt: skip
"""Column of `read_runs` -> its heading; those that no run has are left out. ms: one image, one thread."""

LOOK = """
body {font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #111}
table {border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto}
td, th {border-bottom: 1px solid #ccc; padding: .25em .6em; text-align: left; white-space: nowrap}
td.n {text-align: right; font-variant-numeric: tabular-nums} table.sortable th {cursor: pointer}
img {max-width: 100%} details img {max-width: 48%; vertical-align: top} pre {overflow-x: auto; font-size: 12px}
"""
SORT = """
for (const th of document.querySelectorAll("table.sortable th")) th.onclick = () => {
  const body = th.closest("table").tBodies[0], at = th.cellIndex, up = th.dataset.up !== "1";
  const key = row => row.cells[at].dataset.v;
  const less = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
  body.append(...[...body.rows].sort((a, b) => up ? less(a, b) : less(b, a))); th.dataset.up = up ? "1" : "";
};
"""


class Report(NamedTuple):
    """What the command line asked for."""

    request: command.Request
    out: Path


def write(report: Report) -> str:
    """Write the page; what it holds, in a line. Raises RunsError, ComparisonError, ArtifactError."""
    frame = command.found(report.request).sort_values("began", ascending=False, kind="stable")
    write_text(report.out, "\n".join(page(frame, report.request)))
    without = f", curves and pictures of the newest {PICTURED}" if len(frame) > PICTURED else ""
    return f"{report.out}: {counted(len(frame), 'run')}{without}, {report.out.stat().st_size / 1e6:.1f} MB"


def page(frame: "pd.DataFrame", request: command.Request) -> Iterator[str]:
    """Parts of the page, in order. `frame`: the runs, a row each."""
    title = f"Runs of {', '.join(sorted(set(frame['experiment'])))}"
    yield f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{_safe(title)}</title>'
    yield f"<style>{LOOK}</style></head><body><h1>{_safe(title)}</h1>"
    where = f", those that are {' and '.join(request.where)}" if request.where else ""
    made = f"written by epsd {versions()['epsd']}. A heading sorts its table."
    yield f"<p>{counted(len(frame), 'run')}{_safe(where)}; {made}</p>"
    yield _table(frame)
    runs = command.entries(frame)
    yield "<h2>By method</h2>"
    yield from _said(lambda: f"<pre>{_safe(command.text(request, runs, 'terminal'))}</pre>")
    yield "<h2>Accuracy against size and latency</h2>"
    yield from _said(lambda: _image(_against_size(runs)))
    yield from _said(lambda: _drawn(lambda path: deployed.draw(runs, path)))
    newest = f", the newest {PICTURED} runs" if len(frame) > PICTURED else ""
    yield f"<h2>Curves{newest}</h2>"
    yield _curves(frame[:PICTURED])
    yield "<h2>Parameters that differ</h2>"
    yield _differing(frame)
    yield "<h2>Each run</h2>"
    for number, row in enumerate(frame.to_dict("records")):
        yield from _run({str(key): value for key, value in row.items()}, pictures=number < PICTURED)
    yield f"<script>{SORT}</script></body></html>"


def _safe(value: object) -> str:
    return html.escape(str(value))


def _said(make: Callable[[], str]) -> Iterator[str]:
    """What `make` gives, or why there is none."""
    try:
        yield make()
    except (ComparisonError, study.FigureError) as error:
        yield f"<p>{_safe(error)}</p>"


# --- tables ---------------------------------------------------------------------------------------------------------


def _table(frame: "pd.DataFrame") -> str:
    """Name, what it was, what came of it."""
    frame = frame.copy()
    if "params.prune.macs" in frame and "params.prune.structure" in frame:  # of whole networks it says nothing
        frame["params.prune.macs"] = frame["params.prune.macs"].where(frame["params.prune.structure"] == "channels")
    columns = [name for name in COLUMNS if name in frame.columns and frame[name].notna().any()]
    head = "".join(f"<th>{_safe(text)}</th>" for text in ("run", *(COLUMNS[name] for name in columns)))
    lines = [
        f'<tr><td data-v="{_safe(row["name"])}"><a href="#{row["run_id"]}">{_safe(row["name"])}</a></td>'
        + "".join(_cell(row[name]) for name in columns)
        + "</tr>"
        for row in frame.to_dict("records")
    ]
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _cell(value: Any) -> str:
    """A number with four digits, sorted as it is; text as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f'<td data-v="{_safe(value or "")}">{_safe(value or "")}</td>'
    told = "" if number != number else f"{number:,.0f}" if abs(number) >= 1e4 else f"{number:.4g}"
    return f'<td class="n" data-v="{number}">{told}</td>'


def _differing(frame: "pd.DataFrame") -> str:
    """A line for each parameter that has more than one value, a column for each run."""
    params = frame[[name for name in frame.columns if name.startswith("params.")]].astype(object)
    names = [name for name in params.columns if params[name].nunique(dropna=False) > 1]
    if not names:
        return "<p>None.</p>"
    head = "".join(f"<th>{_safe(name)}</th>" for name in frame["name"])
    lines = [
        f"<tr><td>{_safe(name.removeprefix('params.'))}</td>"
        + "".join(f"<td>{_safe(value) if isinstance(value, str) else ''}</td>" for value in params[name])
        + "</tr>"
        for name in sorted(names)
    ]
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


# --- figures --------------------------------------------------------------------------------------------------------


def _against_size(runs: Sequence[Entry]) -> "Figure":
    """Top-1 over nonzero parameters."""
    import pandas as pd

    right = deployed.by_run(runs, "test/top1", "test/top1")
    sizes = deployed.by_run(runs, "model/parameters_nonzero", "test/top1")
    lines = [
        (f"{name}, sparsity {sparsity:g}", seed, value, sizes.get((name, sparsity, seed)))
        for (name, sparsity, seed), value in right.items()
    ]
    table = pd.DataFrame(lines, columns=["method", "seed", "accuracy", "size"])
    return study.cost_against_accuracy(table, costs={"size": "nonzero parameters"}, against="its size")


def _curves(frame: "pd.DataFrame") -> str:
    """Validation top-1 and loss of every run, over epochs."""
    client, panels = connection(), dict[str, dict[str, Sequence[float | None]]]()
    for label, metric in {"top-1 (share right)": "val/top1", "loss (nats)": "val/nll"}.items():
        for run, name in zip(frame["run_id"], frame["name"], strict=True):
            if points := sorted(client.get_metric_history(run, metric), key=lambda point: point.step):
                panels.setdefault(label, {})[f"{name}, {run[:6]}"] = [point.value for point in points]
    return _image(style.curves(panels, "Validation")) if panels else "<p>No run has a validation split.</p>"


def _image(figure: "Figure") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return _embedded(buffer.getvalue())


def _drawn(draw: Callable[[Path], None]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(path)
        return _embedded(read_bytes(path))


def _embedded(picture: bytes, title: str = "") -> str:
    data = base64.b64encode(picture).decode()
    return f'<img alt="{_safe(title)}" title="{_safe(title)}" src="data:image/png;base64,{data}">'


# --- one run --------------------------------------------------------------------------------------------------------


def _run(row: dict[str, Any], *, pictures: bool) -> Iterator[str]:
    """What made it, and its pictures: density by layer, curves, confusion, calibration, detections."""
    yield f'<details id="{row["run_id"]}"><summary>{_safe(row["name"])}</summary>'
    yield f"<pre>{_safe(chr(10).join(commands(row)))}</pre>"
    if isinstance(note := row.get("tags.mlflow.note.content"), str):
        yield f"<pre>{_safe(note)}</pre>"
    if pictures:
        yield from _pictures(row["run_id"])
    yield "</details>"


def commands(row: dict[str, Any]) -> list[str]:
    """What makes the run again: the code's commit, its parameters, the command."""
    commit, name, kept = row.get("tags.git.commit"), row.get("tags.study"), row["run_id"]
    again = [f"git checkout {commit}"] if isinstance(commit, str) else []
    if isinstance(name, str):
        return [*again, f"epsd study {name}"]
    return [*again, f"mlflow artifacts download -r {kept} -a params.yaml -d .", "dvc repro"]


def _pictures(run: str) -> Iterator[str]:
    client = connection()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for file in client.list_artifacts(run):
                if file.path.endswith(".png"):
                    yield _embedded(read_bytes(Path(client.download_artifacts(run, file.path, folder))), file.path)
    except Exception as error:  # a store that was moved, files that were removed
        yield f"<p>Its pictures cannot be read ({_safe(brief(error))}).</p>"
