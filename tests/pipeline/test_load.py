"""A trained network comes back as it was: from files, folders and runs; narrow and compact ones, too."""

from pathlib import Path
from typing import Any

import pytest
import torch

import epsd
from epsd.architectures import built
from epsd.compute.narrow import shapes_of
from epsd.evaluation import compact_file
from epsd.masks import Mask, prunable
from epsd.project import artifacts
from epsd.project.artifacts import ArtifactError
from epsd.tracking import track
from toys import ToyBatches

NET = {"name": "resnet", "depth": 8, "width": 0.5}
CARD: dict[str, Any] = {"architecture": NET, "num_classes": 3, "class_names": list("abc"), "image_shape": [1, 8, 8]}
CARD |= {"mean": [0.3], "std": [0.4]}
IMAGES = torch.rand(4, 1, 8, 8)


def pruned() -> tuple[torch.nn.Module, Mask]:
    torch.manual_seed(0)
    model = built(NET, 3, (1, 8, 8))
    mask = Mask.from_scores({name: weight.detach().abs() for name, weight in prunable(model).items()}, 0.8)
    mask.apply_(model)
    return model.eval(), mask


def test_from_files_folders_and_runs(stored: Path) -> None:
    model, mask = pruned()
    artifacts.save_model(model, artifacts.MODEL, CARD)
    compact_file.save(model.state_dict(), Path("compact.safetensors"), CARD)
    with track("train", experiment="epsd", name="trained", tags={"kind": "pipeline"}) as tracker:
        tracker.artifact(artifacts.MODEL, folder="model")
        tracker.artifact(artifacts.MODEL_CARD, folder="model")
    for place in (stored, artifacts.MODEL, "artifacts/train", "compact.safetensors", "trained", tracker.run_id[:8]):
        loaded = epsd.load(place)
        assert not loaded.training and Mask.of(loaded) == mask
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    epsd.fit(loaded, ToyBatches(shape=(1, 8, 8)), mask=mask, recipe=epsd.Recipe(epochs=1))
    assert Mask.of(loaded).sparsity >= mask.sparsity


def test_a_narrow_network_comes_back_narrow(stored: Path) -> None:
    data = ToyBatches(shape=(1, 8, 8))
    torch.manual_seed(0)
    whole = built(NET, 3, (1, 8, 8))
    narrow = epsd.cut_channels(whole, data, score=epsd.Snip(), macs=0.5, round_to=1).eval()
    assert epsd.cost(narrow, (1, 8, 8), whole=whole)["macs"] <= 0.5
    artifacts.save_model(narrow, artifacts.MODEL, CARD | {"shapes": shapes_of(narrow, whole)})
    assert torch.equal(epsd.load(artifacts.MODEL)(IMAGES), narrow(IMAGES))
    with pytest.raises(ArtifactError, match="does not fit the network of its card"):
        artifacts.write_json(artifacts.MODEL_CARD, CARD)
        epsd.load(artifacts.MODEL)


def test_what_cannot_be_loaded_is_one_line(stored: Path) -> None:
    Path("empty").mkdir()
    for place, message in (("empty", "no model.safetensors in it"), ("elsewhere", "no run 'elsewhere'")):
        with pytest.raises(epsd.EpsdError, match=message) as told:
            epsd.load(place)
        assert "\n" not in str(told.value)
