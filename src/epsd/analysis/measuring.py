"""One pruning under the magnifying glass: prune, measure, train while watching, measure again. Validation only."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from epsd.analysis import features, landscape
from epsd.analysis.distillation import QUANTITIES, Probe
from epsd.analysis.trainability import gradient_norms
from epsd.compute.seeds import mix
from epsd.data.balance import weighed
from epsd.data.prepared import Prepared
from epsd.data.streaming import Augmentation
from epsd.evaluation import evaluate as evaluation
from epsd.evaluation import metrics
from epsd.masks import Mask
from epsd.objectives import OBJECTIVES
from epsd.pipeline.prune import pruned
from epsd.pipeline.train import batches, trained
from epsd.project.params import Params
from epsd.registry import choose, settings_of
from epsd.scores import SCORES
from epsd.training.record import Record
from epsd.types import Batches

EARLY = 5
"""Epochs after which the training loss says how well the pruned network takes to training (fewer where there are)."""

MEASURES = {
    "trainability/grad_norm": "gradient norm at initialisation, run's objective",
    "trainability/grad_norm_ce": "gradient norm at initialisation, cross entropy",
    "trainability/early_loss": f"training loss after {EARLY} epochs at most (nats)",
    "train/loss": "training loss at the end (nats)",
    "val/top1": "validation top-1 (share right)",
    "calibration/nll": "validation NLL (nats)",
    "calibration/ece": "validation ECE",
    "calibration/brier": "validation Brier score",
    "distillation/kl_same_class": "KL, two images of a class (nats)",
    "distillation/kl_views": "KL, two views of an image (nats)",
    "distillation/kl_epochs": "KL, last two epochs (nats)",
    "mask/jaccard_epsd": "overlap with EPSD's mask (Jaccard)",
    "mask/effective_sparsity": "sparsity, weights on no path removed too",
    "mask/random_erk_effective_sparsity": "the same of random ERK",
    "mask/live_channels": "live channels (share)",
    "mask/gini": "Gini of a layer's weights over channels, mean",
    "mask/random_erk_gini": "the same of random ERK",
    "landscape/rise": "rise of the loss within half a filter norm (nats)",
    "features/separation": "distance between classes / within",
    "time/seconds": "seconds, pruning and training",
}
"""Name of each figure -> what it is. The last network's, or as said."""


class Finding(NamedTuple):
    """What was found out about one method with one seed.

    figures : those of MEASURES that apply.  history : a row per epoch, of training and of `distillation.Probe`.
    layers : of the mask, beside a random one: `epsd.pruning.paths.Examined.rows`.
    logits, labels : of the validation split, (N, K) and (N,).  surface : loss on the slice, (P, P), None where not
        asked for.  features : of validation images, likewise.
    """

    method: str
    seed: int
    mask: Mask
    figures: dict[str, float]
    history: list[Record]
    layers: list[dict[str, Any]]
    logits: Tensor
    labels: Tensor
    surface: Tensor | None
    features: features.Features | None


def with_score(params: Params, name: str) -> Params:
    """`params` with another score and everything else equal: a simple combination.

    Settings that both scores have (EPSD's and ProsPr's steps) keep their value, others are the score's defaults.
    """
    given = params.prune.score
    valid = settings_of(SCORES[name])
    score: dict[str, Any] = {"name": name, **{key: value for key, value in given.items() if key in valid}}
    return params.pruning(score=score, compare=False, control="none")


def examine(params: Params, data: Prepared, *, points: int, slice_seed: int) -> Finding:
    """Prune and train with `params` and measure all the way.

    points : of the loss slice along each direction; 0 leaves slice and features out.  slice_seed : of its directions.
    """
    mask, model, report, examined, *_ = pruned(params, data)
    drawn = batches(params, data, "train")
    objective = weighed(choose(OBJECTIVES, params.objective, "objective"), drawn)
    figures = _named("trainability", gradient_norms(model, mask, drawn, objective))
    history = _watched(params, data, model, mask)
    seconds = report["seconds"] + sum(record["time/epoch"] for record in history)

    validation = batches(params, data, "validation")
    logits, labels = evaluation.predict(model, validation)
    figures |= {
        "trainability/early_loss": history[min(EARLY, len(history)) - 1]["train/loss"],
        "train/loss": history[-1]["train/loss"],
        "val/top1": metrics.topk(logits, labels, 1),
        **_named("calibration", calibration(logits, labels, params.evaluate.ece_bins)),
        **_named("distillation", {key: history[-1][key] for key in QUANTITIES if key in history[-1]}),
        "time/seconds": seconds,
        **_named("mask", {name: value for name, value in report.items() if f"mask/{name}" in MEASURES}),
    }
    seen = surface = None
    if points:
        seen = features.penultimate(model, validation)
        surface = _surface(params, data, model, mask, points, slice_seed)
        figures |= {"landscape/rise": landscape.rise(surface), "features/separation": features.separation(seen)}
    name = params.prune.score["name"]
    layers = examined.rows() if examined else []
    return Finding(name, params.seed, mask, figures, history, layers, logits, labels, surface, seen)


def calibration(logits: Tensor, labels: Tensor, ece_bins: int) -> dict[str, float]:
    """nll, ece and brier."""
    return {
        "nll": metrics.nll(logits, labels),
        "ece": metrics.ece(logits, labels, ece_bins),
        "brier": metrics.brier(logits, labels),
    }


def _named(group: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{group}/{key}": value for key, value in figures.items()}


def _watched(params: Params, data: Prepared, model: nn.Module, mask: Mask) -> list[Record]:
    """Train; the records of the epochs, with what the probe saw after each."""
    history: list[Record] = []
    probe = Probe(batches(params, data, "validation"), _augmented(params, data), device=next(model.parameters()).device)
    trained(params, data, model, mask, on_epoch=lambda record: history.append({**record, **probe(model)}))
    return history


def _augmented(params: Params, data: Prepared) -> Batches:
    """The validation split with the augmentation of training."""
    return data.batches(
        "validation",
        batch_size=params.train.batch_size,
        seed=mix(params.seed, "views"),
        augmentation=Augmentation(params.data.crop_padding, params.data.flip),
    )


def _surface(params: Params, data: Prepared, model: nn.Module, mask: Mask, points: int, slice_seed: int) -> Tensor:
    """On one batch of training images without augmentation, the same for every method."""
    device = next(model.parameters()).device
    seed = mix(slice_seed, "slice")
    images = data.batches("train", batch_size=params.evaluate.batch_size, seed=seed, shuffle=True)
    batch = next(iter(images.epoch(0)))
    return landscape.surface(
        model, mask, batch.images.to(device), batch.labels.to(device), points=points, seed=slice_seed
    )
