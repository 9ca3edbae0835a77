"""Every path that a stage writes, typed save and load, written to a temporary name and renamed."""

import contextlib
import csv
import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epsd.types import EpsdError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epsd.compute.narrow import Shapes
    from epsd.masks import Mask

ROOT = Path("artifacts")
DATA = ROOT / "data"
VOC = ROOT / "voc"
PRUNE = ROOT / "prune"
TRAIN = ROOT / "train"
EVALUATE = ROOT / "evaluate"
DETECT = ROOT / "detect"

DATA_INDEX = DATA / "data.json"
VOC_INDEX = VOC / "voc.json"
MASK = PRUNE / "mask.safetensors"
INITIAL = PRUNE / "initial.safetensors"
CHANNELS = PRUNE / "channels.safetensors"
PRUNE_REPORT = PRUNE / "report.json"
LAYERS = PRUNE / "layers.csv"
MODEL = TRAIN / "model.safetensors"
MODEL_CARD = TRAIN / "model.json"
HISTORY = TRAIN / "history.csv"
RUN = TRAIN / "run.json"
METRICS = EVALUATE / "metrics.json"
PER_CLASS = EVALUATE / "per_class.csv"
CONFUSION = EVALUATE / "confusion.csv"
RELIABILITY = EVALUATE / "reliability.csv"
CONFUSION_FIGURE = EVALUATE / "confusion.png"
RELIABILITY_FIGURE = EVALUATE / "reliability.png"
DENSITY_FIGURE = EVALUATE / "density.png"
CURVES_FIGURE = EVALUATE / "curves.png"
EVALUATE_FIGURES = (CONFUSION_FIGURE, RELIABILITY_FIGURE, DENSITY_FIGURE, CURVES_FIGURE)
EVALUATE_TABLES = (METRICS, PER_CLASS, CONFUSION, RELIABILITY)
SPARSE_MODEL = EVALUATE / "model.sparse.safetensors"
SERVED_MODEL = EVALUATE / "model"
MODEL_README = EVALUATE / "model_card.md"
DETECT_METRICS = DETECT / "metrics.json"
DETECT_PER_CLASS = DETECT / "per_class.csv"
DETECT_HISTORY = DETECT / "history.csv"
DETECT_PICTURES = DETECT / "pictures"
DETECT_GALLERY = DETECT_PICTURES / "detections.png"
DETECTOR = DETECT / "model.safetensors"
DETECTOR_CARD = DETECT / "model.json"


_NAMES = "surrogateescape"
"""How text is encoded: the name of a file may hold bytes that are no UTF-8, and they are written as they are."""


class ArtifactError(EpsdError):
    """A file of artifacts/ that is missing, unreadable or cannot be written."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it onto `path` when the block ends well, remove it when not.

    Raises ArtifactError where the folder cannot be written or the disk is full; `path` then is what it was before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error}).") from None
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error}).") from error
    except Exception as error:  # safetensors wraps the system's error in its own
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise ArtifactError(f"{path}: cannot be written ({os.strerror(errno.ENOSPC)}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Before hours of work for what goes there. Makes the folder. Raises ArtifactError where no file can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be written ({error.strerror or error}).") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`content` as indented JSON. NaN and infinity are refused: they are not JSON."""
    text = json.dumps(content, indent=2, allow_nan=False, default=str) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=_NAMES)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ArtifactError when the file is missing (naming the stage that writes it) or no JSON mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing. `dvc repro` runs the stage that writes it.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: expected a JSON mapping.")
    return content


def save_model(model: "nn.Module", path: Path, card: Mapping[str, Any]) -> None:
    """The state dict of `model` as safetensors at `path`, and `card` beside it with the ending .json.

    The card says how to build the network again: `architecture` (the choice of params.yaml), `num_classes`,
    `class_names`, `image_shape`, `mean`, `std`; the stage may add what it likes (a mask summary). The weights
    are written first: a card without its weights never exists. Masking by multiplication leaves negative zeros; they
    are written as zeros.
    """
    _save_state(model, path)
    write_json(path.with_suffix(".json"), card)


def _save_state(model: "nn.Module", path: Path) -> None:
    from safetensors.torch import save_file

    state = {name: _plain(tensor) for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary)


def _plain(tensor: "Tensor") -> "Tensor":
    """A contiguous copy on the CPU, without negative zeros."""
    tensor = tensor.detach().cpu().clone().contiguous()
    return tensor.add_(0.0) if tensor.is_floating_point() else tensor


def load_state(path: Path) -> "dict[str, Tensor]":
    """The tensors of a safetensors file, on the CPU. Raises ArtifactError: missing, or not such a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ArtifactError(f"{path}: missing. `dvc repro` runs the stage that writes it.")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors ({error}).") from None


def load_shapes() -> "Shapes":
    """Of the tensors that `prune` made smaller; {} where the network is as wide as its architecture.

    Raises ArtifactError: missing, or not what `save_pruned` writes.
    """
    from safetensors import SafetensorError, safe_open

    if not CHANNELS.is_file():
        raise ArtifactError(f"{CHANNELS}: missing. `dvc repro` runs the stage that writes it.")
    try:
        with safe_open(CHANNELS, "pt") as file:
            return {name: tuple(shape) for name, shape in json.loads(file.metadata()["shapes"]).items()}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{CHANNELS}: cannot be read ({error}).") from None


def load_into(model: "nn.Module", path: Path) -> "nn.Module":
    """`model` itself with the weights of `path`. Raises ArtifactError: missing, unreadable, or of another network."""
    return fill(model, load_state(path), path)


def fill(model: "nn.Module", state: Mapping[str, "Tensor"], path: Path) -> "nn.Module":
    """`model` itself with the weights `state`, read from `path`. Raises ArtifactError where they are another's."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{path}: does not fit the network of its card ({reason}).") from None
    return model


def save_pruned(
    mask: "Mask",
    initial: "nn.Module",
    report: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    channels: "Mapping[str, Tensor] | None" = None,
    shapes: "Shapes | None" = None,
) -> None:
    """What `prune` found: mask, the initial weights it was found for (all of them), report, a row for each layer.

    channels, shapes : of a network that was made narrow: positions kept in each group, tensors that became smaller.
    """
    from safetensors.torch import save_file

    with replacing(CHANNELS) as temporary:
        save_file(dict(channels or {}), temporary, {"shapes": json.dumps(shapes or {})})
    with replacing(MASK) as temporary:
        mask.save(temporary)
    _save_state(initial, INITIAL)
    write_json(PRUNE_REPORT, report)
    write_csv(LAYERS, tuple(layers[0]), [tuple(row.values()) for row in layers])


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with one line of column names; floats as Python prints them, so that they read back exactly."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors=_NAMES) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_csv(path: Path) -> dict[str, list[float | None]]:
    """The columns of a table of numbers by name; an empty field is None, a column with other text is left out.

    Raises ArtifactError when the file is missing or cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing. `dvc repro` runs the stage that writes it.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}).") from None
    columns: dict[str, list[float | None]] = {}
    for name in rows[0] if rows else ():
        with contextlib.suppress(ValueError, TypeError):
            columns[name] = [float(row[name]) if row[name] else None for row in rows]
    return columns
