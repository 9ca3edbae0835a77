"""A study: its file checked before any work, each cell once whatever is killed, the numbers those of the pipeline."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import psutil
import pytest
import torch
from ruamel.yaml import YAML

import pictures
from conftest import ROOT
from epsd.cli import main
from epsd.comparison import command
from epsd.data.prepared import Prepared
from epsd.evaluation import evaluate as evaluation
from epsd.masks import Mask
from epsd.pipeline.prune import initial, pruned
from epsd.pipeline.train import trained
from epsd.project.params import Params, load, read_yaml
from epsd.registry import ParamsError, variant
from epsd.studies import outcome, plan, queue, work
from epsd.studies.procedures import PROCEDURES, Desk, Trained
from epsd.studies.work import Place, mark
from epsd.tracking.runs import RunsError, read_runs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
QUICK = {
    "data.limit": 12, "architecture.width": 0.25, "train.epochs": 2, "train.batch_size": 32, "prune.batch_size": 32,
    "train.warmup_epochs": 0, "threads": 1, "evaluate.latency_repeats": 0, "prune.compare": False, "device": "cpu",
}  # fmt: skip
GRID = {
    "base": "digits",
    "set": QUICK,
    "scores": ["epsd", "random"],
    "objectives": ["cskd"],
    "sparsities": [0, 0.5, 0.8],
    "seeds": 2,
    "baseline": "random",
}


def write(path: Path, **changes: Any) -> Path:
    with path.open("w") as file:
        YAML(typ="safe").dump({**GRID, **changes}, file)
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder with the repository's presets."""
    return enter(tmp_path, monkeypatch)


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EPSD_QUIET", "1")
    monkeypatch.chdir(folder)
    (folder / "dvc.yaml").write_text("stages: {}\n")
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (folder / "presets").symlink_to(ROOT / "presets")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project in which the whole grid has been trained."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        patch.setenv("EPSD_QUIET", "0")
        with pytest.MonkeyPatch.context() as counting:
            made = []
            counting.setattr("epsd.studies.procedures.pipeline.scored", lambda *a: made.append(1) or scored(*a))
            assert main(["study", str(write(folder / "grid.yaml"))]) == 0
        assert len(made) == 4  # two scores, two seeds: not once more for the second sparsity
        yield folder


def scored(*arguments: Any) -> Any:
    from epsd.pipeline.prune import scored as real

    return real(*arguments)


# --- the file -------------------------------------------------------------------------------------------------------


def cells(path: Path) -> list[plan.Cell]:
    return plan.load(path).cells


def test_cells_seed_by_seed_and_the_dense_network_once(project: Path) -> None:
    found = cells(write(project / "grid.yaml"))
    assert [str(cell) for cell in found[:5]] == [
        "dense cskd s0 seed 0", "epsd cskd s0.5 seed 0", "epsd cskd s0.8 seed 0",
        "random cskd s0.5 seed 0", "random cskd s0.8 seed 0",
    ]  # fmt: skip
    assert len(found) == 10 and [cell.params.seed for cell in found] == [0] * 5 + [1] * 5
    assert all(cell.params.train.epochs == 2 for cell in found)


def test_further_seeds_differ_in_the_seed_alone_and_a_variants_own_has_the_last_word(project: Path) -> None:
    variants = [{"name": "fixed", "set": {"seed": 7, "train.lr": 0.05}}]
    both, *singly = (
        cells(write(project / "grid.yaml", seeds=seeds, variants=variants)) for seeds in ([3, 7], [3], [7])
    )
    assert both == [cell for found in singly for cell in found if cell.variant != "fixed" or found is singly[0]]
    assert {cell.params.seed for cell in both if cell.variant == "fixed"} == {7}


