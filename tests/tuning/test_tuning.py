"""The search: its space, its ledger of trials under kills, what it logs, and the way back into params.yaml."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState, create_trial

import mysql
import postgres
import warm
from conftest import ROOT
from epsd.cli import main
from epsd.data.prepared import Prepared
from epsd.engine import storage as storages
from epsd.engine.ledger import Ledger, failures, slot
from epsd.project import artifacts, presets, processes
from epsd.project.params import flatten, load, override, parse, read_yaml
from epsd.registry import ParamsError
from epsd.tuning import TuningError, judge, report, search, study, worker
from epsd.tuning.space import Space

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore::UserWarning")
TUNE = ["-m", "epsd.cli", "tune"]
QUICK = {  # a trial in about a second
    "data.limit": 12, "architecture.width": 0.25, "train.epochs": 2, "train.batch_size": 32, "prune.batch_size": 32,
    "voc.train": 1, "voc.validation": 0, "voc.test": 1, "threads": 1, "tune.study": "quick", "tune.trials": 4,
    "tune.heartbeat": 1, "tune.fixed": {"prune.sparsity": 0.8},
    "tune.workers": 1, "tune.pruner": "none", "tune.repeats": 1,
}  # fmt: skip
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


def tree(**changes: Any) -> dict[str, Any]:
    """params.yaml, shrunk, with `tune` keys changed (`space`, `fixed`, ...)."""
    content = read_yaml(ROOT / "params.yaml")
    for key, value in QUICK.items():
        override(content, key, value)
    content["tune"] |= changes
    return content


def space(**changes: Any) -> Space:
    return Space(parse(tree(**changes)))


class Fixed:
    """Stands for an Optuna trial whose sampler always says the same."""

    def __init__(self, **values: Any) -> None:
        self.values = {key.replace("__", "."): value for key, value in values.items()}

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self.values.get(name, choices[0])

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return self.values.get(name, low)

    suggest_int = suggest_float


# --- the space ------------------------------------------------------------------------------------------------------


def test_the_shipped_space_is_what_the_tune_section_promises() -> None:
    params = load(ROOT / "params.yaml")
    made = Space(params)
    assert made.fixed == {"prune.sparsity": 0.98}
    assert set(made.ranges) == set(params.tune.space) - {"prune.sparsity"}
    values = dict(flatten(made.base))
    assert made.current() == {key: values[key] for key in made.ranges}
    assert made.params(made.current()).prune.sparsity == 0.98


def test_a_file_without_the_section_has_the_default_space() -> None:
    content = read_yaml(ROOT / "params.yaml")
    shipped = Space(parse(content)).tune.space
    del content["tune"]
    made = Space(parse(content))
    assert set(made.ranges) == set(shipped)
    assert made.tune.trials == 20


@pytest.mark.parametrize(
    "name, settings",
    [
        ("cskd", {"temperature", "weight"}),
        ("dlb", {"temperature", "weight"}),
        ("pskd", set()),
        ("cross_entropy", set()),
    ],
)
def test_settings_are_searched_only_where_the_chosen_variant_has_them(name: str, settings: set[str]) -> None:
    made = space()
    values = made.suggest(Fixed(objective__name=name))
    assert {key.removeprefix("objective.") for key in values if key.startswith("objective.")} == settings | {"name"}
    assert made.params(values).objective.keys() == settings | {"name"}


def test_another_variant_begins_with_its_own_defaults() -> None:
    made = space(space={"objective.name": {"choice": ["cskd", "dlb"]}, "objective.weight": {"float": [0.5, 2]}})
    assert made.tree({"objective.name": "dlb", "objective.weight": 2.0})["objective"] == {"name": "dlb", "weight": 2.0}
    present = made.tree({"objective.name": "cskd", "objective.weight": 2.0})["objective"]
    assert present == {"name": "cskd", "temperature": 4.0, "weight": 2.0}


def test_when_restricts_further() -> None:
    made = space(
        space={
            "objective.name": {"choice": ["cskd", "dlb"]},
            "objective.temperature": {"float": [1, 8], "when": {"objective.name": "dlb"}},
            "train.warmup_epochs": {"int": [0, 2], "when": {"objective.name": ["cskd"]}},
        }
    )
    assert made.suggest(Fixed(objective__name="dlb")).keys() == {"objective.name", "objective.temperature"}
    assert made.suggest(Fixed(objective__name="cskd")).keys() == {"objective.name", "train.warmup_epochs"}
    assert made.current() == {"objective.name": "cskd", "train.warmup_epochs": 1}


def test_grid_lists_every_point_once() -> None:
    made = space(
        space={
            "objective.name": {"choice": ["cskd", "pskd"]},
            "objective.temperature": {"float": [2, 4], "step": 2},
            "prune.score.steps": {"int": [3, 4]},
        }
    )
    points = list(made.grid())
    assert len(points) == len({json.dumps(point) for point in points}) == 2 * 2 + 2
    assert {"objective.name": "cskd", "objective.temperature": 4.0, "prune.score.steps": 4} in points
    with pytest.raises(ParamsError, match=r"tune\.space\.train\.lr: the sampler grid needs"):
        list(space(space={"train.lr": {"float": [0.1, 0.2]}}).grid())


LR = {"train.lr": {"float": [0.01, 0.5]}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"space": {"train.lrr": {"float": [0, 1]}}}, r"tune\.space: unknown 'train.lrr'. Did you mean 'train.lr'\?"),
        ({"space": {"objective.temp": {"float": [1, 2]}}}, r"tune\.space: unknown 'objective\.temp'"),
        ({"space": {"seed": {"int": [0, 9]}}}, r"tune\.space: 'seed' is the same for all trials"),
        ({"space": {"data.test": {"float": [0.1, 0.2]}}}, r"'data\.test' is the same for all trials"),
        ({"space": LR, "fixed": {"train.bach_size": 3}}, r"tune\.fixed: unknown 'train\.bach_size'"),
        ({"space": {"train.lr": {"float": [0.5, 0.01]}}}, r"tune\.space\.train\.lr: .*\[0\.5, 0\.01\] is reversed"),
        ({"space": {"train.lr": {"float": [0.1, 0.1]}}}, r"tune\.space\.train\.lr: .* is empty"),
        ({"space": {"train.lr": {"float": [0.1]}}}, r"tune\.space\.train\.lr\.float: .*at least 2"),
        ({"space": {"train.lr": {"float": [0, 1], "log": True}}}, r"logarithmic range begins above 0"),
        ({"space": {"train.lr": {"float": [1, 2], "int": [1, 2]}}}, r"exactly one of"),
        ({"space": {"train.lr": {}}}, r"exactly one of"),
        ({"space": {"objective.name": {"choice": ["cskd", "cskd"]}}}, r"names a value twice"),
        ({"space": {}}, r"tune\.space: .*at least 1"),
        ({"space": {"train.momentum": {"float": [0.5, 1.0]}}}, r"train\.momentum: 1\.0 is no valid value"),
        ({"space": {"train.epochs": {"float": [1, 3]}}}, r"train\.epochs: 1\.0 is no valid value"),
        ({"space": {"objective.name": {"choice": ["cskd", "tfkd"]}}}, r"unknown 'tfkd'.*Valid: cross_entropy"),
        ({"space": {"objective.alpha": {"float": [0, 1]}}}, r"tune\.space: unknown 'objective\.alpha'"),
        ({"space": LR, "fixed": {"train.lr": 0.7}}, r"tune\.fixed\.train\.lr: 0\.7 is outside its range.*0\.01, 0\.5"),
        ({"space": {"train.lr": {"float": [0.2, 0.5]}}}, r"params\.yaml's own value 0\.1 is outside.*current_first"),
        ({"space": LR, "objectives": {"test/top1": "maximize"}}, r"tune\.objectives: unknown 'test/top1'.*Valid: val/"),
        ({"space": LR, "objectives": {"val/top1": "highest"}}, r"tune\.objectives\.val/top1"),
        ({"space": LR, "constraints": {"model/bites": {"at_most": 1}}}, r"tune\.constraints: unknown 'model/bites'"),
        ({"space": LR, "constraints": {"val/top1": {}}}, r"'at_least', 'at_most'"),
        ({"space": LR, "sampler": "cma"}, r"tune\.sampler"),
        ({"space": LR, "trials": 0}, r"tune\.trials"),
        ({"space": LR, "repeats": 0}, r"tune\.repeats"),
        (
            {"space": LR, "sampler": "gp", "pruner": "median", "constraints": {"val/nll": {"at_most": 1.0}}},
            r"tune\.sampler: 'gp' learns .* set tune\.pruner to none",
        ),
        ({"space": LR, "pruner": "race"}, r"tune\.pruner: 'race' .* set tune\.repeats to 2 or more"),
        ({"space": {"train.lr": {"float": [0.01, 0.5], "when": {"objective.nam": "x"}}}}, r"unknown 'objective\.nam'"),
    ],
)
def test_a_mistake_is_found_before_any_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message) as raised:
        space(**changes)
    assert "\n" not in str(raised.value)


# --- storage and ledger ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project."""
    for name in ("DVC_ROOT", "DVC_STAGE", "EPSD_COPY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["journal", "sqlite"])
def made(request: pytest.FixtureRequest, folder: Path) -> Space:
    """A space whose study is in a journal or in a database."""
    return space(storage=None if request.param == "journal" else f"sqlite:///{folder}/optuna.db")


def begin(of: Space, trials: int = 4, resume: bool = False, data: str = "d") -> Ledger:
    return study.begin(study.open_storage(of.tune), of, data, trials, resume)[0]


def take(ledger: Ledger, of: Space, seed: int = 0) -> Any:
    """Claim a trial and let the sampler fill it."""
    view = Ledger(ledger.storage, "quick", sampler=study.sampler(of.tune, seed))
    if (trial := view.claim(view.trials())) is not None:
        of.suggest(trial)
    return trial


def states(ledger: Ledger) -> list[str]:
    return [trial.state.name for trial in ledger.trials()]


def test_the_first_trial_is_params_yaml_also_when_it_is_put_back(made: Space) -> None:
    ledger = begin(made, trials=2)
    assert take(ledger, made).params == made.current()
    ledger.give_up(ledger.trials()[0], "interrupted")
    take(ledger, made)
    again = take(ledger, made)
    assert again.params == made.current() and again.user_attrs["origin"] == "params.yaml"
    assert search.tally(ledger.trials()) == {"complete": 0, "pruned": 0, "failed": 0, "retried": 1, "running": 2}


def test_the_same_name_again_is_never_an_accident(made: Space) -> None:
    take(begin(made), made)
    with pytest.raises(TuningError, match=r"study 'quick' is already in .* with 0 trials done and is being worked on"):
        begin(made)
    assert len(begin(made, resume=True).trials()) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"space": {"train.lr": {"float": [0.01, 0.6]}}}, r"tune\.space\.\S+ was .* and is now"),
        ({"fixed": {"prune.sparsity": 0.9}}, r"tune\.fixed\.prune\.sparsity was 0\.8 and is now 0\.9"),
        ({"objectives": {"val/nll": "minimize"}}, r"tune\.objectives\.val/nll was None and is now 'minimize'"),
        ({"constraints": {"val/top1": {"at_least": 0.5}}}, r"tune\.constraints\.val/top1"),
        ({"repeats": 3}, r"tune\.repeats was 1 and is now 3"),
    ],
)
def test_another_search_under_the_same_name_is_refused(made: Space, change: dict[str, Any], message: str) -> None:
    begin(made)
    other = space(**{"storage": made.tune.storage, **change})
    with pytest.raises(TuningError, match=message):
        begin(other, resume=True)


