"""`mlflow models serve` answers a real request for the champion, as `epsd predict` would."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import torch

from epsd.tracking import registered, track
from handed_on import model_folder, servable
from tracking_server import free_port, serving

MODEL = "models:/epsd@champion"


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Iterator[str]:
    """A server of a promoted model on a free port; gone at the end with its workers."""
    shutil.copy(empty_store, tmp_path)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with track("evaluate", experiment="epsd", name="served", tags={"kind": "pipeline"}) as tracker:
        tracker.model(model_folder(tmp_path / "made"))
    registered.promote("served")
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", MODEL, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "PATH": path, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    with serving(command, f"http://127.0.0.1:{port}/ping", tmp_path / "log", environment):
        yield f"http://127.0.0.1:{port}"


def ask(address: str, inputs: str) -> requests.Response:
    told = {"Content-Type": "application/json"}
    return requests.post(f"{address}/invocations", data=f'{{"inputs": {inputs}}}', headers=told, timeout=30)


@pytest.mark.slow
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
