"""What came of a search: the best trials as a table, Optuna's figures, CSV, and the way back into params.yaml."""

import html
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from epsd.engine.ledger import slot
from epsd.project import commented, presets
from epsd.project.artifacts import replacing, write_text
from epsd.project.params import DEFAULT_PATH, Params, as_tree, at, flatten, override, parse, read_yaml
from epsd.project.progress import drawn
from epsd.project.runtime import note
from epsd.tuning import TuningError
from epsd.tuning.judge import MEASURED
from epsd.tuning.space import REGISTRIES, SEARCHABLE, Space
from epsd.tuning.worker import shown_value

COLUMNS = 5
"""Trials side by side in the table."""
SHOWN_FIGURES = ("val/top1", "val/nll", "model/parameters_nonzero", "model/gflops_sparse", "model/bytes_sparse")


def feasible(trial: FrozenTrial) -> bool:
    """Whether the trial keeps to every constraint."""
    return all(excess <= 0 for excess in trial.constraints.values())


def best(study: optuna.Study) -> list[FrozenTrial]:
    """The completed trials that keep to the constraints, best first; with several objectives the Pareto front.

    Trials of equal values stand in the order of their validation NLL, then of their numbers: accuracy on a small split
    has few values, and of two networks that err as often the one that is more sure of what is right is the better.
    """
    signs = [1 if direction.name == "MINIMIZE" else -1 for direction in study.directions]
    one = len(signs) == 1
    known = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if one else study.best_trials

    def cost(trial: FrozenTrial) -> list[float]:
        return [sign * value for sign, value in zip(signs, trial.values, strict=True)]

    ranked = sorted(filter(feasible, known), key=lambda trial: (cost(trial), _nll(trial), trial.number))
    return [trial for n, trial in enumerate(ranked) if one or n == 0 or cost(trial) != cost(ranked[n - 1])]


def _nll(trial: FrozenTrial) -> float:
    """NaN would sort nowhere."""
    value = float(trial.user_attrs["figures"]["val/nll"])
    return value if value == value else float("inf")


def current(study: optuna.Study) -> FrozenTrial | None:
    """The completed trial of params.yaml as it stood when the study began."""
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((trial for trial in completed if trial.user_attrs.get("origin")), None)


def against_current(study: optuna.Study, trial: FrozenTrial, objective: str) -> str:
    """What `trial` gains over params.yaml, seed by seed, in one line; "" where there is nothing to compare.

    The standard error is that of the mean difference over the repeats. It does not know that `trial` was picked as the
    best of many, which flatters it: only seeds that the search has not used tell what is left of the gain.
    """
    before = current(study)
    if before is None or before.number == trial.number:
        return ""
    pairs = zip(_each(trial, objective), _each(before, objective), strict=False)
    differences = [after - then for after, then in pairs]
    if len(differences) < 2:
        return ""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return (
        f"trial {trial.number} against params.yaml: {objective} {statistics.fmean(differences):+.4f} "
        f"(standard error {error:.4f} over {len(differences)} seeds, before allowing for its being picked)"
    )


def _each(trial: FrozenTrial, objective: str) -> list[float]:
    """The figure `objective` of each repeat."""
    return [float(figures[objective]) for figures in trial.user_attrs.get("repeats") or []]


def judged(trial: FrozenTrial) -> str:
    """Validation top-1 as it may be told: of one training, or the mean of several and the first, which runs alone."""
    each = _each(trial, "val/top1")
    mean = trial.user_attrs["figures"]["val/top1"]
    if len(each) < 2:
        return f"validation top-1 {mean:.4f}"
    deviation = trial.user_attrs["deviations"]["val/top1"]
    return (
        f"validation top-1 {mean:.4f}, the mean of {len(each)} seeds (standard deviation {deviation:.4f}); with the "
        f"seed and split of params.yaml, which `dvc repro` runs, {each[0]:.4f}"
    )


def chosen(study: optuna.Study, number: int | None) -> FrozenTrial:
    """The trial to apply: `number`, or the one best.

    Raises TuningError: no such trial, not complete, none at all, or a front of several without a number.
    """
    ranked = best(study)
    if number is None:
        if not ranked:
            raise TuningError(f"study '{study.study_name}' has no finished trial that keeps to the constraints yet.")
        if len(study.directions) > 1 and len(ranked) > 1:
            numbers = ", ".join(str(trial.number) for trial in ranked)
            raise TuningError(
                f"the front has {len(ranked)} trials: choose one of {numbers} (epsd tune --apply NUMBER)."
            )
        return ranked[0]
    found = next((trial for trial in study.get_trials(deepcopy=False) if trial.number == number), None)
    if found is None or found.state != TrialState.COMPLETE:
        state = "is not in it" if found is None else f"is {found.state.name.lower()}"
        done = ", ".join(str(trial.number) for trial in ranked[:10]) or "(none)"
        raise TuningError(f"study '{study.study_name}': trial {number} {state}. Complete trials, best first: {done}.")
    return found


