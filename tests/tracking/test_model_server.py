"""`mlflow models serve` answers a real request for the champion, as `epsd predict` and `epsd detect` would."""

import base64
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from epsd.detection.score import as_detections
from epsd.tracking import registered, track
from epsd.tracking.models import DETECTOR, NAME
from handed_on import DETECTOR_CARD, detector, detector_folder, model_folder, photo, servable
from tracking_server import free_port, serving

FOLDERS = {NAME: model_folder, DETECTOR: detector_folder}


@pytest.fixture
def address(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path
) -> Iterator[str]:
    """A server of a promoted model of that name on a free port; gone at the end with its workers."""
    name = request.param
    shutil.copy(empty_store, tmp_path)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with track("evaluate", experiment="epsd", name="served", tags={"kind": "pipeline"}) as tracker:
        (tmp_path / "made").mkdir()
        tracker.model(FOLDERS[name](tmp_path / "made"))
    registered.promote("served", name)
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{name}@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "PATH": path, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    with serving(command, f"http://127.0.0.1:{port}/ping", tmp_path / "log", environment):
        yield f"http://127.0.0.1:{port}"


def ask(address: str, inputs: str) -> requests.Response:
    told = {"Content-Type": "application/json"}
    return requests.post(f"{address}/invocations", data=f'{{"inputs": {inputs}}}', headers=told, timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("address", [NAME], indirect=True)
def test_an_image_array_gets_its_probabilities(address: str) -> None:
    for shape in ((1, 1, 4, 4), (3, 1, 9, 13)):
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        answer = requests.post(f"{address}/invocations", json={"inputs": images.tolist()}, timeout=30)
        assert answer.status_code == 200, answer.text
        shares = torch.tensor(answer.json()["predictions"])
        resized = 0.01 if shape[2:] != (4, 4) else 1e-5
        torch.testing.assert_close(shares, servable()(torch.from_numpy(images)).detach(), atol=resized, rtol=1e-5)
    pixels = "[[[[{0}, 2], [3, 4]]]]"
    bad = [pixels.format(value) for value in ("NaN", "Infinity", "-Infinity", "null", "1e999", '"a"', "[1, 2]")]
    for inputs in [*bad, "[[1, 2], [3, 4]]", "null", "{}", "[" * 20_000 + "]" * 20_000, "[" * 300 + "]" * 300]:
        refused = ask(address, inputs)
        assert refused.status_code == 400, (inputs[:40], refused.status_code, refused.text[:300])
    assert "a pixel is NaN, infinite or missing" in ask(address, pixels.format("null")).text
    assert ask(address, pixels.format("1")).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("address", [DETECTOR], indirect=True)
def test_a_picture_gets_its_boxes(address: str) -> None:
    Image.fromarray(photo()).save(content := io.BytesIO(), "PNG")
    picture = base64.b64encode(content.getvalue()).decode()
    with torch.no_grad():
        expected = as_detections(detector()([torch.from_numpy(photo())[None].float() / 255])[0])
    for body in ({"dataframe_records": [{"image": picture}] * 2}, {"inputs": {"image": [picture] * 2}}):
        answer = requests.post(f"{address}/invocations", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        first, second = answer.json()["predictions"]
        assert first == second and first["classes"] == [DETECTOR_CARD["detected"][label] for label in expected.labels]
        assert len(first["scores"]) > 3
        np.testing.assert_allclose(first["scores"], expected.scores, atol=1e-5)
        np.testing.assert_allclose(first["boxes"], expected.boxes, atol=1e-2)
    refused = requests.post(f"{address}/invocations", json={"dataframe_records": [{"photo": picture}]}, timeout=30)
    assert refused.status_code == 400 and "image" in refused.text
