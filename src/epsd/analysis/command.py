"""`epsd analyse`: EPSD beside simple combinations, trained and measured in one go; table, files, one MLflow run."""

import contextlib
from typing import NamedTuple

from epsd.analysis import AnalysisError
from epsd.analysis.measuring import MEASURES, Finding, examine, with_score
from epsd.analysis.report import FOLDER, Report
from epsd.compute.devices import open_machine
from epsd.data.prepared import Prepared
from epsd.objectives import OBJECTIVES
from epsd.pipeline.prepared import opened
from epsd.pipeline.prune import pruned
from epsd.pipeline.stage import check
from epsd.project import artifacts
from epsd.project.params import DEFAULT_PATH, Params, flatten, load
from epsd.project.processes import Stopped
from epsd.project.progress import drawn
from epsd.project.runtime import no_telemetry, note, quiet
from epsd.registry import choose, unknown
from epsd.scores import SCORES
from epsd.tracking import Tracker, track

OURS = "epsd"
DEFAULT = ("prospr", "snip", "random")


class Request(NamedTuple):
    """What the command line asked for.

    others : scores of the simple combinations.  epochs : of each training, None = train.epochs.  seeds : trainings per
    method, with params.seed and the numbers after it.  points : of the loss slice along each direction, 0 = no slice
    and no features.
    """

    others: tuple[str, ...] = DEFAULT
    epochs: int | None = None
    seeds: int = 1
    points: int = 17


def command(request: Request) -> int:
    """Run the analysis that `request` describes on params.yaml. The exit status.

    Raises ParamsError, AnalysisError and ArtifactError before any work: unknown score, `points` without a middle, and
    see `opened` and `check_writable`.
    """
    no_telemetry()
    params = check(load(DEFAULT_PATH))
    plan = _plan(params, request)
    data = opened(params, open_machine(params.device, params.threads, params.data.workers))
    artifacts.check_writable(FOLDER)
    try:
        print(f"analyse: {_described(params, plan)} on {data.machine.device.type}", flush=True)
        report = _run(params, request, plan, data)
    except Stopped as stop:
        note(f"analyse: {stop}; nothing was written.")
        return stop.status
    print(drawn(report.table()))
    print(f"analyse: tables and figures are in {FOLDER}/", flush=True)
    return 0


def _plan(params: Params, request: Request) -> list[Params]:
    """The parameters of each training; the names of the others are checked."""
    for name in request.others:
        if name not in SCORES:
            raise unknown("--with", name, SCORES)
    if request.points and (request.points < 3 or request.points % 2 == 0):
        raise AnalysisError(
            f"--points {request.points}: takes an odd number from 3 on, so that the network is in the middle, or 0."
        )
    train = params.train.model_copy(update={"epochs": request.epochs or params.train.epochs})
    methods = [with_score(params, name) for name in dict.fromkeys((OURS, *request.others))]
    for each in methods:
        choose(SCORES, each.prune.score, "prune.score")
    choose(OBJECTIVES, params.objective, "objective")
    seeds = range(params.seed, params.seed + request.seeds)
    return [each.model_copy(update={"seed": seed, "train": train}) for seed in seeds for each in methods]


def _described(params: Params, plan: list[Params]) -> str:
    names = ", ".join(dict.fromkeys(str(each.prune.score["name"]) for each in plan))
    return (
        f"{names} under {params.objective['name']} at sparsity {params.prune.sparsity:g}, {params.data_title}, "
        f"{params.architecture['name']}; {len(plan)} trainings of {plan[0].train.epochs} epochs,"
    )


def _run(params: Params, request: Request, plan: list[Params], data: Prepared) -> Report:
    with _tracked(params, request, plan) as tracker:
        _warm_up(plan[0], data)
        findings = []
        for number, each in enumerate(plan):
            first = each.seed == params.seed
            finding = examine(each, data, points=request.points if first else 0, slice_seed=params.seed)
            findings.append(finding)
            _say(finding, number + 1, len(plan))
        report = Report(findings, data.class_names, params.objective["name"], params.evaluate.ece_bins)
        paths = report.write()
        _log(tracker, report)
        for path in paths:
            tracker.artifact(path, folder=None if path.suffix == ".png" else "analysis")
        tracker.artifact(DEFAULT_PATH)
        tracker.dataset(params.data_title, data.digest, str(data.index.get("source", "")), data.sizes)
    return report


def _warm_up(params: Params, data: Prepared) -> None:
    """Score once for nothing: what libraries do at their first call is in no method's seconds."""
    pruned(params.pruning(rounds=1), data)


def _say(finding: Finding, number: int, total: int) -> None:
    if not quiet():
        figures = finding.figures
        note(
            f"analyse: {number}/{total} {finding.method}, seed {finding.seed}: validation top-1 "
            f"{figures['val/top1']:.4f}, ECE {figures['calibration/ece']:.4f} ({figures['time/seconds']:.1f} s)"
        )


def _tracked(params: Params, request: Request, plan: list[Params]) -> contextlib.AbstractContextManager[Tracker]:
    names = list(dict.fromkeys(str(each.prune.score["name"]) for each in plan))
    asked = {"with": names[1:], "epochs": plan[0].train.epochs, "seeds": request.seeds, "points": request.points}
    flat = {key: value for key, value in flatten(params.model_dump()) if not key.startswith(("detect.", "voc."))}
    return track(
        "analyse",
        experiment=params.tracking.experiment,
        name=f"analysis-{params.data_title}-{params.objective['name']}-s{params.prune.sparsity:g}",
        params=flat | {f"analyse.{key}": value for key, value in asked.items()},
        tags={"kind": "analysis", "dataset": params.data_title, "objective": params.objective["name"]},
        description=(
            f"Why the pruning matters: `{OURS}` beside the simple combinations {', '.join(names[1:])}, each pruned to "
            f"{params.prune.sparsity:.1%} and trained with `{params.objective['name']}` for {plan[0].train.epochs} "
            "epochs. Trainability, distillation, calibration, overlap of masks, loss around the result, features; on "
            "the validation split."
        ),
    )


def _log(tracker: Tracker, report: Report) -> None:
    """Curves by epoch and figures, `METHOD/group/name`; means over seeds, with `/std` where there are several."""
    curves = report.history.drop(columns="seed").groupby(["method", "epoch"], sort=False).mean()
    for point in curves.reset_index().to_dict("records"):
        method, epoch = point.pop("method"), point.pop("epoch")
        tracker.metrics({f"{method}/{_curve(str(name))}": v for name, v in point.items() if v == v}, step=int(epoch))
    known = {_curve(str(name)) for name in curves.columns}
    measured = [name for name in MEASURES if name in report.summary]
    grouped = report.summary.groupby("method", sort=False)[measured]
    for table, ending in ((grouped.mean(), ""), (grouped.std(), "/std")):
        for row in table.reset_index().to_dict("records"):
            method = row.pop("method")
            wanted = [name for name in measured if row[name] == row[name] and (ending or name not in known)]
            tracker.metrics({f"{method}/{name}{ending}": row[name] for name in wanted})


def _curve(name: str) -> str:
    """The divergences get their group's name."""
    return name if "/" in name else f"distillation/{name}"