# --- table ----------------------------------------------------------------------------------------------------------


def table(study: optuna.Study, objectives: list[str]) -> str:
    """The best trials side by side, parameters and figures in rows; the present params.yaml last, for comparison."""
    from rich.table import Table

    ranked = best(study)
    columns = ranked[:COLUMNS]
    first = current(study)
    if first is not None and first not in columns:
        columns = [*columns, first]
    if not columns:
        return "No trial has finished within the constraints."
    title = "Best trials" if len(objectives) == 1 else f"Pareto front ({len(ranked)} trials)"
    repeats = max(len(trial.user_attrs.get("repeats") or []) for trial in columns)
    title += f", means of {repeats} seeds" if repeats > 1 else ""
    grid = Table(title=title, title_justify="left", header_style="bold")
    grid.add_column("")
    for trial in columns:
        grid.add_column(
            f"trial {trial.number}" + ("\nparams.yaml" if trial.user_attrs.get("origin") else ""), justify="right"
        )
    known = {name for trial in columns for name in trial.user_attrs["figures"]}
    for name in dict.fromkeys([*objectives, *SHOWN_FIGURES, *(name for name in MEASURED if name in known)]):
        grid.add_row(name, *(shown_value(t.user_attrs["figures"].get(name)) for t in columns))
        if repeats > 1 and name in objectives:
            grid.add_row("  standard deviation", *(shown_value(t.user_attrs["deviations"].get(name)) for t in columns))
            grid.add_row("  as dvc repro runs it", *(shown_value(_each(t, name)[0]) for t in columns))
    grid.add_section()
    for key in dict.fromkeys(key for trial in columns for key in trial.params):
        grid.add_row(key, *(shown_value(t.params[key]) if key in t.params else "-" for t in columns))
    return drawn(grid)


