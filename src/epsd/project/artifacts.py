"""Every path that a stage writes, typed save and load, written to a temporary name and renamed."""

import contextlib
import csv
import errno
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from epsd.files import digests
from epsd.files.regular import read_bytes, refused
from epsd.registry import explain
from epsd.types import EpsdError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epsd.compute.narrow import Shapes
    from epsd.masks import Mask

ROOT = Path("artifacts")
PREPARE = ROOT / "prepare"
DATA = ROOT / "data"
VOC = ROOT / "voc"
PRUNE = ROOT / "prune"
TRAIN = ROOT / "train"
EVALUATE = ROOT / "evaluate"
DETECT = ROOT / "detect"

DATA_INDEX = DATA / "data.json"
VOC_INDEX = VOC / "voc.json"
IMAGES_FIGURE = PREPARE / "images.png"
SCENES_FIGURE = PREPARE / "scenes.png"
MASK = PRUNE / "mask.safetensors"
INITIAL = PRUNE / "initial.safetensors"
CHANNELS = PRUNE / "channels.safetensors"
PRUNE_REPORT = PRUNE / "report.json"
LAYERS = PRUNE / "layers.csv"
MASK_FIGURE = PRUNE / "mask.png"
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
DETECT_MODEL = DETECT / "model"
DETECTOR_CARD = DETECT / "model.json"


T = TypeVar("T")
Columns = dict[str, list[float | None]]
_MISSING = "missing. `dvc repro` runs the stage that writes it."
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAMES = "surrogateescape"
"""How text is encoded: the name of a file may hold bytes that are no UTF-8, and they are written as they are."""


class ArtifactError(EpsdError):
    """A file of artifacts/ that is missing, unreadable or cannot be written."""


