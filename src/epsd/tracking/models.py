"""Models as MLflow keeps them: written to a folder, read from it, recorded with their run and registered.

A folder that `write` made can be served without any store (`mlflow models serve -m FOLDER`). Recording it is one more
event of a run, so that it waits in the spool like the others while the store is away.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from epsd.project.artifacts import writing
from epsd.project.runtime import brief, no_telemetry, note
from epsd.types import EpsdError

NAME, DETECTOR = "epsd", "epsd-detector"
"""Of the registered models: classifiers, and the detectors around them."""


class Kind(NamedTuple):
    """What the registry says of a model: `headline` metrics as tags of a version, all of `figures` as its metrics."""

    description: str
    type: str
    headline: tuple[str, ...]
    figures: tuple[str, ...]


KINDS = {
    NAME: Kind(
        "Classifiers pruned before training by epsd.",
        "classifier",
        ("test/top1", "model/sparsity"),
        ("test/", "model/", "deploy/", "latency/"),
    ),
    DETECTOR: Kind(
        "Detectors around backbones that epsd pruned before training.",
        "detector",
        ("detect/map50", "detect/sparsity"),
        ("detect/",),
    ),
}

CANDIDATE = "candidate"
"""Alias of what was evaluated last."""

PLAIN = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
"""Environment of MLflow. It draws a bar for every file that it copies, on terminals and in logs alike, and prints where
to view a run on a server, through the bar that is being drawn and between the lines of a command's result.
"""

Format = Literal["onnx", "pt2", "pickle"]


class ModelError(EpsdError):
    """A model that cannot be read."""


# --- writing --------------------------------------------------------------------------------------------------------


class Contents(NamedTuple):
    """What goes into a model's folder beside the module.

    `example` (B, C, H, W) float32, B > 1: what a client sends, any size. `network_sized`: likewise, in the one size
    that needs no resizing. `classes`: outputs. `metadata`: anything JSON. `files`: copied to `extra_files`.
    `weights`: the same for a module that could only be pickled, so that `epsd predict` need not unpickle.
    `onnx`: a folder with `model.onnx` and what else is to lie beside it; `script`: a module that opens it for MLflow.
    """

    example: NDArray[np.float32]
    network_sized: NDArray[np.float32]
    classes: int
    metadata: Mapping[str, Any]
    files: Sequence[Path]
    weights: Sequence[Path]
    onnx: Path | None = None
    script: Path | None = None


def write(folder: Path, module: Any, contents: Contents) -> Format:
    """Write `module` (on the CPU, in evaluation mode) to `folder` as an MLflow model, replacing what was there.

    As the ONNX file that `contents` brings, which is served without torch. Where it brings none, as an exported graph
    without pickled code (`torch.export`): for images of any size, else for those of the network's own, and as a pickle
    where the network cannot be exported at all; the two latter are said in a line.

    Raises FileNotFoundError for one of `files` that is not there, ArtifactError where `folder` cannot be written.
    """
    for path in contents.files:
        path.stat()
    no_telemetry()
    with quietly():
        if contents.onnx is not None:
            assert contents.script is not None
            about = _described(module, contents, contents.example, _shape(contents))
            _onnx(folder, contents.onnx, contents.script, contents.files, about)
            return "onnx"
        for attempt in (_any_size, _own_size):
            try:
                attempt(folder, module, contents)
                return "pt2"
            except (OSError, EpsdError):
                raise
            except Exception as error:  # torch.export raises nearly any type
                note(f"evaluate: {attempt.__doc__} was not possible ({type(error).__name__}: {brief(error)}).")
        _pickled(folder, module, contents)
    note(f"evaluate: {folder} is a pickle: load it only where you trust who made it.")
    return "pickle"


def write_detector(
    folder: Path,
    module: Any,
    picture: bytes,
    metadata: Mapping[str, Any],
    *,
    onnx: Path,
    script: Path,
    files: list[Path],
) -> None:
    """Write a detector (on the CPU) to `folder` as an MLflow model, replacing what was there: its ONNX file, served
    without torch. It takes the bytes of image files, and gives boxes, classes and scores of each.

    `picture`: an image file as the example. `onnx`, `script`, `metadata`, `files`: as of `Contents`.
    Raises FileNotFoundError for one of `files` that is not there, OSError where `folder` cannot be written.
    """
    import pandas as pd

    for path in files:
        path.stat()
    no_telemetry()
    with quietly():
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, DataType, Schema
        from mlflow.types.schema import Array

        named = {"boxes": Array(Array(DataType.double)), "classes": Array(DataType.string)}
        outputs = [ColSpec(kind, name) for name, kind in {**named, "scores": Array(DataType.double)}.items()]
        about = {
            "signature": ModelSignature(Schema([ColSpec(DataType.binary, "image")]), Schema(outputs)),
            "input_example": pd.DataFrame({"image": [picture]}),
            "metadata": {**metadata, "registered": DETECTOR, "digest": _digest(module, metadata)},
        }
        _onnx(folder, onnx, script, files, about)


def _onnx(folder: Path, made_of: Path, script: Path, files: Sequence[Path], about: Mapping[str, Any]) -> None:
    import mlflow.pyfunc
    import onnx
    from mlflow.models import Model

    words = Model()
    words.add_flavor(
        "onnx", onnx_version=onnx.__version__, data=f"data/{made_of.name}/model.onnx"
    )  # as `mlflow.onnx` reads it
    with _beside(folder) as made:
        mlflow.pyfunc.save_model(
            str(made),
            mlflow_model=words,
            loader_module=script.stem,
            code_paths=[str(script)],
            data_path=str(made_of),
            pip_requirements=_requirements("mlflow", "onnxruntime", "numpy", "pillow"),
            **about,
        )
        _add(files, made)


def _add(files: Sequence[Path], folder: Path) -> None:
    """MLflow would refuse a link that leads elsewhere, such as DVC's to its cache; and those have no right to write."""
    (folder / "extra_files").mkdir()
    for path in files:
        shutil.copyfile(path, folder / "extra_files" / path.name)


