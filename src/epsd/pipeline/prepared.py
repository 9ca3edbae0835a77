"""The prepared data for `epsd tune` and `epsd analyse`: DVC runs neither, so nothing else sees that it is old."""

from epsd.compute.devices import Machine
from epsd.data.prepared import Prepared
from epsd.project import artifacts
from epsd.project.artifacts import ArtifactError
from epsd.project.params import Params, flatten

_SHARES = {"validation", "test", "limit", "classes"}
_AGAIN = "Run `dvc repro prepare` first."


def opened(params: Params, machine: Machine = Machine()) -> Prepared:
    """What lies in artifacts/data, which `prepare` made from these parameters, with images for validation.

    Raises ArtifactError: missing or damaged; made from other parameters, or by a version of `prepare` that did not note
    from which; without a validation split.
    """
    if not artifacts.DATA_INDEX.is_file():
        raise ArtifactError(f"{artifacts.DATA_INDEX}: missing. {_AGAIN}")
    data = Prepared.load(artifacts.DATA, machine)
    noted = {"dataset": params.dataset, "seed": params.seed, **params.data.model_dump(include=_SHARES)}
    then, now = dict(flatten(data.index["settings"])), dict(flatten(noted))
    for key in sorted({*then, *now} - {"carved"}):
        before, wanted = (settings.get(key, "unset") for settings in (then, now))
        if before != wanted:
            name = f"data.{key}" if key in _SHARES else key
            raise ArtifactError(f"{artifacts.DATA_INDEX}: made with {name} {before}, not {wanted}. {_AGAIN}")
    if not data.sizes.get("validation"):
        raise ArtifactError(
            f"{artifacts.DATA_INDEX}: there is no validation split, and the test split is not read here: set "
            "data.validation above 0 and run `dvc repro prepare`."
        )
    return data
