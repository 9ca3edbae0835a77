"""A model's folder as MLflow keeps it: exported without pickled code, for any number and size of images."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from epsd.evaluation.intake import Intake
from epsd.evaluation.servable import asking
from epsd.pipeline.export import SCRIPT
from epsd.tracking import models
from handed_on import INTAKE, asked, contents, exported_folder, model_folder, onnx_folder, servable


@pytest.fixture(scope="module", params=["onnx", "pt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In both forms without pickled code."""
    make = {"onnx": model_folder, "pt2": exported_folder}[request.param]
    return make(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (2, 1, 4, 4), (7, 1, 4, 4), (3, 1, 9, 13), (1, 1, 2, 40)])
def test_the_export_answers_as_the_module(folder: Path, shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape).float()
    onnx = (folder / "data" / "onnx").is_dir()
    loaded = asked(folder) if onnx else asking(models.load_exported(folder))
    resized = shape[2:] != (4, 4)  # where a level of a pixel may differ
    assert loaded(images.numpy()) == pytest.approx(asking(servable())(images.numpy()), abs=0.01 if resized else 1e-5)


def test_mlflow_knows_signature_example_and_class_names(folder: Path) -> None:
    import mlflow

    words = yaml.safe_load((folder / "MLmodel").read_text())
    assert words["metadata"]["class_names"] == INTAKE.class_names
    assert Intake.of(models.card_of(folder)) == INTAKE
    assert (folder / "extra_files" / "model_card.md").read_text() == "# A model\n"
    loaded = mlflow.pyfunc.load_model(str(folder))
    assert loaded.input_example.shape == (2, 1, 4, 4)
    answer = loaded.predict(loaded.input_example)
    assert answer.shape == (2, 3) and answer.sum(1) == pytest.approx([1, 1], abs=1e-5)
    with pytest.raises(mlflow.MlflowException, match="shape"):
        loaded.predict(np.zeros((2, 4, 4, 1), dtype=np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_no_number_is_refused(folder: Path, value: float) -> None:
    import mlflow

    images = np.ones((2, 1, 4, 4), dtype=np.float32)
    images[1, 0, 2, 2] = value
    with pytest.raises(Exception, match="a pixel is NaN"):
        mlflow.pyfunc.load_model(str(folder)).predict(images)


def test_nothing_in_it_is_pickled_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.pyfunc

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.pyfunc.load_model(str(folder))
    kinds = {path.suffix for path in folder.rglob("*.*") if path.parent.name != "__pycache__"}  # Python's own
    assert kinds <= {".onnx", ".pt2", ".py", ".json", ".yaml", ".md", ".txt"}


def test_mlflow_reads_the_onnx_file_by_its_own_flavour(tmp_path: Path) -> None:
    import mlflow.onnx

    assert mlflow.onnx.load_model(str(model_folder(tmp_path))).producer_name == "epsd"


class Stubborn(nn.Module):
    """Exports only where `accepts` agrees with the height that the export gives it."""

    def __init__(self, accepts: type) -> None:
        super().__init__()
        self.accepts = accepts
        self.inner = servable()

    def forward(self, images: Tensor) -> Tensor:
        if torch.compiler.is_exporting() and not isinstance(images.shape[2], self.accepts):
            raise RuntimeError("only one size")
        answer: Tensor = self.inner(images)
        return answer


def test_a_network_for_one_size_is_exported_for_that_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models.write(tmp_path / "model", Stubborn(int).eval(), contents(tmp_path)) == "pt2"
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "a model for images of any size was not possible" in errors
    images = torch.randint(0, 256, (5, 1, 4, 4)).float()
    torch.testing.assert_close(models.load_exported(tmp_path / "model")(images), servable()(images))


def test_what_cannot_be_exported_is_pickled_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    given = contents(tmp_path, weights=[tmp_path / "model.safetensors"])
    assert models.write(tmp_path / "model", Stubborn(str).eval(), given) == "pickle"
    assert "is a pickle: load it only where you trust" in capsys.readouterr().err
    assert (tmp_path / "model" / "extra_files" / "model.safetensors").read_bytes() == b"weights"
    import mlflow

    images = np.ones((3, 1, 4, 4), dtype=np.float32)
    answer = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(images)
    assert answer == pytest.approx(servable()(torch.from_numpy(images)).detach().numpy(), abs=1e-6)
    with pytest.raises(models.ModelError, match="nothing is unpickled here"):
        models.load_exported(tmp_path / "model")


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_links_without_the_right_to_write_are_read_and_left(form: str, tmp_path: Path) -> None:
    """As DVC lays them in place of its outputs."""
    cache, made = tmp_path / "cache", tmp_path / "made"
    cache.mkdir()
    given = contents(cache, onnx=onnx_folder(cache), script=SCRIPT) if form == "onnx" else contents(cache)
    made.mkdir()
    for file in given.files:
        (made / file.name).symlink_to(file)
        file.chmod(0o444)
    given = given._replace(files=[made / file.name for file in given.files])
    assert models.write(made / "model", servable(), given) == form
    copies = [path for path in (made / "model").rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o200 and not path.is_symlink() for path in copies)
    for number, path in enumerate(copies):
        path.symlink_to(path.rename(cache / str(number)))
    images = np.ones((3, 1, 4, 4), dtype=np.float32)
    ask = asked(made / "model") if form == "onnx" else asking(models.load_exported(made / "model"))
    assert ask(images) == pytest.approx(asking(servable())(images), abs=1e-5)


def test_writing_again_replaces_the_old_one_only_when_the_new_is_whole(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    before = (folder / "MLmodel").read_text()
    with pytest.raises(FileNotFoundError):
        models.write(folder, servable(), contents(tmp_path)._replace(files=[tmp_path / "gone.md"], weights=[]))
    assert (folder / "MLmodel").read_text() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_other_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match="no model of MLflow"):
        models.card_of(tmp_path)
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    with pytest.raises(models.ModelError, match="not a model that epsd wrote"):
        models.card_of(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "model.pt2").write_bytes(b"no archive")
    with pytest.raises(models.ModelError, match="cannot be loaded"):
        models.load_exported(tmp_path)
