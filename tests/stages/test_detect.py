"""stages/detect.py behind a network that the test makes: every file, the mask still there, twins, real pictures."""

import csv
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

import warm
from conftest import shared_file
from devkits import devkit
from epsd import cli
from epsd.architectures import ARCHITECTURES
from epsd.datasets import DEVKITS
from epsd.masks import Mask, prunable
from epsd.pipeline.load import load
from epsd.project import artifacts
from epsd.registry import choose
from epsd.voc.annotations import read_index
from epsd.voc.scenes import VocIndex
from pictures import write

STAGE = Path(__file__).resolve().parents[2] / "stages" / "detect.py"
TINY = {
    "name": "faster_rcnn",
    "finest_stride": 4,
    "extra_levels": 1,
    "anchor_scale": 4.0,
    "channels": 16,
    "head_width": 16,
    "proposals": 20,
    "roi_samples": 8,
    "anchor_samples": 16,
}
SCENES = {"name": "digit_scenes", "train": 8, "validation": 4, "test": 6}


def project(folder: Path, scenes: dict[str, Any], shape: tuple[int, int, int] = (1, 8, 8), **detect: Any) -> Path:
    """A folder as `train` leaves it: scenes prepared, and a network of which 90 % was pruned, not trained at all."""
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load((STAGE.parent.parent / "params.yaml").read_text())
    params["voc"] = scenes
    params["train"]["epochs"] = 1
    params["architecture"] = {"name": "resnet", "depth": 20, "width": 0.25}
    params["detect"] |= {"detector": TINY, "epochs": 1, "batch_size": 4, "pictures": 2, **detect}
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    kit = choose(DEVKITS, scenes)
    sources = kit(folder / artifacts.VOC, seed=0)  # type: ignore[operator]
    read_index(sources, **kit.reading).save(folder / artifacts.VOC_INDEX)
    torch.manual_seed(0)
    net = choose(ARCHITECTURES, params["architecture"])(10, shape)
    (folder / artifacts.PRUNE).mkdir(parents=True)
    artifacts._save_state(net, folder / artifacts.INITIAL)
    mask = Mask.from_scores({name: weight.detach().abs() for name, weight in prunable(net).items()}, 0.9)
    mask.apply_(net)
    mask.save(folder / artifacts.MASK)
    card = {
        "architecture": params["architecture"],
        "num_classes": 10,
        "class_names": [str(digit) for digit in range(10)],
        "image_shape": shape,
        "mean": [0.3] * shape[0],
        "std": [0.4] * shape[0],
    }
    artifacts.save_model(net, folder / artifacts.MODEL, card)
    artifacts.write_json(folder / artifacts.RUN, RUN)
    return folder


RUN = {"run_id": "none-yet", "name": "a-run", "tags": {"kind": "pipeline"}, "description": "A network."}
"""As `train` leaves it. The run itself is no more in the store."""