def test_other_data_or_parameters_are_another_study(made: Space) -> None:
    begin(made)
    with pytest.raises(TuningError, match="other data"):
        begin(made, resume=True, data="e")
    content = tree(storage=made.tune.storage)
    content["train"]["epochs"] = 3
    with pytest.raises(TuningError, match=r"train\.epochs was 2 and is now 3"):
        begin(Space(parse(content)), resume=True)
    content["train"]["epochs"] = 2
    content["train"]["lr"] = 0.2  # is searched, so that `--apply` and `--resume` go together
    begin(Space(parse(content)), resume=True)


def test_other_code_is_another_study(made: Space, edit: Callable[..., None]) -> None:
    begin(made)
    edit("scores/snip.py", "figures/style.py", "tracking/runs.py")  # chosen by no trial; of no number
    begin(made, resume=True)
    edit("objectives/cskd.py")
    with pytest.raises(TuningError, match=r"other code: objectives/cskd\.py changed since"):
        begin(made, resume=True)


def test_a_study_of_somebody_else_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "PATIENCE", 0.3)
    of = space()
    optuna.create_study(study_name="quick", storage=study.open_storage(of.tune))
    with pytest.raises(TuningError, match="was not made by `epsd tune`"):
        begin(of, resume=True)


def test_one_worker_repeats_a_search_and_a_resumed_one_brings_new_points(folder: Path) -> None:
    def points(name: str, sessions: list[int]) -> list[Any]:
        of = space(study=name, sampler="random")
        for count in sessions:
            ledger = begin(of, trials=count, resume=True)
            existing = sum(trial.state != TrialState.WAITING for trial in ledger.trials())
            drawn = study.sampler(of.tune, worker.worker_seed(parse(tree()), existing, 0, ""))
            view = Ledger(ledger.storage, name, sampler=drawn)
            while (trial := view.claim(view.trials())) is not None:
                of.suggest(trial)
                view.finish(trial, 0.5)
        return [trial.params for trial in ledger.trials()]

    once, again, resumed = points("a", [6]), points("b", [6]), points("c", [3, 6])
    assert once == again
    assert once[:3] == resumed[:3]
    assert len({json.dumps(point, sort_keys=True) for point in resumed}) == 6


