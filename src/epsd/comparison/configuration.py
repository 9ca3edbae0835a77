"""Which parameters of a run can bear on which metric."""

from collections.abc import Mapping

from epsd.comparison.metrics import is_timing
from epsd.comparison.types import Entry, Row

WITHOUT_EFFECT = ("tracking.", "tune.", "dataset.download")
"""Parameters that change no result."""

ONLY_TIMING = (
    "device", "threads", "versions.", "data.workers", "prune.compare", "prune.score.graphs_kept", "evaluate.batch_size",
    "evaluate.latency_", "train.memory_format", "train.update", "train.compile",
)  # fmt: skip
"""Parameters, and facts about the machine, that change nothing but how long it takes (and the last bits)."""

MACHINE = ("threads", "versions.cpu", "versions.gpu")
"""Tags of a run that say what it was timed on."""

TIMED_WITH = (
    "device", "threads", "versions.", "data.workers", "evaluate.batch_size", "evaluate.latency_", "train.memory_format",
    "train.update", "train.compile", "train.precision",
)  # fmt: skip
"""What two timings must have in common to be compared at all."""

ONLY_OF = {
    "evaluate.batch_size": ("time/evaluate",),
    "evaluate.latency_": ("model/latency_", "time/evaluate"),
    "evaluate.ece_bins": ("test/ece",),
    "voc.": ("detect/", "time/detect"),
    "detect.": ("detect/", "time/detect"),
}
"""Parameters that matter to metrics that begin like this, and to no other."""

NEUTRAL = {"prune.channel_cap": "null", "prune.batches": "1", "prune.average": "absolute"}
"""Parameters at the value that does what was done before they were there: runs from then are the same configuration."""


def configuration(entry: Entry, metric: str) -> dict[str, str]:
    """Every parameter but the seed that can bear on `metric`."""
    params, dense = {**entry.params, **entry.machine}, as_number(entry.params.get("prune.sparsity", "")) == 0
    return {
        key: value
        for key, value in sorted(params.items())
        if key != "seed" and not key.startswith(WITHOUT_EFFECT) and _bears(key, metric) and NEUTRAL.get(key) != value
        and (is_timing(metric) or not key.startswith(ONLY_TIMING))
        and not (dense and key.startswith("prune.") and key != "prune.sparsity" and "procedure.name" not in params)
        and not (key in ("train.milestones", "train.gamma") and params.get("train.schedule", "step") != "step")
    }  # fmt: skip


def _bears(key: str, metric: str) -> bool:
    return all(metric.startswith(only) for prefix, only in ONLY_OF.items() if key.startswith(prefix))


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
    return {key: value for key, value in row.keys.items() if is_timing(metric) and key.startswith(TIMED_WITH)}


def timed_alike(row: Row, other: Row, metric: str) -> bool:
    """Whether two rows' figures can be compared as timings; yes where the metric is none."""
    return identity(timed_with(row, metric)) == identity(timed_with(other, metric))


def differing_keys(rows: list[Row]) -> list[str]:
    """Names of the parameters that are not the same in all of `rows`."""
    keys = dict.fromkeys(key for row in rows for key in row.keys)
    return [key for key in keys if len({as_number(row.keys.get(key, "")) for row in rows}) > 1]
