"""stages/evaluate.py on a network and data that the test makes: every file, and figures that agree with each other."""

import csv
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import warm
from epsd.architectures.resnet import ResNet
from epsd.evaluation import compact_file
from epsd.files.digests import digest_of
from epsd.masks import Mask, prunable
from epsd.project import artifacts
from handed_on import asked

NET = ResNet(depth=20, width=0.5)
STAGE = Path(__file__).resolve().parents[2] / "stages" / "evaluate.py"


def run(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EPSD_QUIET": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", **more}
    environment.pop("DVC_ROOT", None)
    command = [warm.python(), str(STAGE)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `train` leaves it: digits prepared, and a network of which 90 % was pruned, not trained at all."""
    from epsd.datasets.digits import Digits
    from epsd.preparing.write import prepare

    folder = tmp_path_factory.mktemp("evaluate")
    text = (STAGE.parent.parent / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("latency_repeats: 50", "latency_repeats: 2"))
    index = prepare(Digits()(), folder / artifacts.DATA, seed=0, limit=20, validation=0.1, test=0.2)
    shape = tuple(index["image_shape"])
    torch.manual_seed(0)
    net = NET(10, shape)
    mask = Mask.from_scores({name: weight.detach().abs() for name, weight in prunable(net).items()}, 0.9)
    mask.apply_(net)
    card = {
        "architecture": {"name": "resnet", "depth": NET.depth, "width": NET.width},
        "num_classes": 10,
        "class_names": index["class_names"],
        "image_shape": shape,
        "mean": index["mean"],
        "std": index["std"],
    }
    artifacts.save_model(net, folder / artifacts.MODEL, card)
    artifacts.write_csv(folder / artifacts.HISTORY, ["epoch", "train/loss", "val/top1"], [[1, 2.3, 0.1], [2, 2.0, 0.3]])
    history = digest_of(folder / artifacts.HISTORY)
    artifacts.write_json(folder / artifacts.RUN, {"run_id": "none-yet", "history": history})
    return folder


@pytest.fixture(scope="module")
def done(project: Path) -> subprocess.CompletedProcess[str]:
    return run(project)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_writes_every_file(project: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    others = artifacts.SPARSE_MODEL, artifacts.MODEL_README
    for path in (*artifacts.EVALUATE_FIGURES, *artifacts.EVALUATE_TABLES, *others):
        assert (project / path).stat().st_size > 0
    assert (project / artifacts.SERVED_MODEL / "data" / "onnx" / "model.onnx").is_file()
    assert done.stderr.count("\n") == 1 and "a new one takes its place" in done.stderr, "this test made no run"
    assert done.stdout.count("\n") == 1


def test_figures_agree_with_each_other(project: Path, done: subprocess.CompletedProcess[str]) -> None:
    report = artifacts.read_json(project / artifacts.METRICS)
    predictions = read(project / artifacts.CONFUSION)
    right = sum(row["actual"] == row["predicted"] for row in predictions)
    assert report["test"]["top1"] == pytest.approx(right / len(predictions))
    assert report["test"]["top5"] >= report["test"]["top1"]
    classes = read(project / artifacts.PER_CLASS)
    assert sum(int(row["images"]) for row in classes) == len(predictions)
    bins = read(project / artifacts.RELIABILITY)
    gaps = [float(b["images"]) * abs(float(b["accuracy"]) - float(b["confidence"])) for b in bins]
    assert report["test"]["ece"] == pytest.approx(sum(gaps) / len(predictions))
    assert f"test top-1 {report['test']['top1']:.4f}" in done.stdout


def test_cost_is_recounted_from_the_weights(project: Path, done: subprocess.CompletedProcess[str]) -> None:
    model = artifacts.read_json(project / artifacts.METRICS)["model"]
    weights = prunable(NET(10, (1, 8, 8)))
    total = sum(weight.numel() for weight in weights.values())
    assert model["prunable"] == total
    assert model["prunable"] - model["prunable_nonzero"] == round(0.9 * total)
    assert model["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert model["compression"] > 5
    assert 0 < model["gflops_sparse"] < model["gflops_dense"]
    assert model["bytes_dense"] == (project / artifacts.MODEL).stat().st_size
    assert model["bytes_sparse"] == (project / artifacts.SPARSE_MODEL).stat().st_size
    assert model["bytes_sparse"] < model["bytes_dense"] / 2


def test_the_compact_file_is_the_network(project: Path, done: subprocess.CompletedProcess[str]) -> None:
    compact, card = compact_file.load(project / artifacts.SPARSE_MODEL)
    dense = artifacts.load_state(project / artifacts.MODEL)
    assert compact.keys() == dense.keys()
    assert all(torch.equal(compact[name], dense[name]) for name in dense)
    assert card["num_classes"] == 10


def test_the_run_holds_the_figures(project: Path, done: subprocess.CompletedProcess[str]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    (run_,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    report = artifacts.read_json(project / artifacts.METRICS)
    for name in ("test/top1", "test/nll", "test/ece", "model/compression", "deploy/onnx_top1", "latency/turns"):
        group, _, key = name.partition("/")
        assert run_.data.metrics[name] == pytest.approx(report[group][key])
    assert run_.data.params["evaluate.ece_bins"] == "15"
    losses = client.get_metric_history(run_.info.run_id, "train/loss")
    assert [(p.step, p.value) for p in losses] == [(1, 2.3), (2, 2.0)], "the curves of a run that had to be made anew"


def test_the_run_says_what_came_out_and_its_model_is_the_candidate(
    project: Path, done: subprocess.CompletedProcess[str]
) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    version = client.get_model_version_by_alias("epsd", "candidate")
    assert "model 'epsd' version 1 (candidate)" in done.stdout
    run_ = client.get_run(version.run_id)
    assert f"**Test.** Top-1 accuracy {run_.data.metrics['test/top1']:.4f}" in run_.data.tags["mlflow.note.content"]
    assert "model_card.md" in [file.path for file in client.list_artifacts(version.run_id)]


def test_the_exported_model_gets_as_many_right_as_evaluation_says(
    project: Path, done: subprocess.CompletedProcess[str]
) -> None:
    import numpy as np

    from epsd.data.prepared import Prepared

    data = Prepared.load(project / artifacts.DATA)
    chosen = asked(project / artifacts.SERVED_MODEL)(data.images("test").astype(np.float32)).argmax(1)
    report = artifacts.read_json(project / artifacts.METRICS)
    assert (chosen == data.labels("test")).mean() == pytest.approx(report["test"]["top1"])
    assert report["deploy"]["onnx_top1"] == pytest.approx(report["test"]["top1"])
    assert report["deploy"]["onnx_agreement"] == 1


def test_every_form_is_timed_beside_the_dense_twin(project: Path, done: subprocess.CompletedProcess[str]) -> None:
    report = artifacts.read_json(project / artifacts.METRICS)
    latency, kept = report["latency"], report["deploy"]["int8_kept"]
    for setting in ("batch1_one_thread", "batch32_one_thread"):
        for form in ("torch", "onnx", "int8", "dense_torch", "dense_onnx"):
            assert latency[f"{form}_{setting}_ms"] > 0
        times = latency[f"dense_torch_{setting}_ms"] / latency[f"onnx_{setting}_ms"]
        assert latency[f"onnx_{setting}_times_dense_torch"] == pytest.approx(times)
    assert (project / artifacts.SERVED_MODEL / "data" / "onnx" / "model.int8.onnx").is_file() == bool(kept)
    assert f"int8 {'kept' if kept else 'left out: '}" in done.stdout
    card = (project / artifacts.MODEL_README).read_text()
    assert "## Deployed" in card and "| ONNX int8 |" in card and "| dense twin, torch |" in card


def test_a_store_that_is_away_is_one_line(
    project: Path, done: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    folder = tmp_path / "away"
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns("mlflow.db", "mlruns", ".epsd"))
    result = run(folder, MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert result.returncode == 0
    assert result.stderr.count("\n") == 1 and "kept in" in result.stderr
    assert "test top-1" in result.stdout and "candidate" not in result.stdout
    assert len(list(folder.glob(".epsd/spool/*.files/*/model/MLmodel"))) == 1


def test_a_model_of_another_network_is_one_line(
    project: Path, done: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns("mlflow.db", "mlruns", ".epsd"))
    card = artifacts.read_json(folder / artifacts.MODEL_CARD)
    card["architecture"]["width"] = 1.0
    artifacts.write_json(folder / artifacts.MODEL_CARD, card)
    result = run(folder)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "model.safetensors" in result.stderr and "Traceback" not in result.stderr
