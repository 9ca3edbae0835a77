"""What a trained network costs to keep and to run, as the stage `evaluate` and a study's cells report it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from epsd.evaluation import compact_file
from epsd.evaluation import evaluate as evaluation
from epsd.masks import prunable
from epsd.project.params import EvaluateParams


def measured(
    model: nn.Module, card: Mapping[str, Any], settings: EvaluateParams, *, dense: Path, compact: Path
) -> dict[str, float]:
    """Parameters, FLOPs, bytes on disk, and milliseconds of a forward pass, of the network and of its filled-up twin.

    `card` describes the network (`image_shape`: channels, height, width in pixels). `dense` is the file that holds all
    its weights; `compact`, with the nonzero ones, is written here.
    """
    shape, weights = tuple(card["image_shape"]), prunable(model)
    written = compact_file.save(model.state_dict(), compact, card)
    twins = {"latency_dense_ms": evaluation.filled(model, weights), "latency_pruned_ms": model}
    timing = {"batch_size": settings.latency_batch_size, "repeats": settings.latency_repeats}
    return {
        **evaluation.cost(model, weights, shape),
        "bytes_dense": dense.stat().st_size,
        "bytes_sparse": written.file,
        **evaluation.latency(twins, shape, **timing),
    }