@pytest.mark.parametrize("name", ["tpe", "gp", "nsga2", "random"])
def test_every_sampler_fills_conditional_trials(name: str, folder: Path) -> None:
    of = space(sampler=name, objectives={"val/top1": "maximize", "model/parameters_nonzero": "minimize"}, fixed={})
    storage = begin(of, trials=7).storage
    ledger = Ledger(storage, "quick", sampler=study.sampler(of.tune, 3), pruner=study.pruner(of.tune, 9))
    while (trial := ledger.claim(ledger.trials())) is not None:
        assert of.params(of.suggest(trial))
        trial.set_constraint("size", -1.0)
        ledger.finish(trial, [trial.params["train.lr"], trial.params["prune.sparsity"]])
    assert states(ledger) == ["COMPLETE"] * 7


def test_a_grid_is_laid_down_as_waiting_trials(folder: Path) -> None:
    of = space(
        sampler="grid",
        space={"objective.name": {"choice": ["cskd", "pskd"]}, "train.nesterov": {"choice": [True, False]}},
    )
    ledger = begin(of, trials=20)
    assert len(ledger.slots) == 4
    points = [take(ledger, of).params for _ in range(4)]
    assert points[0] == of.current()
    assert len({json.dumps(point, sort_keys=True) for point in points}) == 4


def test_a_grid_goes_on_with_the_points_that_are_left(folder: Path) -> None:
    axes = {"train.weight_decay": {"choice": [0.0, 5e-4]}, "train.epochs": {"int": [2, 3]}}
    of = space(sampler="grid", space=axes)
    grid = list(of.grid())
    for asked in (2, 3, 3, 20, 20):
        ledger = begin(of, trials=asked, resume=True)
        while (trial := take(ledger, of)) is not None:
            ledger.finish(trial, 0.5)
    done = [trial.params for trial in ledger.trials()]
    assert len(done) == len(ledger.slots) == len(grid) and all(point in done for point in grid)


def test_a_grid_ends_with_params_yaml_and_all_its_points(folder: Path) -> None:
    of = space(sampler="grid", space={"train.lr": {"float": [0.03, 0.13], "step": 0.05}})
    for _ in range(2):
        ledger = begin(of, trials=20, resume=True)
        assert len(ledger.slots) == 4 and of.current() not in list(of.grid())
    taken = [take(ledger, of) for _ in range(2)]
    ledger.finish(taken[0], 0.5)
    ledger.give_up(ledger.trials()[1], "killed")
    assert len(begin(of, trials=20, resume=True).slots) == 4
    assert sorted(states(ledger)) == ["COMPLETE", "FAIL", "WAITING", "WAITING", "WAITING"]


# --- one worker, in this process ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with prepared digits."""
    place = tmp_path_factory.mktemp("prepared")
    write(place)
    done = subprocess.run(
        [warm.python(), ROOT / "stages/prepare.py"], cwd=place, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return place


def environment(**more: str) -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if k not in ("DVC_ROOT", "DVC_STAGE", "MLFLOW_TRACKING_URI", "EPSD_COPY")
    }
    return {**kept, **more}


def write(place: Path, **changes: Any) -> None:
    """params.yaml of a project, with the shipped file's comments."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda made, _: made.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    content = yaml.load((ROOT / "params.yaml").read_text())
    for key, value in {**QUICK, **changes}.items():
        override(content, key, value)
    with (place / "params.yaml").open("w") as file:
        yaml.dump(content, file)
    (place / "dvc.yaml").write_text("stages: {}\n")


@pytest.fixture
def project(prepared: Path, folder: Path) -> Path:
    """A fresh copy of it, as the current folder."""
    shutil.copytree(prepared / "artifacts", folder / "artifacts")
    write(folder)
    return folder


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow is not told of epochs: of hundreds, that no training took a moment for, nothing else would take longer."""
    monkeypatch.setattr("epsd.tracking.recording.Tracker.epoch", lambda *_: None)