def _shape(contents: Contents) -> tuple[int, ...]:
    return (-1, contents.example.shape[1], -1, -1)


def _any_size(folder: Path, module: Any, contents: Contents) -> None:
    """a model for images of any size"""
    _save(folder, module, contents, contents.example, _shape(contents), "pt2", contents.files)


def _own_size(folder: Path, module: Any, contents: Contents) -> None:
    """a model for images of the network's own size"""
    example = contents.network_sized
    _save(folder, module, contents, example, (-1, *example.shape[1:]), "pt2", contents.files)


def _pickled(folder: Path, module: Any, contents: Contents) -> None:
    files = [*contents.files, *contents.weights]
    _save(folder, module, contents, contents.example, _shape(contents), "pickle", files)


def _save(
    folder: Path,
    module: Any,
    contents: Contents,
    example: NDArray[np.float32],
    shape: tuple[int, ...],
    form: Format,
    files: Sequence[Path],
) -> None:
    import mlflow.pytorch

    with _beside(folder) as made:
        mlflow.pytorch.save_model(
            module,
            str(made),
            pip_requirements=_requirements("mlflow", "torch", "numpy"),
            serialization_format=form,
            **_described(module, contents, example, shape),
        )
        _add(files, made)


def _described(module: Any, contents: Contents, example: NDArray[np.float32], shape: tuple[int, ...]) -> dict[str, Any]:
    """What MLflow is told of every model, in whichever form."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    number = np.dtype(np.float32)
    outputs = Schema([TensorSpec(number, (-1, contents.classes))])
    return {
        "signature": ModelSignature(Schema([TensorSpec(number, shape)]), outputs),
        "input_example": example,
        "metadata": {**contents.metadata, "digest": _digest(module, contents.metadata)},
    }


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A place beside `folder`, which is put in its place when the block ends well: what was there stays until then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with writing(folder), tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        yield Path(beside) / folder.name
        shutil.rmtree(folder, ignore_errors=True)
        (Path(beside) / folder.name).rename(folder)


def _digest(module: Any, metadata: Mapping[str, Any]) -> str:
    """Of weights and metadata. The file would not do: two exports of one network differ."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _requirements(*names: str) -> list[str]:
    """What serving needs. Without a list MLflow would find one by loading the model in another process."""
    from importlib.metadata import version

    pinned = {name: version(name).partition("+")[0] for name in names}
    return [f"{name}=={number}" for name, number in pinned.items()]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Warnings and bars of MLflow and torch that a user can do nothing about stay out of the log."""
    for variable, value in PLAIN.items():
        os.environ.setdefault(variable, value)
    import mlflow  # sets the level of its logger when it is imported

    loggers = [logging.getLogger(name) for name in (mlflow.__name__, "torch")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


# --- reading ---------------------------------------------------------------------------------------------------------


def load_exported(folder: Path) -> Any:
    """The exported graph of a model's folder as a module. Nothing is unpickled.

    Raises ModelError for a folder whose model could only be pickled, or cannot be read.
    """
    if not (folder / "data" / "model.pt2").is_file():
        raise ModelError(f"{folder}: its model could not be exported and was pickled; nothing is unpickled here.")
    no_telemetry()
    variable = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
    before = os.environ.get(variable)
    os.environ[variable] = "false"
    try:
        with quietly(), _without_links(folder) as whole:
            import mlflow.pytorch

            return mlflow.pytorch.load_model(str(whole))
    except Exception as error:
        raise ModelError(f"{folder}: its model cannot be loaded ({brief(error)}).") from None
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextlib.contextmanager
def _without_links(folder: Path) -> Iterator[Path]:
    """The folder, or a copy for the time being where it holds links: MLflow follows none that leads elsewhere."""
    if not any(path.is_symlink() for path in folder.rglob("*")):
        yield folder
        return
    with tempfile.TemporaryDirectory() as elsewhere:
        yield Path(shutil.copytree(folder, Path(elsewhere) / folder.name))


def card_of(folder: Path) -> dict[str, Any]:
    """The card that `write` was given as metadata. Raises ModelError where this is no folder of ours."""
    try:
        return dict(json.loads(_words(folder)["metadata"]["card"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: not a model that epsd wrote ({type(error).__name__}: {error}).") from None


def _words(folder: Path) -> dict[str, Any]:
    """MLflow's own description of a model. Raises ModelError where there is none that can be read."""
    import yaml

    try:
        return dict(yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: no model of MLflow ({brief(error)}).") from None


# --- recording ------------------------------------------------------------------------------------------------------


def record(client: Any, run_id: str, folder: Path) -> str:
    """Record the model in `folder` with its run, register it, make it the candidate; returns the version.

    Once only: the same model of the same run is found again. Raises what MLflow raises.
    """
    run, metadata = client.get_run(run_id), _words(folder)["metadata"]
    digest, name = str(metadata["digest"]), metadata.get("registered", NAME)
    dataset = str(json.loads(metadata.get("card", "{}")).get("dataset", ""))
    model_id = _recorded(client, run, digest) or _new_model(client, run, folder, digest, KINDS[name])
    version = _version(client, run, model_id, name, {"dataset": dataset} if dataset else {})
    client.set_registered_model_alias(name, CANDIDATE, version)
    return version


def _recorded(client: Any, run: Any, digest: str) -> str | None:
    """The model of this digest that the run has already."""
    for output in run.outputs.model_outputs if run.outputs else ():
        model = client.get_logged_model(output.model_id)
        if model.tags.get("epsd.digest") == digest and str(model.status) == "READY":
            return str(model.model_id)
    return None


def _new_model(client: Any, run: Any, folder: Path, digest: str, kind: Kind) -> str:
    from mlflow.entities import LoggedModelOutput, Metric

    run_id = run.info.run_id
    model = client.create_logged_model(
        run.info.experiment_id,
        name=re.sub(r"[/:.%\"']", "_", run.info.run_name),  # what MLflow refuses in this name
        source_run_id=run_id,
        tags={"epsd.digest": digest},
        params=run.data.params,
        model_type=kind.type,
    )
    with tempfile.TemporaryDirectory() as copy:
        client.log_model_artifacts(model.model_id, str(_addressed(folder, Path(copy), run_id, model)))
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    figures = [
        Metric(point.key, point.value, point.timestamp, point.step, model_id=model.model_id, run_id=run_id)
        for key in run.data.metrics
        if key.startswith(kind.figures) and "/train_" not in key
        for point in client.get_metric_history(run_id, key)[-1:]
    ]
    client.log_batch(run_id, metrics=figures)
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def _addressed(folder: Path, copy: Path, run_id: str, model: Any) -> Path:
    """A copy of `folder` that knows its run and its own id."""
    from mlflow.models import Model

    whole = copy / folder.name
    shutil.copytree(folder, whole)
    words = Model.load(str(whole / "MLmodel"))
    words.run_id, words.model_id, words.model_uuid = run_id, model.model_id, model.model_id
    words.artifact_path = model.artifact_location
    words.save(str(whole / "MLmodel"))
    return whole


def _version(client: Any, run: Any, model_id: str, name: str, tags: Mapping[str, str]) -> str:
    """The registered version of this model, made where it is not there."""
    source = f"models:/{model_id}"
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run.info.run_id}'"):
        if version.source == source or getattr(version, "model_id", None) == model_id:
            return str(version.version)
    with contextlib.suppress(Exception):  # it is there already, or the next call says what is wrong
        client.create_registered_model(name, description=KINDS[name].description)
    figures = {key: f"{run.data.metrics[key]:.4f}" for key in KINDS[name].headline if key in run.data.metrics}
    with _global_store(client.tracking_uri):
        made = client.create_model_version(
            name,
            source,
            run.info.run_id,
            tags=figures | dict(tags),
            description=run.data.tags.get("mlflow.note.content", ""),
            await_creation_for=0,
            model_id=model_id,
        )
    return str(made.version)


@contextlib.contextmanager
def _global_store(uri: str) -> Iterator[None]:
    """MLflow's registry looks a model up in the process's store, not in its client's: in the copy of a queued
    experiment that would be another one.
    """
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
