"""Which parameters of a run can bear on which metric."""

from collections.abc import Mapping

from epsd.comparison.metrics import is_timing
from epsd.comparison.types import Entry, Row
from epsd.project.params import bearing
from epsd.project.settings import TIMING, Bearing

MACHINE = ("threads", "versions.cpu", "versions.gpu")
"""Tags of a run that say what it was timed on."""


def configuration(entry: Entry, metric: str) -> dict[str, str]:
    """Every parameter but the seed that can bear on `metric`."""
    params = {**entry.params, **entry.machine}
    dense, narrow = is_dense(params), is_narrow(params)
    return {
        key: value
        for key, value in sorted(params.items())
        if key != "seed" and _bears(key, metric) and _note(key).neutral != value
        and not (dense and key.startswith("prune.") and key != "prune.sparsity" and "procedure.name" not in params)
        and not (key in OF_CHANNELS and not narrow)
        and not (key in ("train.milestones", "train.gamma") and params.get("train.schedule", "step") != "step")
    }  # fmt: skip


OF_CHANNELS = tuple(f"prune.{name}" for name in ("macs", "latency_ms", "bytes", "allocation", "round_to", "floor"))


def is_narrow(config: Mapping[str, str]) -> bool:
    """Whether channels were cut before training."""
    return config.get("prune.structure") == "channels"


def is_dense(config: Mapping[str, str]) -> bool:
    """Whether nothing was removed: no weight and no channel."""
    return as_number(config.get("prune.sparsity", "")) == 0 and not is_narrow(config)


def _bears(key: str, metric: str) -> bool:
    note = _note(key)
    return metric.startswith(note.on) and (is_timing(metric) or not note.only_timing)


def _note(key: str) -> Bearing:
    """What stands beside the parameter's definition; facts about the machine matter to timings alone."""
    return TIMING if key.startswith("versions.") else bearing(key)


def as_number(text: str) -> float | str:
    """A number as a number, so that 0.90 and 0.9 are one value; anything else as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def identity(config: Mapping[str, str]) -> str:
    """One text for all that are equal, 0.90 and 0.9 as one value."""
    return repr([(key, as_number(value)) for key, value in config.items()])


def timed_with(row: Row, metric: str) -> dict[str, str]:
    """What its timings were taken with; nothing where the metric is no timing."""
    return {key: value for key, value in row.keys.items() if is_timing(metric) and _note(key).timed_with}


def timed_alike(row: Row, other: Row, metric: str) -> bool:
    """Whether two rows' figures can be compared as timings; yes where the metric is none."""
    return identity(timed_with(row, metric)) == identity(timed_with(other, metric))


def differing_keys(rows: list[Row]) -> list[str]:
    """Names of the parameters that are not the same in all of `rows`."""
    keys = dict.fromkeys(key for row in rows for key in row.keys)
    return [key for key in keys if len({as_number(row.keys.get(key, "")) for row in rows}) > 1]