def environment(folder: Path) -> dict[str, str]:
    changed = {"EPSD_QUIET": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return {name: value for name, value in {**os.environ, **changed}.items() if name != "DVC_ROOT"}


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [warm.python(), str(STAGE)]
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from epsd.datasets.digits import Digits
    from epsd.preparing.write import prepare

    folder = project(tmp_path_factory.mktemp("detect"), SCENES, beside="dense")
    prepare(Digits()(), folder / artifacts.DATA, seed=0, limit=20, validation=0.1, test=0.2)
    result = run(folder)
    assert result.returncode == 0, result.stderr
    assert "test mAP@0.5" in result.stdout
    return folder


def test_figures(done: Path) -> None:
    report = artifacts.read_json(done / artifacts.DETECT_METRICS)
    scores = {"map50", "map50_11point", "map", "map75"}
    twin = {f"beside_{name}" for name in scores}
    judged = {name for name in report if not name.startswith(("latency_", "onnx_"))}
    assert judged == scores | twin | {"validation_map50", "sparsity", "seconds"}
    assert all(0 <= report[name] <= 1 for name in scores | twin)
    rows = read(done / artifacts.DETECT_PER_CLASS)
    assert [row["class"] for row in rows] == [str(digit) for digit in range(10)]
    counted = [float(row["ap"]) for row in rows if int(row["objects"])]
    assert report["map50"] == pytest.approx(sum(counted) / len(counted))
    assert [int(row["epoch"]) for row in read(done / artifacts.DETECT_HISTORY)] == [1]


def test_the_mask_still_holds_in_the_saved_detector(done: Path) -> None:
    state, mask = artifacts.load_state(done / artifacts.DETECTOR), Mask.load(done / artifacts.MASK)
    moved = {name: state[f"backbone.body.{name}"] for name in mask.keep if name != "fc.weight"}
    assert all(not weights[~mask.keep[name]].any() for name, weights in moved.items())
    zeros = 1 - sum(int(w.count_nonzero()) for w in moved.values()) / sum(w.numel() for w in moved.values())
    assert artifacts.read_json(done / artifacts.DETECT_METRICS)["sparsity"] == pytest.approx(zeros)
    trained = artifacts.load_state(done / artifacts.MODEL)
    assert any(not torch.equal(weights, trained[name]) for name, weights in moved.items())


def test_pictures(done: Path) -> None:
    from PIL import Image

    names = {path.name for path in (done / artifacts.DETECT_PICTURES).iterdir()}
    assert artifacts.DETECT_GALLERY.name in names
    assert len(names) == 3
    for name in names:
        with Image.open(done / artifacts.DETECT_PICTURES / name) as picture:
            picture.verify()


def test_everything_is_in_the_run(done: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{done}/mlflow.db")
    experiment = client.get_experiment_by_name("epsd")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    report = artifacts.read_json(done / artifacts.DETECT_METRICS)
    assert found.data.metrics["detect/map50"] == report["map50"]
    assert found.data.metrics["detect/map"] == report["map"]
    assert "detect/train_loss" in found.data.metrics
    assert found.data.params["detect.beside"] == "dense"
    card = artifacts.read_json(done / artifacts.DETECTOR_CARD)["detector"]
    assert found.data.params["detect.used.size"] == str(card["size"]) == "64"
    assert "detect.used.finest_stride" not in found.data.params, "it was set by hand"
    assert found.info.run_name == "a-run" and found.data.tags["kind"] == "pipeline"
    assert found.data.tags["mlflow.note.content"].startswith("A network.\n\n**Detection.** As backbone of")
    assert {file.path for file in client.list_artifacts(found.info.run_id)} >= {"detections.png", "detect", "detector"}


def test_the_detector_is_registered_and_asked(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By path, as the candidate, by the name of its run; its weights come back whole."""
    monkeypatch.chdir(done)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{done}/mlflow.db")
    scene = VocIndex.load(artifacts.VOC_INDEX).scenes["test"][0]
    told = []
    for model in ([], ["--model", "candidate"], ["--model", "a-run"], ["--model", str(artifacts.DETECTOR)]):
        assert cli.main(["detect", str(scene.image), "--threshold", "0", "--json", *model]) == 0
        told.append([(one["class"], one["box"]) for one in json.loads(capsys.readouterr().out)["detections"]])
    assert told[0] and told[0] == told[1] == told[2]
    assert [name for name, _ in told[0]] == [name for name, _ in told[3]]
    state = artifacts.load_state(artifacts.DETECTOR)
    assert all(torch.equal(tensor, state[name]) for name, tensor in load(artifacts.DETECT).state_dict().items())


def test_again_gives_the_same_weights(done: Path) -> None:
    before = (done / artifacts.DETECTOR).read_bytes()
    assert run(done).returncode == 0
    assert (done / artifacts.DETECTOR).read_bytes() == before


def test_two_processes_leave_the_detector_of_one(done: Path) -> None:
    """The twin's classifier and detector too. One run, the main process alone speaks."""
    report, before = (
        artifacts.read_json(done / artifacts.DETECT_METRICS),
        artifacts.load_state(done / artifacts.DETECTOR),
    )
    path = done / "params.yaml"
    text = path.read_text()
    path.write_text(text.replace("processes: 1", "processes: 2"))
    try:
        result = run(done)
    finally:
        path.write_text(text)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert result.stderr == "", "the run that took the place of the one that this test made up is found"
    for name, tensor in artifacts.load_state(done / artifacts.DETECTOR).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-3, atol=1e-4, msg=name)
    again = artifacts.read_json(done / artifacts.DETECT_METRICS)
    assert again.keys() == report.keys()
    judged = [name for name in report if name != "seconds" and not name.startswith(("latency_", "onnx_"))]
    assert all(again[name] == pytest.approx(report[name], abs=0.02) for name in judged)


def test_a_killed_stage_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    folder = project(tmp_path, SCENES | {"validation": 0}, epochs=15, pictures=0)
    stage = subprocess.Popen([warm.python(), str(STAGE)], cwd=folder, env=environment(folder))
    saved, deadline = [], time.monotonic() + 120
    while not saved and time.monotonic() < deadline:
        saved = list((folder / ".epsd" / "checkpoints").glob("*/detector.safetensors"))
        time.sleep(0.01)
    stage.kill()
    stage.wait()
    assert saved and not (folder / artifacts.DETECTOR).exists()
    assert run(folder).returncode == 0
    resumed = (folder / artifacts.DETECTOR).read_bytes()
    assert [int(row["epoch"]) for row in read(folder / artifacts.DETECT_HISTORY)] == list(range(1, 16))
    assert not saved[0].exists()
    assert run(folder).returncode == 0
    assert (folder / artifacts.DETECTOR).read_bytes() == resumed


@pytest.mark.parametrize(
    "detector",
    [{"name": "ssd", "channels": 16}, {"name": "retinanet", "channels": 32, "finest_stride": 4, "extra_levels": 0}],
)
def test_other_detectors_and_an_untrained_twin(tmp_path: Path, detector: dict[str, Any]) -> None:
    folder = project(
        tmp_path, SCENES | {"validation": 0}, detector=detector, beside="random", pictures=0, frozen_stages=1
    )
    result = run(folder)
    assert result.returncode == 0, result.stderr
    report = artifacts.read_json(folder / artifacts.DETECT_METRICS)
    assert {"map50", "beside_map50"} <= set(report)
    assert "validation_map50" not in report
    assert not (folder / artifacts.DETECT_PICTURES).exists()


def test_a_backbone_that_another_folder_trained(tmp_path: Path) -> None:
    """This one has scenes alone. The mask comes along, and the run is one of its own."""
    for name in ("theirs", "here"):
        (tmp_path / name).mkdir()
    theirs = project(tmp_path / "theirs", SCENES)
    more = {"pictures": 0, "latency_repeats": 0, "backbone": str(theirs)}
    folder = project(tmp_path / "here", SCENES | {"validation": 0}, **more)
    for place in (artifacts.PRUNE, artifacts.TRAIN):
        shutil.rmtree(folder / place)
    result = run(folder)
    assert result.returncode == 0, result.stderr
    assert f"detect: 100.0% of the parameters are from {theirs}." in result.stderr
    state, mask = artifacts.load_state(folder / artifacts.DETECTOR), Mask.load(theirs / artifacts.MASK)
    moved = {name: state[f"backbone.body.{name}"] for name in mask.keep if name != "fc.weight"}
    assert all(not weights[~mask.keep[name]].any() and weights.any() for name, weights in moved.items())
    assert artifacts.read_json(folder / artifacts.DETECT_METRICS)["sparsity"] > 0.8


def test_own_pictures_in_colour_through_a_grey_network(tmp_path: Path) -> None:
    things = [("nut", (2, 2, 20, 12)), ("screw", (22, 10, 38, 28))]
    sets = {"mine": {"a": things, "b": things}, "yours": {"c": things}}
    write(tmp_path / "root", devkit(sets, prefix="Workshop"))
    kit = {"name": "devkit", "root": str(tmp_path / "root"), "train": ["mine"], "test": ["yours"]}
    (tmp_path / "run").mkdir()
    folder = project(tmp_path / "run", kit)
    result = run(folder)
    assert result.returncode == 0, result.stderr
    assert [row["class"] for row in read(folder / artifacts.DETECT_PER_CLASS)] == ["nut", "screw"]


@pytest.mark.shared
def test_real_pictures_of_pascal_voc(tmp_path: Path) -> None:
    root = str(shared_file("datasets", "voc2007-sample.zip"))
    kit = {"name": "devkit", "root": root, "train": ["train"], "test": ["test"], "limit": 4}
    folder = project(tmp_path, kit, (3, 32, 32), detector=TINY | {"size": 96, "frozen_norms": True}, batch_size=2)
    result = run(folder)
    assert result.returncode == 0, result.stderr
    assert len(read(folder / artifacts.DETECT_PER_CLASS)) > 1


@pytest.mark.parametrize(
    ("detect", "message"),
    [
        ({"frozen_stages": 9}, "detect.frozen_stages: 9, but the backbone has 3"),
        ({"backbone": "nowhere.pth"}, "detect.backbone: "),
        ({"backbone": "nowhere.pth", "beside": "dense"}, "beside: dense trains this folder's network"),
        ({"lr": 1e6, "clip_norm": None, "warmup_steps": 0}, "the loss is no number in epoch"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path: Path, detect: dict[str, Any], message: str) -> None:
    result = run(project(tmp_path, SCENES, **{"epochs": 3, **detect}))
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_what_auto_stands_for_is_told_and_what_cannot_fit_is_warned_of(tmp_path: Path) -> None:
    auto = dict.fromkeys(("size", "finest_stride", "extra_levels", "anchor_scale"), "auto")
    for name, detector in (("auto", auto), ("tiny", {"finest_stride": 1, "anchor_scale": 1.0, "extra_levels": 0})):
        (tmp_path / name).mkdir()
        folder = project(tmp_path / name, SCENES, detector=TINY | detector, pictures=0, onnx=False)
        loud = environment(folder) | {"EPSD_QUIET": ""}
        command = [warm.python(), str(STAGE)]
        done = subprocess.run(command, cwd=folder, env=loud, capture_output=True, text=True, check=True)
        maps = "2, 4, anchors of 12 to 24 px" if name == "auto" else "1, 2, 4, anchors of 1 to 4 px"
        assert f"detect: auto: pictures of up to 64x107 px, maps at strides {maps}; most of the" in done.stderr
        assert ("detect: the anchors hardly fit: " in done.stderr) == (name == "tiny")
    made = artifacts.read_json(folder / artifacts.DETECTOR_CARD)["detector"]
    assert made == TINY | {"size": 64, "finest_stride": 1, "anchor_scale": 1.0, "extra_levels": 0}


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = project(tmp_path, SCENES)
    (folder / artifacts.VOC_INDEX).unlink()
    result = run(folder)
    assert result.returncode == 1
    assert "artifacts/voc/voc.json: missing" in result.stderr