def test_defaults_are_the_base_itself(project: Path) -> None:
    """But for ONNX files, which take seconds for each cell: a study that wants them says so."""
    path = project / "one.yaml"
    path.write_text("base: params.yaml\n")
    (cell,) = cells(path)
    expected = load(project / "params.yaml").model_dump()
    expected["evaluate"]["export"]["onnx"] = False
    assert cell.params.model_dump() == expected
    path.write_text("base: params.yaml\nset: {evaluate.export.onnx: true}\n")
    assert cells(path)[0].params.evaluate.export.onnx
    assert plan.load(path).study.name == "one"


def test_settings_go_to_every_choice_that_has_them(project: Path) -> None:
    path = write(
        project / "grid.yaml", sparsities=[0.5], seeds=[4], objectives=["cskd", {"name": "dlb", "weight": 3.0}, "pskd"],
        scores=["epsd", "prospr", "random", {"name": "snip"}], set={"prune.score.steps": 5, "objective.weight": 2.0},
        vary={"prune.score.lr": [0.1, 0.2]},
    )  # fmt: skip
    found = cells(path)
    steps = {cell.params.prune.score["name"]: cell.params.prune.score.get("steps") for cell in found}
    assert steps == {"epsd": 5, "prospr": 5, "random": None, "snip": None}
    weights = {cell.params.objective["name"]: cell.params.objective.get("weight") for cell in found}
    assert weights == {"cskd": 2.0, "dlb": 3.0, "pskd": None}
    assert len(found) == 3 * (2 + 2 + 1 + 1)  # a learning rate that random and snip lack makes no second cell


def test_settings_go_to_the_bases_own_choices_too(project: Path) -> None:
    path = project / "own.yaml"
    write(
        path, sparsities=[0.5], seeds=1, set={"prune.score.steps": 5, "objective.weight": 2.0}, variants=[{"name": "v"}]
    )
    content = {key: value for key, value in read_yaml(path).items() if key not in ("scores", "objectives")}
    for scores in ({}, {"scores": [{"name": "epsd", "lr": 0.3}]}):
        with path.open("w") as file:
            YAML(typ="safe").dump({**content, **scores}, file)
        for cell in cells(path):
            assert cell.params.prune.score["steps"] == 5 and cell.params.prune.score["reading"] == "full"
            assert cell.params.objective == {"name": "cskd", "temperature": 4.0, "weight": 2.0}
    assert [cell.params.prune.score["lr"] for cell in cells(path)] == [0.3, 0.1]


def test_a_variant_has_the_last_word(project: Path) -> None:
    path = write(
        project / "grid.yaml", sparsities=[0.5], seeds=1, scores=["epsd"], objectives=["cskd", "dlb"],
        vary={"train.lr": [0.1, 0.2]},
        variants=[
            {"name": "shuffled", "set": {"prune.control": "shuffled"}},
            {"name": "simple", "set": {"prune.score": "snip", "objective": {"name": "pskd"}, "train.lr": 0.3}},
        ],
    )  # fmt: skip
    found = [cell for cell in cells(path) if cell.variant]
    assert [(cell.method, cell.params.objective["name"], cell.params.train.lr) for cell in found] == [
        ("shuffled", "cskd", 0.1), ("shuffled", "cskd", 0.2), ("simple", "pskd", 0.3),
        ("shuffled", "dlb", 0.1), ("shuffled", "dlb", 0.2),
    ]  # fmt: skip
    assert found[0].params.prune.score == load(ROOT / "params.yaml").prune.score


