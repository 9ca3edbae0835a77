"""Every path that a stage writes, typed save and load, written to a temporary name and renamed."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epsd.types import EpsdError

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
PRUNE_REPORT = PRUNE / "report.json"
LAYERS = PRUNE / "layers.csv"
MODEL = TRAIN / "model.safetensors"
MODEL_CARD = TRAIN / "model.json"
HISTORY = TRAIN / "history.csv"
RUN = TRAIN / "run.json"
METRICS = EVALUATE / "metrics.json"
SPARSE_MODEL = EVALUATE / "model.sparse.safetensors"
DETECT_METRICS = DETECT / "metrics.json"


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
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`content` as indented JSON. NaN and infinity are refused: they are not JSON."""
    text = json.dumps(content, indent=2, allow_nan=False, default=str) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
