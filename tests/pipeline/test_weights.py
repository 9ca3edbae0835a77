"""The weights of a file, a folder, a project, a run, an alias or an address, whether registered or not."""

from pathlib import Path

import pytest
import torch

from epsd.pipeline.weights import weights_of
from epsd.project import artifacts
from epsd.project.artifacts import ArtifactError
from epsd.tracking import track
from epsd.tracking.registered import RegistryError
from handed_on import model_folder
from toys import convnet


@pytest.fixture
def project(stored: Path) -> Path:
    """Weights as `train` leaves them, in a folder of its own."""
    artifacts.save_model(convnet(), artifacts.MODEL, {"a": "card"})
    return stored


def test_files_and_folders(project: Path) -> None:
    for place in (artifacts.MODEL, artifacts.TRAIN, artifacts.ROOT, project):
        assert weights_of(place).resolve() == artifacts.MODEL.resolve()
        assert weights_of(str(place)).resolve() == artifacts.MODEL.resolve()
    (project / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"empty: no model.safetensors in it, nor in train, "):
        weights_of("empty")
    with pytest.raises(ArtifactError, match=r"model.json: no weights of epsd, which are .safetensors"):
        weights_of(artifacts.MODEL_CARD)


def test_runs_aliases_and_addresses(project: Path) -> None:
    with track("train", experiment="epsd", name="trained", tags={"kind": "pipeline"}) as tracker:
        tracker.artifact(artifacts.MODEL, folder="model")
        tracker.artifact(artifacts.MODEL_CARD, folder="model")
    with track("evaluate", experiment="epsd", name="trained", run_id=tracker.run_id, tags={"kind": "pipeline"}) as more:
        more.model(model_folder(project / "made"))
    with track("train", experiment="epsd", name="bare", tags={"kind": "pipeline"}):
        pass
    saved = artifacts.load_state(artifacts.MODEL)
    for wanted in ("trained", tracker.run_id, tracker.run_id[:6], "candidate", "models:/epsd/1"):
        path = weights_of(wanted)
        assert path.with_suffix(".json").is_file()
        torch.testing.assert_close(artifacts.load_state(path), saved, rtol=0, atol=0)
    with pytest.raises(RegistryError, match=r"run 'bare' recorded no weights of 'epsd'"):
        weights_of("bare")
    with pytest.raises(RegistryError, match=r"no run 'nowhere'.*Recent runs: "):
        weights_of("nowhere")
    with track("train", experiment="epsd", name="bare", tags={"kind": "pipeline"}):
        pass
    with pytest.raises(RegistryError, match=r"'bare' fits several runs: "):
        weights_of("bare")
