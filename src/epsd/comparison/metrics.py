"""What a metric's name says: which way is better, whether it is a timing."""

from typing import Literal

LOWER = {
    "nll", "ece", "brier", "loss", "cross_entropy", "distillation", "seconds", "ms", "image_passes", "images", "gflops",
    "bytes", "parameters", "nonzero", "memory", "dead_layers", "drop",
}  # fmt: skip
"""What a metric's name ends with, or has in it between underscores, where a smaller value is the better one. So it is
with whatever begins with `time/`.
"""

HIGHER = {
    "top1",
    "top5",
    "accuracy",
    "recall",
    "precision",
    "f1",
    "map",
    "map50",
    "map75",
    "compression",
    "agreement",
    "times",
}
"""Likewise for a greater value."""


def better(metric: str) -> Literal["lower", "higher"] | None:
    """Which values are better, by the metric's name; None where nothing is known of it (`train/lr`)."""
    group, _, last = metric.rpartition("/")
    words = {last, *last.split("_"), *({group} & {"recall"})}
    if group == "time" or words & LOWER:
        return "lower"
    return "higher" if words & HIGHER else None


def is_timing(metric: str) -> bool:
    """By the metric's name."""
    group, _, last = metric.rpartition("/")
    return group in ("time", "latency") or any(part in last for part in ("seconds", "latency"))