class TestTrial:
    def test_never_reads_the_test_split(self, project: Path) -> None:
        for path in (project / "artifacts/data").glob("test*"):
            path.unlink()
        params = parse(tree())
        figures = judge.run(params, Prepared.load(artifacts.DATA), lambda record, figures: None)
        assert set(figures) == set(judge.FIGURES)  # no file was made, since nothing asks for what it takes
        assert figures["model/sparsity"] == pytest.approx(0.95, abs=1e-3)

    def run(self, project: Path, monkeypatch: pytest.MonkeyPatch, result: Callable[..., Any], **changes: Any) -> Ledger:
        """All trials of a study, judged by `result(number, watch)` instead of a training."""
        count = iter(range(1000))
        monkeypatch.setattr(judge, "run", lambda params, data, watch: result(next(count), watch))
        return self.work(**changes)

    @pytest.mark.filterwarnings("ignore:no weight survives")
    def test_narrow_networks_are_searched_by_what_their_files_take(self, project: Path) -> None:
        """Of accuracy and latency a front, with its figure; what a file may weigh is kept to."""
        latency, size = judge.MEASURED
        asked = {
            "objectives": {"val/top1": "maximize", latency: "minimize"},
            "constraints": {size: {"at_most": 120_000}},
        }
        fixed = {"prune.sparsity": 0.0, "prune.structure": "channels", "prune.round_to": 4, "architecture.width": 1.0,
                 "train.epochs": 1}  # fmt: skip
        space = {
            "prune.macs": {"float": [0.1, 0.9]},
            "prune.allocation": {"choice": ["uniform", "random"]},
            "prune.floor": {"float": [0.4, 0.6]},
        }
        ledger = self.work(**asked, fixed=fixed, space=space, sampler="random", trials=3, current_first=False)
        trials = ledger.study.get_trials(deepcopy=False)
        assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
        figures = [trial.user_attrs["figures"] for trial in trials]
        assert all(
            trial.values == [each["val/top1"], each[latency]] for trial, each in zip(trials, figures, strict=True)
        )
        assert all(set(each) == {*judge.FIGURES, *judge.MEASURED} and each[latency] > 0 for each in figures)
        fits = [trial.number for trial, each in zip(trials, figures, strict=True) if each[size] <= 120_000]
        assert {trial.number for trial in report.best(ledger.study)} <= set(fits)
        assert 0 < len(fits) < len(trials), [each[size] for each in figures]
        table = report.table(ledger.study, list(asked["objectives"]))
        assert "Pareto front" in table and latency in table and size in table
        assert project / "pareto.png" in report.figures(ledger.study, list(asked["objectives"]), project)

    def work(self, **changes: Any) -> Ledger:
        """One worker, until all trials are done."""
        params = parse(tree(**changes))
        ledger, _ = study.begin(study.open_storage(params.tune), Space(params), "d", params.tune.trials, False)
        told = {**params.model_dump(), "tune": params.tune.model_dump(by_alias=True)}
        job = worker.Job(told, 1, 1, "", [])
        worker.Worker(job).work()
        return ledger

    def test_constraints_and_figures_are_kept(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def result(number: int, watch: Any) -> judge.Figures:
            return dict.fromkeys(judge.FIGURES, 0.0) | {
                "val/top1": 0.9 + number / 100,
                "model/bytes_sparse": 100.0 * number,
            }

        limits = {"model/bytes_sparse": {"at_most": 150.0}, "val/top1": {"at_least": 0.9}}
        ledger = self.run(project, monkeypatch, result, constraints=limits)
        assert [report.feasible(trial) for trial in ledger.trials()] == [True, True, False, False]
        assert [trial.number for trial in report.best(ledger.study)] == [1, 0]
        assert ledger.trials()[3].constraints == {
            "model/bytes_sparse at most 150": 150.0, "val/top1 at least 0.9": pytest.approx(-0.03),
        }  # fmt: skip

    def test_a_failed_trial_keeps_its_error_and_another_takes_its_place(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def result(number: int, watch: Any) -> judge.Figures:
            if number == 1:
                raise TuningError("too bad")
            return dict.fromkeys(judge.FIGURES, 0.5)

        ledger = self.run(project, monkeypatch, result)
        assert sorted(states(ledger)) == ["COMPLETE"] * 4 + ["FAIL"]
        assert ledger.trials()[1].user_attrs["error"] == "TuningError: too bad"
        assert search.tally(ledger.trials())["failed"] == 1

    def test_a_stop_between_the_ends_of_a_trial_and_of_its_run_waits(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish = Ledger.finish

        def finish_and_stop(ledger: Ledger, *arguments: Any) -> None:
            finish(ledger, *arguments)
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Ledger, "finish", finish_and_stop)
        with pytest.raises(processes.Stopped), processes.stops():
            self.run(project, monkeypatch, lambda number, watch: dict.fromkeys(judge.FIGURES, 0.5))
        assert states(ledger_of()) == ["COMPLETE", *["WAITING"] * 3]
        (logged,) = runs().values()
        assert logged["status"] == "FINISHED" and logged["trial.state"] == "COMPLETE"

    def test_all_failing_ends_early(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def result(number: int, watch: Any) -> judge.Figures:
            raise ValueError(f"no {number}")

        ledger = self.run(project, monkeypatch, result, trials=50)
        assert states(ledger).count("FAIL") == worker.HOPELESS
        first, *_ = failures(ledger.trials())
        assert first.user_attrs["error"] == "ValueError: no 0"

    def test_repeats_are_of_other_seeds_and_splits_and_the_mean_counts(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[int, bytes]] = []

        def once(params: Any, data: Prepared, watch: Any) -> judge.Figures:
            number = len(seen) % 3
            seen.append((params.seed, data.images("validation").tobytes()))
            watch({"epoch": 1.0, "val/top1": 0.1}, dict)
            return dict.fromkeys(judge.FIGURES, 0.5) | {"val/top1": (0.9, 0.6, 0.75)[number]}

        monkeypatch.setattr(judge, "run", once)
        ledger = self.work(repeats=3, trials=2)
        assert len(seen) == 6 and seen[:3] == seen[3:]  # every trial: the same seeds and splits
        assert len(set(seen[:3])) == 3 and len({images for _, images in seen[:3]}) == 3
        assert seen[0] == (0, Prepared.load(artifacts.DATA).images("validation").tobytes())
        for trial in ledger.trials():
            assert trial.values == [pytest.approx(0.75)]
            assert [figures["val/top1"] for figures in trial.user_attrs["repeats"]] == [0.9, 0.6, 0.75]
            assert trial.user_attrs["deviations"]["val/top1"] == pytest.approx(0.15)
            assert trial.intermediate_values == {
                1: 0.1
            }  # of the first repeat: the curves of all trials are of one seed

    def test_a_race_runs_the_best_third_on_further_seeds(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # trial 0 is params.yaml: poor, but the measure; 1 and 2 come before there is one; 5 begins with a lucky seed
        levels = {
            0: [0.1, 0.1, 0.1],
            1: [0.5, 0.5, 0.5],
            2: [0.6, 0.6, 0.6],
            3: [0.2],
            4: [0.7, 0.7, 0.7],
            5: [0.8, 0.2],
        }
        runs: list[int] = []

        def once(params: Any, data: Prepared, watch: Any) -> judge.Figures:
            trial = next(trial.number for trial in ledger_of().trials() if trial.state == TrialState.RUNNING)
            runs.append(trial)
            return dict.fromkeys(judge.FIGURES, levels[trial][runs.count(trial) - 1])

        monkeypatch.setattr(judge, "run", once)
        ledger = self.work(repeats=3, trials=6, pruner="race", sampler="random")
        assert states(ledger) == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "PRUNED"]
        assert [runs.count(number) for number in range(6)] == [3, 3, 3, 1, 3, 2]
        assert ledger.trials()[4].intermediate_values == {1: 0.7, 2: pytest.approx(0.7)}
        assert ledger.trials()[5].user_attrs["figures"]["val/top1"] == pytest.approx(0.5)
        assert report.best(ledger.study)[0].number == 4

    @pytest.mark.usefixtures("no_curves")
    @pytest.mark.parametrize("pruner", ["hyperband", "median"])
    def test_poor_curves_are_cut(self, pruner: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def result(number: int, watch: Any) -> judge.Figures:
            top1 = 0.9 if number < 4 else 0.1
            for epoch in range(1, 28):
                record = {"epoch": float(epoch), "val/top1": top1}
                watch(record, lambda: dict.fromkeys(judge.FIGURES, top1))
            return dict.fromkeys(judge.FIGURES, top1)

        content = {"pruner": pruner, "trials": 12, "sampler": "random"}
        monkeypatch.setitem(QUICK, "train.epochs", 27)
        ledger = self.run(project, monkeypatch, result, **content)
        trials = ledger.trials()
        assert all(trial.state in DONE for trial in trials)
        pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
        assert len(pruned) >= 4
        assert all(trial.user_attrs["figures"]["val/top1"] == 0.1 for trial in pruned)
        assert all(len(trial.intermediate_values) < 26 for trial in pruned)

    @pytest.mark.usefixtures("no_curves")
    @pytest.mark.parametrize("pruner", ["race", "hyperband", "median"])
    def test_no_trial_outlives_another_by_breaking_a_limit(
        self, pruner: str, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The odd ones are larger than allowed and all the more accurate."""
        seen: list[int] = []

        def once(params: Any, data: Prepared, watch: Any) -> judge.Figures:
            trial = next(trial.number for trial in ledger_of().trials() if trial.state == TrialState.RUNNING)
            seen.append(trial)
            odd = trial % 2
            top1 = 0.5 + 0.3 * odd + 0.01 * trial
            told = dict.fromkeys(judge.FIGURES, 0.5) | {"val/top1": top1, "model/bytes_sparse": 100.0 + odd}
            for epoch in range(1, 28):
                watch({"epoch": float(epoch), "val/top1": top1}, lambda: told)
            return told

        monkeypatch.setattr(judge, "run", once)
        monkeypatch.setitem(QUICK, "train.epochs", 27)
        limits = {"model/bytes_sparse": {"at_most": 100.0}}
        ledger = self.work(repeats=2, trials=12, pruner=pruner, sampler="random", constraints=limits)
        odd, even = ([trial for trial in ledger.trials()[4:] if trial.number % 2 == rest] for rest in (1, 0))
        whole = [sum(trial.state == TrialState.COMPLETE for trial in some) for some in (odd, even)]
        assert whole[0] < whole[1]
        assert all(trial.constraints == {"model/bytes_sparse at most 100": 1.0} for trial in odd)
        assert all(report.feasible(trial) for trial in report.best(ledger.study))

    def test_the_same_values_are_not_run_twice(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        runs = []

        def result(number: int, watch: Any) -> judge.Figures:
            runs.append(number)
            return dict.fromkeys(judge.FIGURES, float(number))

        ledger = self.run(
            project,
            monkeypatch,
            result,
            space={"train.nesterov": {"choice": [True, False]}},
            sampler="random",
            trials=8,
        )
        assert states(ledger) == ["COMPLETE"] * 8
        assert len(runs) == 2
        assert {trial.values[0] for trial in ledger.trials()} == {0.0, 1.0}


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_figures_within_the_limits_have_more_merit_than_all_others(direction: str) -> None:
    limits = {"val/top1": {"at_least": 0.9}}
    tune = parse(tree(objectives={"model/bytes_sparse": direction}, constraints=limits)).tune
    sign = 1 if direction == "maximize" else -1
    merits = [
        sign * worker.merit(tune, {"val/top1": top1, "model/bytes_sparse": size})
        for top1, size in ((0.3, 1e8), (0.5, 5.0), (0.89, 1e8), (0.9, 1e9 if sign < 0 else 0.0), (0.95, 3e5))
    ]
    assert merits == sorted(merits)


# --- result ---------------------------------------------------------------------------------------------------------


def finished(values: list[list[float]], directions: list[str], **more: Any) -> optuna.Study:
    made = optuna.create_study(directions=directions)
    for number, value in enumerate(values):
        figures = dict.fromkeys(judge.FIGURES, 0.5)
        made.add_trial(
            create_trial(
                values=value,
                params={"train.lr": 0.1 + number / 100, "objective.name": "cskd" if number % 2 else "dlb"},
                distributions={
                    "train.lr": optuna.distributions.FloatDistribution(0.01, 0.9),
                    "objective.name": optuna.distributions.CategoricalDistribution(["cskd", "dlb"]),
                },
                user_attrs={"figures": figures, "slot": number, **({"origin": "params.yaml"} if number == 0 else {})},
                intermediate_values={1: 0.5, 2: 0.6} if len(directions) == 1 else {},
                **more,
            )
        )
    return made


def test_best_of_one_objective() -> None:
    up = finished([[0.5], [0.9], [0.7], [0.9]], ["maximize"])
    assert [trial.number for trial in report.best(up)] == [1, 3, 2, 0]
    assert report.chosen(up, None).number == 1
    assert report.chosen(up, 2).number == 2
    with pytest.raises(TuningError, match=r"trial 9 is not in it\. Complete trials, best first: 1, 3, 2, 0"):
        report.chosen(up, 9)


def test_equal_accuracy_is_ranked_by_nll() -> None:
    up = finished([[0.5], [0.9], [0.7], [0.9]], ["maximize"])
    report.best(up)[1].user_attrs["figures"]["val/nll"] = 0.1
    assert [trial.number for trial in report.best(up)] == [3, 1, 2, 0]


def repeated(*seeds: list[float]) -> optuna.Study:
    """A study whose trials were judged by validation top-1 with several seeds."""
    values = [[sum(each) / len(each)] for each in seeds]
    made = finished(values, ["maximize"])
    for trial, each in zip(made.get_trials(deepcopy=False), seeds, strict=True):
        done = [dict.fromkeys(judge.FIGURES, value) for value in each]
        trial.user_attrs |= {"repeats": done, "figures": judge.means(done), "deviations": judge.deviations(done)}
    return made


def test_what_is_told_of_repeated_trials_is_the_mean_and_which_seed_comes_again(tmp_path: Path) -> None:
    made = repeated([0.5, 0.5, 0.8], [0.7, 0.8, 0.9])
    best = report.best(made)[0]
    assert best.number == 1
    gain = report.against_current(made, best, "val/top1")
    assert "trial 1 against params.yaml: val/top1 +0.2000 (standard error 0.0577 over 3 seeds" in gain
    assert report.against_current(made, report.current(made), "val/top1") == ""
    told = report.judged(best)
    assert "0.8000, the mean of 3 seeds (standard deviation 0.1000)" in told and told.endswith("runs, 0.7000")
    table = report.table(made, ["val/top1"])
    assert "means of 3 seeds" in table and "standard deviation" in table
    first_seed = table.split("as dvc repro runs it")[1].split("\n")[0]
    assert first_seed.replace("│", " ").split() == ["0.7", "0.5"]

    made.set_user_attr("epsd", {"objectives": ["val/top1"]})
    report.export(made, tmp_path / "trials.csv")
    import pandas as pd

    frame = pd.read_csv(tmp_path / "trials.csv")
    assert list(frame["val/top1 repeat 0"]) == [0.5, 0.7] and list(frame["repeats"]) == [3, 3]
    assert frame["val/top1 sd"][1] == pytest.approx(0.1)


def test_the_front_holds_what_nothing_beats() -> None:
    front = finished([[0.9, 500], [0.8, 100], [0.7, 300], [0.95, 900], [0.9, 500]], ["maximize", "minimize"])
    assert sorted(trial.number for trial in report.best(front)) == [0, 1, 3]
    with pytest.raises(TuningError, match="the front has 3 trials: choose one of"):
        report.chosen(front, None)


def test_the_table_shows_parameters_figures_and_the_present() -> None:
    text = report.table(finished([[0.1], *[[0.5 + n / 100] for n in range(8)]], ["maximize"]), ["val/top1"])
    assert "trial 8" in text and "trial 0" in text and "params.yaml" in text
    assert "train.lr" in text and "val/top1" in text and "trial 1 " not in text


@pytest.mark.parametrize("names", [["val/top1"], ["val/top1", "model/parameters_nonzero"]])
def test_figures_are_whole_files_that_work_offline(names: list[str], tmp_path: Path) -> None:
    values = [[0.5 + n / 20, 100.0 * n][: len(names)] for n in range(6)]
    files = report.figures(finished(values, ["maximize", "minimize"][: len(names)]), names, tmp_path)
    found = {path.name.split("-")[0].split(".")[0] for path in files}
    assert found == {"study", "history", "importances", "parallel", "slice", "curves" if len(names) == 1 else "pareto"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files if path.suffix == ".png")
    page = (tmp_path / "study.html").read_text()
    assert page.count("Plotly.newPlot(") >= len(files) - 1
    assert "<script src=" not in page and "cdn.plot.ly" not in page.split("Plotly.newPlot(")[-1]


def test_export_is_one_line_per_trial(tmp_path: Path) -> None:
    import pandas as pd

    assert report.export(finished([[0.5], [0.6]], ["maximize"]), tmp_path / "trials.csv") == 2
    frame = pd.read_csv(tmp_path / "trials.csv")
    assert list(frame["trial"]) == [0, 1]
    assert list(frame["train.lr"]) == [0.1, 0.11]
    assert {"state", "val/top1", "error", "objective.name"} <= set(frame.columns)


class TestApply:
    def applied(self, folder: Path, values: dict[str, Any], threads: int = 1) -> tuple[str, str, Path | None]:
        write(folder)
        params = load()
        ledger = begin(Space(params), trials=1)
        frozen = create_trial(value=0.5, user_attrs={"threads": threads})
        frozen.params, frozen.distributions = values, {}
        before = Path("params.yaml").read_text()
        copy = report.apply(ledger.study, frozen, params)
        return before, Path("params.yaml").read_text(), copy

    def test_writes_the_values_and_keeps_every_comment(self, folder: Path) -> None:
        values = {"objective.name": "cskd", "objective.temperature": 2.5, "prune.score.steps": 5, "train.lr": 1e-05}
        before, after, copy = self.applied(folder, values)
        assert copy is not None and copy.read_text() == before
        changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
        assert len(changed) == 4  # the three and the fixed sparsity
        assert all(a.partition("#")[2] == b.partition("#")[2] for a, b in changed)
        assert load().prune.sparsity == 0.8 and load().train.lr == 1e-05 and load().objective["temperature"] == 2.5
        import yaml

        assert yaml.safe_load(after)["train"]["lr"] == 1e-05  # other readers hold to YAML 1.1

    @pytest.mark.parametrize("name", presets.names())
    def test_no_other_line_of_a_shipped_file_changes(self, name: str) -> None:
        before = presets.whole(name)
        after = report._rewritten(before, {"train.lr": 0.123, "objective.name": "dlb", "train.clip_norm": None})
        lines = zip(before.splitlines(), after.splitlines(), strict=True)
        changed = [after for line, after in lines if line != after]
        assert {line.split(":")[0].strip() for line in changed} <= {"lr", "name", "clip_norm"} and len(changed) <= 3

    def test_another_variant_brings_its_settings_alone(self, folder: Path) -> None:
        _, after, _ = self.applied(folder, {"objective.name": "pskd"})
        assert load().objective == {"name": "pskd"}
        assert "# cross_entropy | cskd | pskd | dlb" in after
        assert load().tune.space.keys() == parse(tree()).tune.space.keys()

    def test_the_threads_of_the_trial_are_part_of_it(self, folder: Path) -> None:
        self.applied(folder, {}, threads=3)
        assert load().threads == 3

    def test_nothing_to_change_makes_no_copy(self, folder: Path) -> None:
        self.applied(folder, {})
        ledger = Ledger(study.open_storage(load().tune), "quick")
        frozen = create_trial(value=0.5, user_attrs={"threads": 1})
        assert report.apply(ledger.study, frozen, load()) is None


# --- the command, with real workers ---------------------------------------------------------------------------------


def tune(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm.python(), *TUNE, *arguments], capture_output=True, text=True, timeout=300, env=environment(**more)
    )


def runs() -> dict[str, dict[str, str]]:
    """Name -> tags and status of every MLflow run."""
    with sqlite3.connect("mlflow.db") as link:
        found = {
            run: {"name": name, "status": status}
            for run, name, status in link.execute("SELECT run_uuid, name, status FROM runs")
        }
        for run, key, value in link.execute("SELECT run_uuid, key, value FROM tags"):
            found[run][key] = value
    return {f"{tags['name']}": tags | {"run_id": run} for run, tags in found.items()}


def metric(run: str, key: str) -> float:
    """What the MLflow UI shows as the figure of a run."""
    with sqlite3.connect("mlflow.db") as link:
        (value,) = link.execute(
            "SELECT value FROM latest_metrics WHERE run_uuid = ? AND key = ?", (run, key)
        ).fetchone()
    return float(value)


def running(of: Callable[[], Ledger], epochs: int = 1) -> Iterator[Any]:
    """Trials in mid-training, as they come."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for trial in of().trials():
            if trial.state == TrialState.RUNNING and len(trial.intermediate_values) >= epochs:
                yield trial
        time.sleep(0.1)
    raise AssertionError("no trial got that far")


def ledger_of() -> Ledger:
    return Ledger(study.open_storage(load().tune), "quick")


def count_done(ledger: Ledger) -> int:
    assert not {"RUNNING", "WAITING"} & set(states(ledger))
    return sum(trial.state in DONE for trial in ledger.trials())


@pytest.mark.slow
def test_search_apply_and_the_pipeline_gives_the_same_accuracy(project: Path) -> None:
    write(project, **{"tune.trials": 3, "tune.repeats": 2, "threads": None})
    done = tune("--trials", "3", "--workers", "2", "--export", "trials.csv", EPSD_QUIET="0")
    assert done.returncode == 0, done.stderr
    assert "Best trials" in done.stdout and "Next: epsd tune --apply" in done.stdout
    assert "tune: held fixed: prune.sparsity 0.8 (params.yaml: " in done.stdout
    assert "are in the run 'tune-quick'" in done.stdout
    assert [line.split()[1] for line in done.stderr.splitlines() if line.startswith("tune: ")][-1] == "3/3"
    ledger = ledger_of()
    assert count_done(ledger) == 3
    assert len(Path("trials.csv").read_text().splitlines()) == 4

    logged = runs()
    parent = logged["tune-quick"]
    assert parent["kind"] == "search" and parent["status"] == "FINISHED"
    for number in range(3):
        child = logged[f"trial-{number}"]
        assert child["mlflow.parentRunId"] == parent["run_id"]
        assert (child["kind"], child["trial.state"], child["status"]) == ("trial", "COMPLETE", "FINISHED")
    uploaded = {path.name for path in (project / "mlruns" / parent["run_id"] / "artifacts").iterdir()}
    assert {"study.html", "history.png", "slice.png", "trials.csv", "params.yaml"} <= uploaded

    refused = tune()
    assert refused.returncode == 1 and "--resume" in refused.stderr and refused.stderr.count("\n") == 1
    best = report.best(ledger.study)[0]
    applied = tune("--apply")
    assert f"params.yaml is now trial {best.number}" in applied.stdout, applied.stderr
    assert "  prune.sparsity: 0.95 -> 0.8\n" in applied.stdout, "what changes, line by line"
    for name in ("prune", "train"):
        ran = subprocess.run(
            [warm.python(), ROOT / f"stages/{name}.py"], capture_output=True, text=True, env=environment()
        )
        assert ran.returncode == 0, ran.stderr
    history = artifacts.read_csv(artifacts.HISTORY)
    first, second = best.user_attrs["repeats"]
    assert history["val/top1"][-1] == first["val/top1"] and history["val/nll"][-1] == first["val/nll"]
    assert best.values[0] == pytest.approx((first["val/top1"] + second["val/top1"]) / 2)
    assert f"which `dvc repro` runs, {first['val/top1']:.4f}" in applied.stdout
    assert metric(logged[f"trial-{best.number}"]["run_id"], "val/top1") == best.values[0]
    assert metric(logged[f"trial-{best.number}"]["run_id"], "repeat/val/top1") == second["val/top1"]

    more = tune("--trials", "4", "--resume")
    assert more.returncode == 0, more.stderr
    assert count_done(ledger_of()) == 4
    assert runs()["trial-3"]["mlflow.parentRunId"] == parent["run_id"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "postgresql", "mysql"])
def test_a_killed_worker_loses_and_doubles_no_trial(kind: str, project: Path, request: pytest.FixtureRequest) -> None:
    """Exactly as many trials as asked end well, though a worker is killed with SIGKILL in mid-trial."""
    url = None
    if server := {"postgresql": postgres.server, "mysql": mysql.server}.get(kind):
        context = server()
        url = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
    write(project, **{"tune.storage": url, "tune.pruner": "median", "train.epochs": 25, "tune.heartbeat": 5})
    workers, trials = (4, 8) if kind == "postgresql" else (2, 4)
    process = subprocess.Popen(
        [warm.python(), *TUNE, "--workers", str(workers), "--trials", str(trials)],
        env=environment(MLFLOW_TRACKING_URI=f"sqlite:///{project}/mlflow.db"), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            ledger = ledger_of()
            ledger.facts["epsd"]
            break
        except KeyError:
            time.sleep(0.2)
    victim = next(running(lambda: ledger, epochs=2))
    os.kill(int(victim.user_attrs["owner"]["pid"]), signal.SIGKILL)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert count_done(ledger) == trials
    slots = [slot(trial) for trial in ledger.trials() if trial.state in DONE]
    assert sorted(slots) == list(range(trials))
    (retry,) = [trial for trial in ledger.trials() if trial.user_attrs.get("retry_of") == victim.number]
    assert retry.params == victim.params and retry.state in DONE
    assert retry.user_attrs["owner"]["pid"] != victim.user_attrs["owner"]["pid"]
    assert len({trial.user_attrs["owner"]["pid"] for trial in ledger.trials()}) >= workers
    assert runs()[f"trial-{victim.number}"]["status"] == "KILLED"


@pytest.mark.slow
def test_ctrl_c_leaves_everything_in_order(project: Path) -> None:
    write(project, **{"train.epochs": 200, "tune.pruner": "none"})
    process = subprocess.Popen(
        [sys.executable, *TUNE, "--trials", "2"], env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not Path("mlruns/optuna.journal").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    trial = next(running(ledger_of))
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "`epsd tune --resume` goes on" in out
    assert not psutil.pid_exists(int(trial.user_attrs["owner"]["pid"]))
    found = ledger_of().trials()
    assert [t.state.name for t in found if slot(t) == 0] == ["FAIL", "WAITING"]
    again = found[-1]
    assert again.user_attrs["retry_of"] == trial.number
    assert again.user_attrs["values"] == trial.params
    logged = runs()[f"trial-{trial.number}"]
    assert logged["status"] == "FAILED" and logged["trial.state"] == "INTERRUPTED"


@pytest.mark.slow
def test_a_search_that_always_fails_stops_and_shows_the_first_error(project: Path) -> None:
    write(project, **{"tune.fixed": {"train.lr": 1e6}, "tune.space": {"train.weight_decay": {"float": [0.0, 0.1]}}})
    done = tune("--trials", "30")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert (
        "3 trials failed, so the search was given up. The first error, of trial 0: TrainingError: the loss is" in last
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tune.space": {"train.lrr": {"float": [0, 1]}}}, "unknown 'train.lrr'"),
        ({"tune.storage": "/proc/nowhere/x"}, "cannot be used"),
        ({"data.validation": 0.3}, "data.json: made with data.validation 0.1, not 0.3. Run `dvc repro prepare` first."),
        ({"dataset": {"name": "image_folder", "root": "mine"}}, "made with dataset.name digits, not image_folder. Run"),
        ({"seed": 7}, "made with seed 0, not 7. Run"),
        ({}, ""),
    ],
)
def test_mistakes_are_one_line(
    change: dict[str, Any], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not message:
        shutil.rmtree(project / "artifacts")
        message = "artifacts/data/data.json: missing"
    write(project, **change)
    assert main(["tune"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (project / "mlflow.db").exists()


@pytest.mark.parametrize("arguments", [["--apply"], ["--export", "trials.csv"]])
def test_what_needs_a_study_or_trials_says_so(
    arguments: list[str], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(space(study="other"))
    assert main(["tune", *arguments]) == 1
    line = capsys.readouterr().err
    assert "tune.study: there is no study 'quick'" in line and line.endswith("Studies: other.\n")
    begin(space())
    assert main(["tune", *arguments]) == 1
    line = capsys.readouterr().err
    assert "study 'quick'" in line and ("no finished trial" in line or "no trial has begun" in line)
    assert not Path("trials.csv").exists()


@pytest.mark.parametrize("arguments", [["--trials", "0"], ["--workers", "-1"], ["--apply", "x"], ["--export"]])
def test_unknown_arguments_show_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tune", *arguments])
    assert stop.value.code == 2
    assert "usage: epsd tune" in capsys.readouterr().err