Size = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Positive = Annotated[Finite, Field(gt=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{8}$")]


class Described(BaseModel):
    """What data.json and the card of a model both say. `mean`, `std`: per channel, of pixels in [0, 1]."""

    class_names: Annotated[list[str], Field(min_length=1)]
    image_shape: tuple[Size, Size, Size]
    mean: list[Finite]
    std: list[Positive]

    @model_validator(mode="after")
    def _of_one_size(self) -> Self:
        if not len(self.mean) == len(self.std) == self.image_shape[0]:
            raise ValueError("mean and std need one value for each channel of image_shape")
        return self


class Card(Described):
    """What stands beside saved weights. `dataset`: what people call that on which they were trained, "" not known."""

    dataset: str = ""
    architecture: dict[str, Any]
    num_classes: Size

    @model_validator(mode="after")
    def _names_all(self) -> Self:
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, class_names are {len(self.class_names)}")
        if not isinstance(self.architecture.get("name"), str):
            raise ValueError("architecture has no name")
        return self


class DetectorCard(Card):
    """The same of a detector. `detected`: its classes; `typical_size`: of its pictures, height and width in pixels."""

    detector: dict[str, Any]
    detected: Annotated[list[str], Field(min_length=1)]
    typical_size: tuple[Size, Size]


@dataclass(frozen=True)
class Run:
    """A run as it is noted for who goes on with it. `history`: digest of the curves beside it, "" for none."""

    run_id: str
    name: str = ""
    tags: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    history: str = ""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it onto `path` when the block ends well, remove it when not.

    Raises ArtifactError where the folder cannot be written or the disk is full; `path` then is what it was before.
    """
    with refused(ArtifactError, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with writing(path):
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the file system refuses in the block is told with the name of `path`, which a full disk does not tell.

    Raises ArtifactError.
    """
    try:
        yield
    except EpsdError:
        raise
    except Exception as error:  # safetensors and others wrap the system's error in their own
        full = next((reason for reason in map(os.strerror, _FULL) if reason in str(error)), None)
        if full is None and not isinstance(error, OSError):
            raise
        reason = full or getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path}: cannot be written ({reason}).") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends well, and is gone when not.

    Raises ArtifactError where `path` is there already (an empty folder may be), or cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ArtifactError(f"{path}: is there already. Name a new folder.")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as beside:
            made = Path(beside) / path.name
            made.mkdir()
            yield made
            made.replace(path)


def check_writable(folder: Path) -> None:
    """Before hours of work for what goes there. Makes the folder. Raises ArtifactError where no file can be written."""
    with refused(ArtifactError, folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`content` as indented JSON, with a digest as its last entry. NaN and infinity are refused: they are not JSON."""
    write_text(path, digests.sealed(content))


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=_NAMES)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises ArtifactError (missing, unreadable), DamagedFile (not what was written)."""
    with refused(ArtifactError, path, "read"):
        try:
            return digests.unsealed(read_bytes(path), path)
        except FileNotFoundError:
            raise ArtifactError(f"{path}: {_MISSING}") from None


def read_card(path: Path) -> dict[str, Any]:
    """The card of a model. Raises as `read_json` and `valid`."""
    card = read_json(path)
    valid(card, Card, path)
    return card


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """What cannot be made of the content of `path` is told with its name. A key of params.yaml may name it."""
    try:
        yield
    except EpsdError as error:
        raise ArtifactError(f"{path}: {error}") from None


def read_run(path: Path) -> Run:
    """Raises as `read_json` and `valid`."""
    return valid(read_json(path), Run, path)


def read_history(run: Run) -> Columns:
    """The curves that `train` left with `run`. Raises as `read_csv`, and DamagedFile where they are not those."""
    digests.check(HISTORY, run.history)
    return read_csv(HISTORY)


def read_report() -> dict[str, float]:
    """What `prune` reported. Raises as `read_json` and `valid`."""
    return valid(read_json(PRUNE_REPORT), dict[str, Finite], PRUNE_REPORT)


def valid(content: Mapping[str, Any], schema: type[T], path: Path) -> T:
    """`content`, read from `path`, as `schema` (a model, a dataclass, a type) makes it.

    Raises ArtifactError naming every key that is missing, of another type, or out of range.
    """
    try:
        return TypeAdapter(schema).validate_python(content)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {explain('', error)}") from None


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
    state = {name: _plain(tensor) for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        digests.save_tensors(temporary, "weights", state, {})


def _plain(tensor: "Tensor") -> "Tensor":
    """A contiguous copy on the CPU, without negative zeros."""
    tensor = tensor.detach().cpu().clone().contiguous()
    return tensor.add_(0.0) if tensor.is_floating_point() else tensor


def load_state(path: Path) -> "dict[str, Tensor]":
    """The weights that `save_model` wrote, on the CPU. Raises ArtifactError (missing), DamagedFile."""
    if not path.exists():
        raise ArtifactError(f"{path}: {_MISSING}")
    return digests.load_tensors(path, "weights")[0]


def load_shapes() -> "Shapes":
    """Of the tensors that `prune` made smaller; {} where the network is as wide as its architecture.

    Raises DamagedFile; ArtifactError where they are no shapes.
    """
    about = digests.load_tensors(CHANNELS, "channels")[1]
    return valid(about, dict[str, dict[str, tuple[Size, ...]]], CHANNELS).get("shapes", {})


def load_into(model: "nn.Module", path: Path) -> "nn.Module":
    """`model` itself with the weights of `path`. Raises as `load_state` and `fill`."""
    return fill(model, load_state(path), path)


def fill(model: "nn.Module", state: Mapping[str, "Tensor"], path: Path) -> "nn.Module":
    """`model` itself with the weights `state`, read from `path`.

    Raises ArtifactError where they are another network's, or all zero: every image would get the same answer.
    """
    matrices = [tensor for tensor in state.values() if tensor.ndim > 1 and tensor.is_floating_point()]
    if matrices and not any(tensor.any() for tensor in matrices):
        raise ArtifactError(f"{path}: all weights are zero.")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{path}: does not fit the network of its card ({reason}).") from None
    return model


def load_mask(model: "nn.Module") -> "Mask":
    """The mask that `prune` left for `model`. Raises as `Mask.load`, and ArtifactError where it does not fit."""
    from epsd.masks import Mask

    mask = Mask.load(MASK)
    with naming(MASK):
        mask.check(model)
    return mask


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
    with replacing(CHANNELS) as temporary:
        digests.save_tensors(temporary, "channels", dict(channels or {}), {"shapes": shapes or {}})
    with replacing(MASK) as temporary:
        mask.save(temporary)
    _save_state(initial, INITIAL)
    write_json(PRUNE_REPORT, report)
    write_records(LAYERS, layers)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with one line of column names; floats as Python prints them, so that they read back exactly."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors=_NAMES) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_records(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of rows that all have the columns of the first."""
    write_csv(path, tuple(rows[0]), [tuple(row.values()) for row in rows])


def read_csv(path: Path) -> Columns:
    """The columns of a table of numbers by name; an empty field is None, a column with other text is left out.

    Raises ArtifactError when the file is missing or cannot be read.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(path).decode("utf-8"), newline="")))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: {_MISSING}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}).") from None
    columns: Columns = {}
    for name in rows[0] if rows else ():
        with contextlib.suppress(ValueError, TypeError):
            columns[name] = [float(row[name]) if row[name] else None for row in rows]
    return columns