def test_a_dense_variant_is_named_where_it_is_another_network(project: Path) -> None:
    path = write(
        project / "grid.yaml", sparsities=[0], seeds=1, scores=[],
        variants=[
            {"name": "whole", "set": {"prune.scope": "erk"}},
            {"name": "slim", "set": {"architecture.width": 0.5}},
            {"name": "cut", "set": {"prune.structure": "channels"}},
        ],
    )  # fmt: skip
    found = cells(path)
    assert [cell.method for cell in found] == ["dense", "slim", "cut"]
    assert found[1].params.prune == found[0].params.prune


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"score": ["epsd"]}, "unknown 'score'. Did you mean 'scores'"),
        (
            {"scores": ["epsdd"]},
            "cell 'epsdd, cskd, sparsity 0.5': prune.score.name: unknown 'epsdd'. Did you mean 'epsd'",
        ),
        ({"scores": [{"name": "epsd", "step": 2}]}, "Did you mean 'steps'"),
        ({"objectives": ["cskdd"]}, "Did you mean 'cskd'"),
        ({"sparsities": [0.5, 1.0]}, "sparsities.1: input should be less than 1"),
        ({"sparsities": []}, "sparsities"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"set": {"train.epoch": 3}}, "Did you mean 'epochs'"),
        ({"set": {"trian.epochs": 3}}, "Did you mean 'train'"),
        ({"set": {"prune.score.step": 3}}, "Did you mean 'steps'. Valid: .*reading"),
        ({"set": {"objective.weigth": 3}}, "Did you mean 'weight'"),
        ({"vary": {"train.lr": [0.1, -1.0]}}, "train.lr: input should be greater than 0"),
        ({"vary": {"train.lr": 0.1}}, "vary.train.lr"),
        ({"variants": [{"name": "x", "sett": {}}]}, "variants.0: unknown 'sett'. Did you mean 'set'"),
        ({"variants": [{"name": "x", "set": {"prune.contrl": "none"}}]}, "Did you mean 'control'"),
        ({"variants": [{"name": "x"}, {"name": "x"}]}, "'x' is given twice"),
        ({"procedure": "pipelin"}, "procedure.name: unknown 'pipelin'. Did you mean 'pipeline'"),
        ({"base": "digit"}, "grid.yaml: base: preset: unknown 'digit'. Did you mean 'digits'"),
        ({"base": "there.yaml"}, "grid.yaml: base: .*there.yaml: no such file"),
        (
            {"seeds": "many"},
            "grid.yaml: seeds: input should be a valid list, or input should be a valid integer .given",
        ),
        ({"vary": {"prune": [1]}}, "prune: input should be a valid dictionary"),
        ({"name": "../x"}, "name: string should match pattern"),
        ({"scores": []}, "nothing to train"),
    ],
)
def test_mistakes_are_one_line_before_any_work(
    changes: dict[str, Any], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    path = write(project / "grid.yaml", **{"sparsities": [0.5], **changes})
    assert main(["study", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message.replace("?", "."), said), said
    assert not (project / ".epsd").exists() and not (project / "mlflow.db").exists()


def test_an_unknown_study_lists_the_shipped_ones(project: Path) -> None:
    with pytest.raises(ParamsError, match=r"Did you mean 'digits'\? Valid: .*cost-digits, digits"):
        plan.find("digit")
    with pytest.raises(ParamsError, match=r"no such file\. Shipped studies: .*cost-digits, digits"):
        plan.find("studies/digits.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "presets" / "studies").glob("*.yaml")))
def test_shipped_studies_are_whole(name: str, project: Path) -> None:
    made = plan.load(plan.find(name))
    assert made.study.name == name
    head = plan.find(name).read_text().split("\n")
    assert head[0].startswith(f"# {name}: ") and f" {len(made.cells)} models of " in head[0]
    assert head[1].startswith(f"# Command: epsd study {name}")


# --- what comes out -------------------------------------------------------------------------------------------------


def test_a_cell_is_what_the_pipeline_gives(finished: Path) -> None:
    """Shared scores or not, one process after many other cells: the same network to the bit, so the same figures."""
    made, place = plan.load(finished / "grid.yaml"), Place("grid")
    cell = next(cell for cell in made.cells if str(cell) == "epsd cskd s0.8 seed 1")
    data = place.data(cell.params, made.split_seed)
    result = place.result(mark(cell, data))
    assert result is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    mask, model, *_ = pruned(cell.params, data)
    history = trained(cell.params, data, model, mask, on_epoch=lambda record: None)
    test = evaluation.evaluate(model, data.batches("test", batch_size=256), ece_bins=15).metrics
    torch.set_num_threads(threads)
    assert result.metrics["train/loss"] == history[-1]["train/loss"]
    assert {name: result.metrics[f"test/{name}"] for name in test} == test
    assert result.metrics["mask/kept"] == mask.kept


def test_the_dense_twin_is_the_pipeline_at_sparsity_0(finished: Path) -> None:
    made, place = plan.load(finished / "grid.yaml"), Place("grid")
    cell = made.cells[0]
    data = place.data(cell.params, made.split_seed)
    mask, model, *_ = pruned(cell.params, data)
    assert mask.kept == mask.total
    torch.set_num_threads(1)
    history = trained(cell.params, data, model, mask, on_epoch=lambda record: None)
    result = place.result(mark(cell, data))
    assert result is not None and result.metrics["train/loss"] == history[-1]["train/loss"]


def test_every_cell_is_a_run_with_the_names_of_the_pipeline(finished: Path) -> None:
    frame = read_runs(["epsd"], ["study=grid", "kind=cell"])
    assert len(frame) == 10 and frame["name"].nunique() == 10
    assert "epsd-cskd-s0.8-seed1-digits" in set(frame["name"])
    names = {"test/top1", "test/ece", "test/nll", "val/top1", "train/loss", "time/train", "model/sparsity",
             "model/bytes_sparse", "time/evaluate"}  # fmt: skip
    assert names <= {column.removeprefix("metrics.") for column in frame.columns}
    pruned_runs = frame[frame["params.prune.sparsity"] == "0.8"]
    assert pruned_runs["metrics.mask/sparsity"].tolist() == pytest.approx([0.8] * 4, abs=1e-3)
    assert frame["tags.data.digest"].nunique() == 1  # the same test split for every seed
    (parent,) = set(frame["tags.mlflow.parentRunId"])
    summary = read_runs(["epsd"], ["tags.kind = 'study'"])
    assert summary["run_id"].tolist() == [parent]


def test_files_are_table_points_and_figure(finished: Path) -> None:
    folder = finished / "artifacts" / "studies" / "grid"
    assert {path.name for path in folder.iterdir()} == {
        "cells.csv", "table.md", "table.csv", "table.tex", "accuracy_against_sparsity.png",
        "accuracy_against_sparsity.csv", "cost_against_accuracy.png", "cost_against_accuracy.csv",
    }  # fmt: skip
    by_cell = pd.read_csv(folder / "cells.csv")
    assert len(by_cell) == 10
    table = pd.read_csv(folder / "table.csv")
    mean = by_cell[(by_cell["method"] == "epsd") & (by_cell["sparsity"] == 0.5)]["test/top1"].mean()
    row = table[(table["method"] == "epsd") & (table["sparsity"] == 0.5)].iloc[0]
    assert row["mean"] == pytest.approx(mean) and row["seeds"] == 2 and row["baseline"] == "random"
    points = pd.read_csv(folder / "accuracy_against_sparsity.csv")
    assert sorted(points["value"]) == sorted(by_cell["test/top1"])
    assert (folder / "accuracy_against_sparsity.png").read_bytes()[:4] == b"\x89PNG"


def test_the_study_and_the_store_give_the_same_table(finished: Path) -> None:
    made, place = plan.load(finished / "grid.yaml"), Place("grid")
    own = outcome.table([outcome.entry(*done) for done in work.results(made, place)], made.study)
    read = command.compared(command.Request(("epsd",), where=("study=grid",), baseline="random", best=True))
    assert {row.name: row.cells for row in own.rows} == {row.name: row.cells for row in read.rows}


def test_again_trains_nothing_and_more_seeds_train_only_those(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings: list[Any] = []
    monkeypatch.setattr(queue, "run_cell", lambda *a: trainings.append(a[3]))
    state = finished / ".epsd/studies/grid"
    left = state / "work" / next((state / "cells").iterdir()).stem  # of a kill right after the result
    left.mkdir(parents=True, exist_ok=True)
    for lost in ("nothing", "trials.journal", "cells"):  # what is left of either says what is done
        if (path := state / lost).exists():
            path.rename(state / f"{lost}.lost")
        assert main(["study", "grid.yaml"]) == 0
        assert "0 of 10 models to train (10 done)" in capsys.readouterr().out
    assert not left.exists()
    before, after = (
        {file.name: file.read_text() for file in (state / name).iterdir()} for name in ("cells.lost", "cells")
    )
    assert before == after
    write(finished / "more.yaml", name="grid", seeds=3)
    assert main(["study", "more.yaml", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.startswith("done") for line in listed] == [True] * 10 + [False] * 5
    assert not trainings


def test_quiet_says_nothing(finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPSD_QUIET", "0")
    assert main(["study", "grid.yaml", "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    assert main(["study", "none.yaml", "--quiet"]) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_another_parameter_is_another_cell(finished: Path) -> None:
    place, made = Place("grid"), plan.load(finished / "grid.yaml")
    data = place.data(made.cells[0].params, made.split_seed)
    same = plan.load(write(finished / "threads.yaml", set={**QUICK, "threads": 2, "detect.epochs": 3}))
    assert [mark(cell, data) for cell in same.cells] == [mark(cell, data) for cell in made.cells]
    other = plan.load(write(finished / "other.yaml", set={**QUICK, "train.lr": 0.05}))
    assert not {mark(cell, data) for cell in other.cells} & {mark(cell, data) for cell in made.cells}


# --- interruptions --------------------------------------------------------------------------------------------------


def begin(project: Path, *arguments: str, **more: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "epsd.cli", "study", "grid.yaml", *arguments]  # whole groups are killed
    environment = {**os.environ, "EPSD_QUIET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(command, cwd=project, env=environment, text=True, start_new_session=True, **more)


def wait_for(pattern: str, folder: Path, count: int = 1) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_and_again_gives_each_cell_once(project: Path) -> None:
    """Killed in the middle of a training, twice; the same command ends with one finished run per cell."""
    slow = {**QUICK, "train.epochs": 12, "data.limit": 40}
    write(project / "grid.yaml", sparsities=[0.5, 0.8], seeds=1, scores=["epsd"], set=slow)
    state = project / ".epsd" / "studies" / "grid"
    for number in (1, 0):
        process = begin(project)
        wait_for("work/*/last.safetensors" if number else "cells/*.json", state)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = {path.name: path.read_bytes() for path in (state / "cells").glob("*.json")}
    assert main(["study", "grid.yaml"]) == 0
    assert {name: (state / "cells" / name).read_bytes() for name in done} == done  # what was done was not done again
    frame = read_runs(["epsd"], ["kind=cell"])
    assert sorted(frame["params.prune.sparsity"]) == ["0.5", "0.8"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    for run_id in frame["run_id"]:
        steps = [point.step for point in client.get_metric_history(run_id, "train/loss")]
        assert sorted(steps) == list(range(1, 13))
    others = client.search_runs(["1"], "attributes.status != 'FINISHED'")
    assert not [run for run in others if run.data.tags.get("kind") == "cell"]
    assert not list((state / "work").iterdir())


@pytest.mark.slow
def test_two_workers_share_the_cells_and_outlive_nobody(project: Path) -> None:
    """The main process is killed: its workers end soon, and the same command goes on."""
    write(project / "grid.yaml", sparsities=[0.5, 0.8], seeds=1)
    process = begin(project, "--workers", "2")
    wait_for("cells/*.json", project / ".epsd/studies/grid")
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert begin(project, "--workers", "2").wait(timeout=240) == 0
    frame = read_runs(["epsd"], ["kind=cell"])
    assert len(frame) == 4
    assert len(list((project / ".epsd/studies/grid/cells").glob("*.json"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_ends_in_order(workers: str, project: Path) -> None:
    """One line, no traceback, nobody left, and the run of the cell under way is marked."""
    write(project / "grid.yaml", sparsities=[0.5], seeds=2, scores=["epsd"], set={**QUICK, "train.epochs": 400})
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = begin(project, "--workers", workers, **pipe)
    wait_for("work/*/last.safetensors", project / ".epsd/studies/grid")
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "`epsd study grid.yaml` goes on" in said and "Traceback" not in said
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    assert not client.search_runs(["1"], "attributes.status = 'RUNNING'")
    assert client.search_runs(["1"], "attributes.status = 'FAILED' and tags.kind = 'cell'")


def test_no_cell_begins_after_the_minutes(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPSD_QUIET", "0")
    write(project / "grid.yaml", sparsities=[0.5], seeds=1)
    assert main(["study", "grid.yaml", "--minutes", "1e-9"]) == 1
    said = capsys.readouterr()
    assert "2 of 2 models to train" in said.out
    assert "0 of 2 cells are done. `epsd study grid.yaml` goes on." in said.err


def test_a_cell_that_cannot_be_trained_stops_no_other(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPSD_QUIET", "0")
    write(project / "grid.yaml", sparsities=[0.5], seeds=1, vary={"train.lr": [0.1, 1e6]}, scores=["random"])
    assert main(["study", "grid.yaml"]) == 1
    said = capsys.readouterr()
    assert "1 cells failed" in said.err and "the loss is nan" in said.err.lower()
    assert "1 of 2 cells are done" in said.err
    assert len(read_runs(["epsd"], ["kind=cell"])) == 1


def test_scores_over_rounds_are_not_shared_over_sparsities(project: Path) -> None:
    made = plan.load(write(project / "grid.yaml", sparsities=[0.5, 0.8], seeds=1, set={**QUICK, "prune.rounds": 2}))
    keys = [wanted.key for wanted in work.marked(made, Place("grid")).values()]
    assert len(keys) == len(set(keys)) == 4


# --- another procedure ---------------------------------------------------------------------------------------------


@variant
class Lazy:
    """Trains the dense network, with nothing removed. `shared` counts what cells share."""

    patience: int = 1
    made: ClassVar[list[str]] = []

    def __call__(self, params: Params, data: Prepared, desk: Desk) -> Trained:
        desk.shared(lambda: self.made.append("x"))
        assert desk.mark and desk.folder.parent.name == "work"
        network_ = initial(params, data)
        mask = Mask.dense(network_)
        history = trained(params, data, network_, mask, on_epoch=desk.log)
        return Trained(network_, mask, history, {"cost/patience": self.patience})

    def check(self, params: Params) -> None:
        assert params.prune.sparsity > 0

    def story(self, params: Params, data: Prepared) -> str:
        return "Nothing much."

    def shares(self, params: Params) -> dict[str, Any] | None:
        return {"seed": params.seed}


def test_a_procedure_is_one_entry_of_the_registry(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROCEDURES, "lazy", Lazy)
    lazy = {"name": "lazy", "patience": 3}
    write(project / "grid.yaml", seeds=1, sparsities=[0.5, 0.8], scores=["random"],
          variants=[{"name": "do little", "procedure": lazy}])  # fmt: skip
    assert main(["study", "grid.yaml"]) == 0
    assert Lazy.made == ["x"]  # once for two cells
    frame = read_runs(["epsd"], ["procedure.name=lazy"])
    assert set(frame["params.procedure.patience"]) == {"3"} and set(frame["metrics.cost/patience"]) == {3.0}
    assert "do_little-cskd-s0.5-seed0-digits" in set(frame["name"])
    assert all(text.startswith("Nothing much.") for text in frame["tags.mlflow.note.content"])
    made = command.compared(command.Request(("epsd",)))
    assert [(row.label, sorted(row.cells)) for row in made.rows] == [("random", [0.5, 0.8]), ("do little", [0.5, 0.8])]
    write(project / "bad.yaml", procedure={"name": "lazy", "patients": 3})
    with pytest.raises(ParamsError, match="Did you mean 'patience'"):
        plan.load(project / "bad.yaml")


# --- epsd compare ---------------------------------------------------------------------------------------------------


def test_compare_writes_by_the_ending(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "epsd", "--where", "study=grid", "--baseline", "random", "--best", "--out", "t.md"]) == 0
    written = (finished / "t.md").read_text()
    assert "| dense | cskd | 0" in written and "fewer than 3 seeds" in written
    assert main(["compare", "--where", "study=grid", "--metric", "test/nll", "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("t.md") is False
    assert main(["compare", "--where", "study=grid", "--where", "prune.sparsity=0.50"]) == 0
    assert "sparsity 0.8" not in capsys.readouterr().out


def test_filters_of_mlflow(finished: Path) -> None:
    found = read_runs(["epsd"], ["params.`prune.score.name` = 'random'", "tags.study = 'grid'"])
    assert len(found) == 4 and set(found["params.prune.score.name"]) == {"random"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["compare", "epsdd"], "experiment: unknown 'epsdd'. Did you mean 'epsd'"),
        (["compare", "--where", "prune.sparsty=0.5"], "Did you mean 'prune.sparsity'"),
        (["compare", "--where", "params.x ="], "MLflow does not understand"),
        (["compare", "--where", "study=other"], "no finished runs in epsd that are study=other"),
        (["compare", "--metric", "test/top2"], "none of 10 runs has 'test/top2'. There are: .*test/top1"),
        (["compare", "--out", "t.pdf"], r"--out: ending: unknown '.pdf'. Valid: .md, .csv, .tex, .txt"),
        (["compare", "--baseline", "snip"], r"there is no row 'snip'. Rows: dense\+cskd, epsd\+cskd, random\+cskd"),
    ],
)
def test_mistakes_of_compare_are_one_line(
    arguments: list[str], message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message.replace("?", "."), said), said


def test_a_store_that_is_not_there(project: Path) -> None:
    with pytest.raises(RunsError, match="no runs are recorded there yet"):
        read_runs()
    assert not (project / "mlflow.db").exists()


@pytest.mark.parametrize("kind", ["trial", "search", "study", "analysis"])
def test_trials_and_summaries_are_no_results(kind: str, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An analysis carries all parameters of the run that it looks at, and may carry any metric."""
    frame = read_runs(["epsd"], ["study=grid", "kind=cell"])
    frame.loc[frame.index[0], ["tags.kind", "tags.method"]] = kind, None
    monkeypatch.setattr(command, "read_runs", lambda *a: frame)
    seen = command.compared(command.Request(("epsd",)))
    assert sum(len(cell.values) for row in seen.rows for cell in row.cells.values()) == 9
    asked = command.compared(command.Request(("epsd",), where=(f"kind={kind}",)))
    assert sum(len(cell.values) for row in asked.rows for cell in row.cells.values()) == 10


def test_images_that_changed_are_other_data(project: Path) -> None:
    photos = pictures.write(project / "photos", pictures.classes(10))
    path = write(project / "grid.yaml", set={**QUICK, "dataset": {"name": "image_folder", "root": "photos"}})
    made = plan.load(path)
    before, again = (Place("grid").data(made.cells[0].params, made.split_seed) for _ in range(2))
    assert again.folder == before.folder
    next(photos.glob("*/*.png")).unlink()
    assert not Place("grid").prepared(made.cells[0].params, made.split_seed)
    after = Place("grid").data(made.cells[0].params, made.split_seed)
    assert sum(after.sizes.values()) == sum(before.sizes.values()) - 1


def test_shared_data_is_written_once(finished: Path) -> None:
    folders = [path for path in (finished / ".epsd/studies/grid/data").iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert (
        json.loads((folders[0] / "data.json").read_text())["settings"]["seed"]
        == read_yaml(ROOT / "params.yaml")["seed"]
    )
