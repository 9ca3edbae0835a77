"""Accuracy against latency and size: every form of every run, torch and the files that are deployed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from epsd.comparison import rows
from epsd.comparison.types import ComparisonError, Entry
from epsd.compute import timing
from epsd.evaluation.model_card import FORMS
from epsd.figures import study
from epsd.figures.style import save

if TYPE_CHECKING:
    import pandas as pd

Point = tuple[str, float, int]
"""Row of a table, sparsity, seed."""

ACCURACY = {"torch": "test/top1", "onnx": "deploy/onnx_top1", "int8": "deploy/int8_top1"}
"""Form -> how often it is right."""
SIZE = {"torch": "model/bytes_sparse", "onnx": "deploy/onnx_bytes", "int8": "deploy/int8_bytes"}
"""Form -> bytes of its smallest file."""


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Write the figure of these runs as PNG: top-1 over milliseconds of a pass on one thread, a panel per batch size,
    and over the size of the file.

    Colours tell methods apart, markers forms. Raises ComparisonError where no run was timed, ArtifactError.
    """
    names = {name for entry in entries for name in entry.metrics if name.startswith("latency/")}
    found = [part for name in names if (part := timing.parts(name.removeprefix("latency/")))]
    settings = sorted({setting for _, setting, _ in found if setting.endswith("one_thread")}, key=lambda s: (len(s), s))
    if not settings:
        raise ComparisonError(f"--figure: none of {len(entries)} runs was timed by this version of evaluate.")
    runs = points(entries, settings)
    labels = {setting: f"ms of a pass: {timing.in_words(setting)}" for setting in settings}
    labels |= {"size": "kB of the file"} if runs["size"].notna().any() else {}
    methods, forms = (list(dict.fromkeys(runs[column])) for column in ("of", "form"))
    looks = {
        str(method): study.Style("-", study.MARKERS[forms.index(form)], study.style(methods.index(of)).colour)
        for method, of, form in zip(runs["method"], runs["of"], runs["form"], strict=True)
    }
    save(study.cost_against_accuracy(runs, costs=labels, against="latency and size", looks=looks), path)


def points(entries: Sequence[Entry], settings: Sequence[str]) -> "pd.DataFrame":
    """One line per run and form: method, what it is made of (`of`, `form`), seed, accuracy, milliseconds by setting,
    and kilobytes of the file (`size`), NaN for runs that do not say.
    """
    import pandas as pd

    lines = []
    for form, accuracy in ACCURACY.items():
        timed = [entry for entry in entries if f"latency/{form}_{settings[0]}_ms" in entry.metrics]
        apart = f"latency/torch_{settings[0]}_ms"
        right = by_run(timed, accuracy, apart)
        times = {setting: by_run(timed, f"latency/{form}_{setting}_ms", apart) for setting in settings}
        bytes_ = by_run(timed, SIZE[form], apart)
        for (name, sparsity, seed), value in right.items():
            of = f"{name}, sparsity {sparsity:g}"
            passes = {setting: times[setting].get((name, sparsity, seed)) for setting in settings}
            about = {"method": f"{of}: {FORMS[form]}", "of": of, "form": form, "seed": seed}
            size = bytes_.get((name, sparsity, seed), math.nan) / 1000
            lines.append({**about, "accuracy": value, **passes, "size": size})
    return pd.DataFrame(lines).sort_values("of", kind="stable")


def by_run(entries: Sequence[Entry], metric: str, apart: str) -> dict[Point, float]:
    """The metric of each run, where runs are told apart as `epsd compare` does for the metric `apart`."""
    having = [replace(entry, metrics={apart: entry.metrics[metric]}) for entry in entries if metric in entry.metrics]
    if not having:
        return {}
    table = rows.table(having, apart)
    return {
        (row.name, sparsity, seed): value
        for row in table.rows
        for sparsity, cell in row.cells.items()
        for seed, value in cell.values.items()
    }
