"""Where trained weights lie: for whoever goes on with them. Starts without torch."""

from pathlib import Path

from epsd.project import artifacts
from epsd.project.artifacts import ArtifactError
from epsd.tracking import registered
from epsd.tracking.models import CANDIDATE, NAME

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
