"""Where trained weights lie, and what is in there: for whoever goes on with them. Starts without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epsd.files import digests
from epsd.files.regular import check_regular
from epsd.project import artifacts
from epsd.project.artifacts import ArtifactError
from epsd.project.runtime import located
from epsd.tracking import registered
from epsd.tracking.models import CANDIDATE, NAME

if TYPE_CHECKING:
    from torch import Tensor

    from epsd.pruning.start import Source

_SPARSE = artifacts.SPARSE_MODEL.name
_INSIDE = ("", artifacts.TRAIN.name, str(artifacts.TRAIN), "extra_files")
"""Where a folder may have them: it is artifacts/train (or a run's), artifacts, a project, or a model that MLflow keeps
as a pickle."""


def weights_of(wanted: str | Path, name: str = NAME) -> Path:
    """The file of trained weights that is meant, with its card beside it (.json) or, in a compact file, inside it.

    `wanted`: a file, a folder (of weights, `artifacts/`, the project), `champion`, `candidate`, an address such as
    `models:/epsd/3`, or a run: its id, the beginning of it, or its name. The mask lies beside the weights of a run.
    `name`: the registered model whose alias or run is meant.

    Raises ArtifactError: nothing there, or no weights in it; RegistryError: nothing of that name in the store.
    """
    place = Path(wanted)
    if str(wanted) in (CANDIDATE, registered.CHAMPION) or not place.exists():
        place = registered.fetch_weights(str(wanted), name)
    if place.is_file():
        if place.suffix != ".safetensors":
            raise ArtifactError(f"{place}: no weights of epsd, which are .safetensors files.")
        return place
    inside = [place / folder / file for folder in _INSIDE for file in (artifacts.MODEL.name, _SPARSE)]
    found = next((path for path in inside if path.is_file()), None)
    if found is None:
        raise ArtifactError(f"{place}: no {artifacts.MODEL.name} in it, nor in {', '.join(_INSIDE[1:])}.")
    return found


_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPED = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema")
"""Keys under which checkpoints of others keep their weights."""
_VALID = "Valid: a file (.safetensors, .pt, .pth), a folder of weights, champion, candidate, models:/epsd/3 or a run"


def start_of(wanted: str, key: str = "start.weights") -> Path:
    """The file that `start.weights` means: as `weights_of`, or any file of tensors. Raises its errors, by `key`."""
    place = located(wanted)
    try:
        if place.is_file() and place.suffix in (".safetensors", *_TORCH):
            return place
        if not place.exists() and (place.suffix in (".safetensors", *_TORCH) or wanted.startswith(("/", ".", "~"))):
            raise ArtifactError(f"{place}: no such file or folder. {_VALID}.")
        return weights_of(place if place.exists() else wanted)
    except (ArtifactError, registered.RegistryError) as error:
        raise ArtifactError(f"{key}: {error}") from None


def content_of(wanted: str, key: str = "start.weights") -> str:
    """A digest of the file that `start.weights` means, and of the mask beside it. Raises as `start_of`."""
    path = start_of(wanted, key)
    found = [place for place in (path, _mask_beside(path)) if place is not None]
    return "-".join(digests.digest_of(place) for place in found)


def source_of(wanted: str, key: str = "start.weights") -> "Source":
    """The weights that `start.weights` means, with their card and mask where they have some.

    Raises ArtifactError by `key`: nothing there, no file of tensors alone; DamagedFile.
    """
    from epsd.evaluation import compact_file
    from epsd.masks import Mask
    from epsd.pruning.start import Source

    path, card = start_of(wanted, key), dict[str, Any]()
    if compact_file.is_compact(path):
        state, card = compact_file.load(path)
    elif digests.kind_of(path) == "weights":
        state = artifacts.load_state(path)
        beside = path.with_suffix(".json")
        card = artifacts.read_card(beside) if beside.exists() else {}
    else:
        with artifacts.naming(key):
            state = _bare(path)
    mask = _mask_beside(path) if card else None
    return Source(wanted, state, card, None if mask is None else Mask.load(mask), key)


def _mask_beside(path: Path) -> Path | None:
    """That of a run lies in the same folder, that of a project in artifacts/prune."""
    places = (path.parent, path.parents[1] / artifacts.PRUNE.name) if len(path.parts) > 2 else (path.parent,)
    return next((mask for place in places if (mask := place / artifacts.MASK.name).is_file()), None)


def _bare(path: Path) -> "dict[str, Tensor]":
    """Tensors by name of a file that anybody wrote. No code in it is run."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(check_regular(path))
        else:
            content = torch.load(check_regular(path), map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({_first_line(error)}).") from None
    except Exception:  # pickle's own, of many kinds; torch's text recommends to run the code
        raise ArtifactError(
            f"{path}: holds more than tensors, and no code of a file is run: save model.state_dict() alone."
        ) from None
    for key in _WRAPPED:
        content = content[key] if isinstance(content, Mapping) and isinstance(content.get(key), Mapping) else content
    entries = content.items() if isinstance(content, Mapping) else ()
    state = {str(name): value for name, value in entries if isinstance(value, torch.Tensor)}
    if not state:
        raise ArtifactError(f"{path}: holds no tensors by name: save model.state_dict().")
    return state


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())[:160].rstrip(".")
