"""The model that is handed on says what evaluation said: for a set in memory and for one streamed from files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epsd import cli
from epsd.architectures import ARCHITECTURES
from epsd.data.prepared import Prepared
from epsd.datasets.digits import Digits
from epsd.datasets.image_folder import ImageFolder
from epsd.evaluation import compact_file
from epsd.evaluation import evaluate as evaluation
from epsd.evaluation.intake import Intake
from epsd.pipeline.deploy import export
from epsd.pipeline.export import exported, pixels_of
from epsd.pipeline.predict import opened, predicted
from epsd.preparing.write import prepare
from epsd.project import artifacts
from epsd.registry import choose
from pictures import classes, write

NET = {"name": "resnet", "depth": 8, "width": 0.5}


def trained(data: Prepared) -> torch.nn.Module:
    """A network with statistics of its own, saved as `train` saves it."""
    torch.manual_seed(0)
    network = choose(ARCHITECTURES, NET, "architecture")(data.num_classes, data.image_shape)
    for batch in data.batches("train", batch_size=16).epoch(0):
        network(batch.images)
    card: dict[str, Any] = {"architecture": NET, "num_classes": data.num_classes, "image_shape": data.image_shape}
    card |= {"class_names": data.class_names, "mean": data.mean, "std": data.std, "reading": data.index["reading"]}
    artifacts.save_model(network, artifacts.MODEL, card)
    return network


def said(places: list[str], model: str | None = None) -> list[dict[str, float]]:
    """Class -> probability of each image."""
    lines = [json.loads(line) for line in predicted(places, model, 99, True)]
    return [{entry["class"]: entry["probability"] for entry in line["predictions"]} for line in lines]


def agree(answers: list[dict[str, float]], logits: torch.Tensor, names: list[str]) -> None:
    shares = torch.tensor([[answer[name] for name in names] for answer in answers])
    torch.testing.assert_close(shares, logits.softmax(1), atol=1e-5, rtol=1e-4)


def test_stored_digits_are_answered_as_in_evaluation(stored: Path) -> None:
    prepare(Digits()(), artifacts.DATA, limit=8)
    data = Prepared.load(artifacts.DATA)
    test = data.batches("test", batch_size=16)
    logits, _ = evaluation.predict(trained(data), test)
    for number, image in enumerate(data.images("test")):
        (stored / "images").mkdir(exist_ok=True)
        Image.fromarray(image[0]).save(stored / "images" / f"{number:04}.png")
    agree(said(["images"]), logits, data.class_names)
    assert np.array_equal(
        pixels_of(test, Intake.of(artifacts.read_json(artifacts.MODEL_CARD))), data.images("test")[:2]
    )


def test_a_streamed_image_folder_is_answered_as_in_evaluation(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        stored / "photos", {f"{split}/{name}": c for split in ("train", "test") for name, c in classes(3, 90).items()}
    )
    prepare(ImageFolder(root="photos", size=72, resize=80)(), artifacts.DATA, validation=0.0)
    data = Prepared.load(artifacts.DATA)
    assert data.index["storage"] == "files"
    test = data.batches("test", batch_size=4)
    network = trained(data)
    logits, _ = evaluation.predict(network, test)
    agree(said(["photos/test"]), logits, data.class_names)
    artifacts.write_text(artifacts.MODEL_README, "# A model\n")
    card = artifacts.read_json(artifacts.MODEL_CARD)
    exported(network, card, test, Path("no-onnx"))
    agree(said(["photos/test"], str(artifacts.SERVED_MODEL)), logits, data.class_names)
    export(network, card, artifacts.MODEL, Path("onnx/model.onnx"))
    exported(network, card, test, Path("onnx"))
    for place in (None, str(artifacts.SERVED_MODEL), "onnx", "onnx/model.onnx"):
        agree(said(["photos/test"], place), logits, data.class_names)
    agree(said(["photos/test"], str(artifacts.MODEL)), logits, data.class_names)
    compact_file.save(network.state_dict(), Path("compact.safetensors"), artifacts.read_json(artifacts.MODEL_CARD))
    agree(said(["photos/test"], "compact.safetensors"), logits, data.class_names)
    assert capsys.readouterr().err == ""
    posted = torch.from_numpy(np.array(Image.open("photos/test/cat/0.png"))).permute(2, 0, 1)[None].float()
    ask, _ = opened(str(artifacts.SERVED_MODEL))
    assert ask(posted.numpy())[0] == pytest.approx(logits[:1].softmax(1)[0].numpy(), abs=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["here.png"], "here.png: no such image"),
        (["photo.png"], "artifacts/train/model.json: missing. `dvc repro` runs"),
        (["photo.png", "--model", "photo.png"], "no folder with a model, no .onnx file, no .safetensors"),
        (["photo.png", "--model", "champion"], "there is no champion yet: `epsd promote RUN` chooses one"),
        (["photo.png", "--model", "no-such-run"], "no run 'no-such-run'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (8, 8)).save(stored / "photo.png")
    assert cli.main(["predict", *arguments]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("epsd: ") and message in errors and errors.count("\n") == 1


def test_promote_without_runs_is_one_line(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["promote", "abc"]) == 1
    assert "There are no runs yet: `make repro` makes one." in capsys.readouterr().err
