"""A detector is asked: boxes as in torch, printed, as JSON and drawn; from files, runs and addresses; mistakes told."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epsd import cli
from epsd.detection.score import as_detections
from epsd.evaluation import compact_file
from epsd.pipeline.load import load
from epsd.project import artifacts
from epsd.tracking import registered, track
from handed_on import DETECTOR_CARD, detector, detector_folder, model_folder, photo, save_detector


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with their card, and the folder `model` that is served."""
    return detector_folder(tmp_path_factory.mktemp("detector")).parent


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path, made: Path) -> Path:
    """As `detect` leaves it, with two pictures of one name and one of another."""
    shutil.copy(empty_store, tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, artifacts.DETECT)
    for number, name in enumerate(("a/one.png", "b/one.png", "two.png")):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(30 + number, number)).save(Path("photos", name))
    return tmp_path


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """The answers of `epsd detect --json`."""
    assert cli.main(["detect", "--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_form_of_it_finds_what_torch_finds(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = torch.from_numpy(np.array(Image.open("photos/two.png")))[None].float() / 255
    with torch.no_grad():
        expected = as_detections(detector()([picture])[0])
    state = artifacts.load_state(artifacts.DETECTOR)
    compact_file.save(state, Path("compact.safetensors"), DETECTOR_CARD)
    with track("detect", experiment="epsd", name="found", tags={"kind": "pipeline"}) as tracker:
        tracker.metrics({"detect/map50": 0.5, "detect/train_loss": 2.0})
        tracker.artifact(artifacts.DETECTOR, folder="detector")
        tracker.artifact(artifacts.DETECTOR_CARD, folder="detector")
        assert tracker.model(artifacts.DETECT_MODEL) == "1"
    with track("detect", experiment="epsd", name="not-exported", tags={"kind": "pipeline"}) as other:
        other.artifact(artifacts.DETECTOR, folder="detector")
        other.artifact(artifacts.DETECTOR_CARD, folder="detector")
    (version,) = registered.connection().search_model_versions("name = 'epsd-detector'")
    assert version.tags == {"detect/map50": "0.5000", "dataset": "cells"}
    runs = ["found", tracker.run_id[:7], "candidate", "models:/epsd-detector/1", "models:/epsd-detector@candidate"]
    files = ["artifacts/detect/model", "artifacts/detect/model.safetensors", "artifacts/detect", "compact.safetensors"]
    for model in [None, *files, *runs, "not-exported"]:
        named = [] if model is None else ["--model", model]
        (answer,) = asked(capsys, "photos/two.png", "--threshold", "0", *named)
        found = answer["detections"]
        assert len(found) == len(expected.scores) > 3, model
        assert [one["class"] for one in found] == [DETECTOR_CARD["detected"][label] for label in expected.labels]
        assert np.allclose([one["score"] for one in found], expected.scores, atol=1e-5)
        assert np.allclose([one["box"] for one in found], expected.boxes, atol=1e-2)
    loaded = load("models:/epsd-detector@candidate")
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_lines_threshold_and_drawings(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (whole,) = asked(capsys, "photos/two.png", "--threshold", "0")
    best = whole["detections"][0]
    threshold = str(best["score"] - 1e-6)
    assert cli.main(["detect", "photos", "--out", "drawn", "--threshold", threshold]) == 0
    lines = capsys.readouterr().out.splitlines()
    box = ", ".join(f"{side:.0f}" for side in best["box"])
    assert lines[2] == f"photos/two.png: {best['class']} {best['score']:.2f} ({box})"
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["one-2.png", "one.png", "two.png"]
    drawn, plain = (Image.open(f"{folder}/two.png").convert("RGB") for folder in ("drawn", "photos"))
    times = drawn.width // plain.width
    assert times > 1 and drawn.size == (plain.width * times, plain.height * times), "a small one is enlarged"
    changed = np.abs(np.asarray(plain.resize(drawn.size, 0)).astype(int) - np.asarray(drawn)).any(axis=2)
    rows, columns = np.nonzero(changed)
    left, _, right, bottom = (side * times for side in best["box"])
    assert abs(columns.min() - left) < times and abs(rows.max() + 1 - bottom) < times and columns.max() + 1 >= right - 1
    assert cli.main(["detect", "photos/two.png", "--threshold", "1"]) == 0
    assert capsys.readouterr().out == "photos/two.png: nothing of score 1 or more\n"


def test_asking_its_onnx_file_imports_no_torch(project: Path) -> None:
    code = "import sys; from epsd import cli; assert cli.main(sys.argv[1:]) == 0; "
    code += "print({'torch', 'mlflow', 'pandas', 'onnx', 'matplotlib'} & set(sys.modules))"
    command = [sys.executable, "-c", code, "detect", "--model", "artifacts/detect/model", "photos/two.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n"), done.stdout


def test_trained_again_it_is_asked_itself(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = asked(capsys, "photos/two.png", "--threshold", "0")
    state = detector().state_dict()
    name = "roi_heads.box_predictor.cls_score.bias"
    changed = detector()
    changed.load_state_dict({**state, name: state[name] + torch.tensor([0.0, 9.0, 0.0, 0.0])})
    artifacts.save_model(changed, artifacts.DETECTOR, DETECTOR_CARD)
    after = asked(capsys, "photos/two.png", "--threshold", "0")
    assert before != after and after[0]["detections"][0]["class"] == "ape"


def test_it_is_handed_over_with_a_script_that_finds_the_same(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["detect", "photos/two.png", "--threshold", "0.5"]) == 0
    said = capsys.readouterr().out
    for model, folder in (("artifacts/detect/model", "copied"), ("artifacts/detect/model.safetensors", "made")):
        assert cli.main(["export", "--model", model, "--to", folder]) == 0
        assert Path(folder, "class_names.txt").read_text(encoding="utf-8") == "ape\nbée\ncow\n"
        command = [sys.executable, f"{folder}/predict.py", "photos/two.png"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "two.png", "--model", "artifacts/detect"], "artifacts/detect: a detector, which `epsd detect` as"),
        (
            ["predict", "two.png", "--model", "artifacts/detect/model"],
            "which `epsd detect` asks, not `epsd p",
        ),
        (
            ["detect", "two.png", "--model", "classifier/model"],
            "classifier/model: a classifier, which `epsd p",
        ),
        (["detect", "two.png", "--model", "candidate"], "there is no candidate of epsd-detector yet"),
        (["detect", "nothing.png"], "nothing.png: no such image or folder"),
        (["detect", "two.png", "--out", "two.png"], "two.png: cannot be written"),
        (["promote", "--detector", "run"], "no run 'run'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy("photos/two.png", "two.png")
    if "classifier/model" in arguments:
        model_folder(Path("classifier"))
    assert cli.main(arguments) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("epsd: ") and message in errors and errors.count("\n") == 1


def test_a_file_that_cannot_be_read_is_told_after_the_others(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/torn.png").write_bytes(b"\x89PNG")
    assert cli.main(["detect", "photos", "--out", "drawn"]) == 1
    told = capsys.readouterr()
    assert told.out.count("\n") == 3 and len(list(Path("drawn").iterdir())) == 3
    asks, error = told.err.splitlines()
    assert asks == "epsd detect: asks what was trained on cells (3 classes)."
    assert error.startswith("epsd: 1 of 4 images cannot be read: photos/torn.png: ")


def test_nothing_trained_here_says_what_trains_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("photo.png")
    assert cli.main(["detect", "photo.png"]) == 1
    assert "artifacts/detect/model.json: missing. `dvc repro` runs" in capsys.readouterr().err
    save_detector(artifacts.DETECTOR)
    assert cli.main(["detect", "photo.png"]) == 0


def test_mlflow_knows_signature_and_example(made: Path) -> None:
    import mlflow.pyfunc

    loaded = mlflow.pyfunc.load_model(str(made / "model"))
    assert loaded.metadata.signature.inputs.input_names() == ["image"]
    assert loaded.metadata.signature.outputs.input_names() == ["boxes", "classes", "scores"]
    (answer,) = loaded.predict(loaded.input_example)
    assert len(answer["boxes"]) == len(answer["scores"]) > 3 and set(answer["classes"]) <= {"ape", "bée", "cow"}
    kinds = {path.suffix for path in (made / "model").rglob("*.*") if path.parent.name != "__pycache__"}
    assert kinds <= {".onnx", ".py", ".json", ".yaml", ".txt"}, "nothing pickled"
