"""What is handed on is asked without torch: by `epsd predict`, and from a folder that needs no epsd either."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epsd import cli
from epsd.architectures import built
from epsd.evaluation import deploy
from epsd.evaluation.intake import Intake
from epsd.files.onnx_file import FP32, INT8
from epsd.pipeline.hand_over import hand_over
from epsd.pipeline.place import place_of
from epsd.project import artifacts
from epsd.project.artifacts import ArtifactError

NET = {"name": "resnet", "depth": 8, "width": 0.5}
CARDS: dict[str, dict[str, Any]] = {
    "square": {"image_shape": [3, 16, 16], "reading": {"size": 16, "resize": 20}},
    "grey": {"image_shape": [1, 8, 8], "reading": {"size": None, "resize": None}},
    "oblong": {"image_shape": [3, 12, 20]},
}


def card(kind: str) -> dict[str, Any]:
    channels = CARDS[kind]["image_shape"][0]
    about = {"architecture": NET, "num_classes": 3, "class_names": ["ape", "bée", "cow"]}
    return {**about, "mean": [0.4] * channels, "std": [0.2] * channels, **CARDS[kind]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `train` leaves them, for square images."""
    path = tmp_path_factory.mktemp("train") / "model.safetensors"
    torch.manual_seed(0)
    artifacts.save_model(built(NET, 3, (3, 16, 16)), path, card("square"))
    return path


@pytest.fixture(scope="module")
def handed(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder made of them."""
    folder = tmp_path_factory.mktemp("handed") / "on"
    hand_over(str(weights), folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Every kind that is read otherwise: colour, grey, palette, transparent, 16 bits, turned by its EXIF data."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    colour = Image.fromarray(random.integers(0, 256, (30, 41, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    colour.save(folder / "colour.png")
    colour.save(folder / "turned.jpg", exif=turned)
    colour.convert("L").save(folder / "grey.png")
    colour.quantize(17).save(folder / "palette.gif")
    Image.fromarray(random.integers(0, 256, (22, 16, 4), dtype=np.uint8)).save(folder / "transparent.png")
    Image.fromarray(random.integers(0, 65536, (19, 23), dtype=np.uint16)).save(folder / "deep.png")
    colour.resize((16, 16)).save(folder / "own.png")
    return sorted(folder.iterdir())


def test_the_folder_holds_what_it_takes(handed: Path) -> None:
    names = ["class_names.txt", "model.json", "model.onnx", "predict.py"]
    assert sorted(path.name for path in handed.iterdir()) == names
    assert (handed / "class_names.txt").read_text(encoding="utf-8") == "ape\nbée\ncow\n"
    assert Intake.of(artifacts.read_json(handed / "model.json")) == Intake.of(card("square"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with onnxruntime, numpy and Pillow and nothing else: `python -S` leaves out all packages."""
    folder = tmp_path_factory.mktemp("packages")
    for package in ("onnxruntime", "numpy", "PIL"):
        origin = importlib.util.find_spec(package).origin  # type: ignore[union-attr]
        (folder / package).symlink_to(Path(str(origin)).parent)
    for libraries in Path(np.__file__).parents[1].glob("*.libs"):
        if libraries.name.startswith(("numpy", "pillow")):
            (folder / libraries.name).symlink_to(libraries)
    return {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"], "PYTHONUTF8": "1"}


def test_its_script_says_what_epsd_says_with_three_packages_alone(
    handed: Path, photos: list[Path], bare: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    alone = subprocess.run(
        [sys.executable, "-S", str(handed / "predict.py"), *map(str, photos)], env=bare, capture_output=True, text=True
    )
    assert alone.stderr == "" and alone.returncode == 0
    assert cli.main(["predict", "--model", str(handed), *map(str, photos)]) == 0
    assert alone.stdout == capsys.readouterr().out
    missing = [sys.executable, "-S", "-c", "import torch"]
    assert subprocess.run(missing, env=bare, capture_output=True).returncode == 1, (
        "this environment would prove nothing"
    )


@pytest.mark.parametrize("kind", CARDS)
def test_its_script_reads_images_as_epsd_does(kind: str, photos: list[Path]) -> None:
    from epsd.evaluation.predict import Classifier

    script, intake = object.__new__(Classifier), Intake.of(card(kind))
    script.card = card(kind)
    for photo in photos:
        assert np.array_equal(script.read(str(photo)), intake.read(photo) / np.float32(255)), photo.name


def test_int8_goes_along_and_a_file_can_be_named(handed: Path, tmp_path: Path, photos: list[Path]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / FP32).write_bytes((handed / FP32).read_bytes())
    images = np.random.default_rng(0).integers(0, 256, (32, 3, 16, 16)).astype(np.float32)
    deploy.quantise(source / FP32, source / INT8, images)
    assert {FP32, INT8} < set(hand_over(str(source), tmp_path / "both"))
    assert INT8 not in hand_over(str(source / INT8), tmp_path / "one")
    assert (tmp_path / "one" / FP32).read_bytes() == (source / INT8).read_bytes()


def test_a_network_trained_again_is_asked_itself(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: list[Path], handed: Path
) -> None:
    """Not the ONNX file that was made of the one before."""
    monkeypatch.chdir(tmp_path)
    network = built(NET, 3, (3, 16, 16))
    artifacts.save_model(network, artifacts.MODEL, card("square"))
    onnx = artifacts.SERVED_MODEL / "data" / "onnx" / FP32
    onnx.parent.mkdir(parents=True)
    onnx.write_bytes((handed / FP32).read_bytes())
    (artifacts.SERVED_MODEL / "MLmodel").touch()
    assert place_of(None) == artifacts.TRAIN
    artifacts.MODEL.write_bytes(weights.read_bytes())
    assert place_of(None) == artifacts.SERVED_MODEL
    artifacts.MODEL.unlink()
    assert place_of(None) == artifacts.SERVED_MODEL


def test_asking_an_onnx_file_imports_no_torch_and_no_mlflow(handed: Path, photos: list[Path]) -> None:
    code = "import sys; from epsd import cli; assert cli.main(sys.argv[1:]) == 0; "
    code += "print({'torch', 'mlflow', 'pandas', 'onnx'} & set(sys.modules))"
    command = [sys.executable, "-c", code, "predict", "--model", str(handed), str(photos[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n"), done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--to", "taken"], "taken: is there already. Name a new folder."),
        (["--to", "new", "--model", "taken"], "model.json: missing"),
        (
            ["--to", "new", "--model", "mlflow"],
            "has no ONNX file. evaluate makes one where evaluate.export.onnx is true",
        ),
        (["--to", "taken/file/new", "--model", "taken"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("taken/file", "mlflow/MLmodel"):
        Path(name).parent.mkdir()
        Path(name).touch()
    assert cli.main(["export", *arguments]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("epsd: ") and message in errors and errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow", "taken"]


def test_a_folder_that_fails_half_way_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), artifacts.new_folder(tmp_path / "new") as made:
        (made / "file").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with artifacts.new_folder(tmp_path / "empty") as made:
        (made / "file").touch()
    assert (tmp_path / "empty" / "file").is_file()
    with pytest.raises(ArtifactError, match="is there already"), artifacts.new_folder(tmp_path / "empty"):
        pass