def export(study: optuna.Study, path: Path) -> int:
    """Every trial that has begun as one line of CSV: number, state, times, values, parameters, figures. Their count.

    Raises TuningError where none has, ArtifactError where `path` cannot be written.
    """
    import pandas as pd

    rows = [_row(study, trial) for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
    if not rows:
        raise TuningError(f"study '{study.study_name}': no trial has begun yet: nothing to write to {path}.")
    write_text(path, pd.DataFrame(rows).to_csv(index=False))
    return len(rows)


def _row(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    said, done = trial.user_attrs, trial.user_attrs.get("repeats") or []
    judged = study.user_attrs.get("epsd", {}).get("objectives", [])
    deviations = {f"{name} sd": value for name, value in (said.get("deviations") or {}).items() if name in judged}
    each = {f"{name} repeat {n}": one[name] for name in judged for n, one in enumerate(done) if len(done) > 1}
    return {
        "trial": trial.number,
        "slot": slot(trial),
        "state": trial.state.name,
        "feasible": feasible(trial) if trial.state == TrialState.COMPLETE else None,
        "begun": trial.datetime_start,
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        "epochs_reported": len(trial.intermediate_values),
        **trial.params,
        **(said.get("figures") or {}),
        "repeats": len(done) or None,
        **deviations,
        **each,
        **{key: said.get(key) for key in ("origin", "retry_of", "lost", "error", "threads", "run_id")},
    }


# --- figures --------------------------------------------------------------------------------------------------------


class Plot(NamedTuple):
    """One of Optuna's figures: file name, title, how each of the two backends draws it."""

    name: str
    title: str
    function: str
    settings: dict[str, Any]


def _plots(study: optuna.Study, objectives: list[str]) -> Iterator[Plot]:
    many = len(objectives) > 1
    for index, objective in enumerate(objectives):
        tail, of = (f"-{objective.replace('/', '-')}", f" of {objective}") if many else ("", "")
        target = {"target": _value(index) if many else None, "target_name": objective}
        yield Plot(f"history{tail}", f"History{of}", "plot_optimization_history", target)
        yield Plot(f"importances{tail}", f"Which parameters matter{of}", "plot_param_importances", target)
        yield Plot(f"parallel{tail}", f"Parallel coordinates{of}", "plot_parallel_coordinate", target)
        yield Plot(f"slice{tail}", f"Each parameter by itself{of}", "plot_slice", target)
    if not many:
        yield Plot("curves", "What the pruner was told of each trial while it ran", "plot_intermediate_values", {})
    elif len(objectives) <= 3:
        yield Plot("pareto", "Pareto front", "plot_pareto_front", {"target_names": objectives})


def _value(index: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: float(trial.values[index])


def figures(study: optuna.Study, objectives: list[str], folder: Path) -> list[Path]:
    """Optuna's own figures in `folder`: each as PNG, and all of them in one `study.html` that works offline.

    A figure that needs more trials than there are is left out, with a line that says so.
    """
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    sections: list[str] = []
    for plot in _plots(study, objectives):
        try:
            sections.append(_interactive(study, plot, first=not sections))
            files.append(_still(study, plot, folder / f"{plot.name}.png"))
        except Exception as error:  # Optuna raises many kinds where trials are too few or too alike
            note(f"tune: figure '{plot.name}' left out ({' '.join(str(error).split())[:120] or type(error).__name__}).")
    page = folder / "study.html"
    title = html.escape(f"Study {study.study_name}")
    write_text(
        page,
        f"<!doctype html><meta charset='utf-8'><title>{title}</title>"
        f"<body style='font-family: sans-serif; margin: 2em'><h1>{title}</h1>{''.join(sections)}",
    )
    return [page, *files]


def _interactive(study: optuna.Study, plot: Plot, first: bool) -> str:
    figure = getattr(optuna.visualization, plot.function)(study, **plot.settings)
    body: str = figure.to_html(full_html=False, include_plotlyjs=first)
    return f"<h2>{html.escape(plot.title)}</h2>{body}"


def _still(study: optuna.Study, plot: Plot, path: Path) -> Path:
    import matplotlib.pyplot as plt
    import numpy as np
    from optuna.visualization import matplotlib as drawn

    plt.switch_backend("agg")
    try:
        figure = np.ravel(getattr(drawn, plot.function)(study, **plot.settings))[0].figure
        figure.set_size_inches(np.maximum(figure.get_size_inches(), (9, 5)))
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    finally:
        plt.close("all")
    return path


# --- apply ----------------------------------------------------------------------------------------------------------


def apply(study: optuna.Study, trial: FrozenTrial, params: Params, target: Path = DEFAULT_PATH) -> Path | None:
    """Write the trial's parameters into `target`, comments kept; the copy of what was there (None: nothing to change).

    Everything that bears on the trial is written, the fixed values and the number of threads too, so that `dvc repro`
    or `dvc exp run` gives the trial's validation accuracy again on the same kind of CPU; of a trial that was repeated,
    that of repeat 0, which has the seed of the file. `params`: the present ones.
    """
    facts = study.user_attrs["epsd"]
    space = Space(parse({**params.model_dump(), **facts["base"], "tune": facts["tune"]}))
    wanted = space.tree(trial.params)
    import torch

    threads = int(trial.user_attrs["threads"])
    wanted["threads"] = params.threads if threads == (params.threads or torch.get_num_threads()) else threads
    changes = _changes(read_yaml(target), wanted)
    if not changes:
        return None
    text = _rewritten(target.read_text(encoding="utf-8"), changes)
    found = dict(flatten(parse(as_tree(text, target)).model_dump()))
    if wrong := [key for key, value in flatten(wanted) if key.startswith(SEARCHABLE) and found.get(key) != value]:
        raise TuningError(f"{target}: cannot be rewritten ({', '.join(wrong)}); it is as it was.")
    copy = presets.keep(target)
    write_text(target, text)
    return copy


def _changes(present: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> new value, of what bears on a trial; a whole choice where its variant changes."""
    changes: dict[str, Any] = {}
    known = dict(flatten(present))
    for section in REGISTRIES:
        before, after = at(present, section), at(wanted, section)
        if before["name"] != after["name"]:
            changes[section] = after
    for key, value in flatten(wanted):
        bears = key.startswith(SEARCHABLE) or key in ("seed", "device", "threads")
        inside = any(key.startswith(f"{section}.") for section in changes)
        if bears and not inside and known.get(key) != value:
            changes[key] = value
    return changes


def _rewritten(text: str, changes: Mapping[str, Any]) -> str:
    tree = commented.load(text)
    for key, value in changes.items():
        if isinstance(value, Mapping):
            _replace_choice(at(tree, key), value)
        else:
            override(tree, key, value)
    return commented.dump(tree)


def _replace_choice(node: Any, wanted: Mapping[str, Any]) -> None:
    """Another variant in the place of this one: settings that both have keep their place and comment."""
    for key in [key for key in node if key not in wanted]:
        del node[key]
    for key, value in wanted.items():
        node[key] = value
