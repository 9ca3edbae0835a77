"""Class weights by how rare the classes are."""

import copy

import torch

from epsd.types import EpsdError, Objective


def weighed(objective: Objective, source: object) -> Objective:
    """`objective`, its `class_weights` in numbers where they are "auto": N / (K · N_k), whose mean over images is 1.

    source : batches; N_k is how often class k is among their `labels`, K the number of classes that are there; one that
        is not has the weight 1. Raises EpsdError: no `labels`, or another number of weights than of classes.
    """
    wanted = getattr(objective, "class_weights", None)
    classes = getattr(source, "num_classes", 0)
    if isinstance(wanted, list) and classes and len(wanted) != classes:
        raise EpsdError(f"objective.class_weights: {len(wanted)} weights for {classes} classes.")
    if wanted != "auto":
        return objective
    labels = getattr(source, "labels", None)
    if labels is None:
        raise EpsdError("objective.class_weights: auto counts labels, which these batches do not have: give numbers.")
    counts = torch.bincount(labels.cpu(), minlength=classes).double()
    there = counts > 0
    weights = torch.where(there, len(labels) / (there.sum() * counts.clamp(min=1)), 1.0)
    known = copy.copy(objective)
    known.class_weights = weights.tolist()  # type: ignore[attr-defined]
    return known
