"""Early pruning: score → schedule → mask, on a copy of the model."""

import copy
import itertools
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from epsd import parallel
from epsd.loaders import as_batches
from epsd.lookahead import LookAhead
from epsd.losses import PlainLoss, as_objective, cross_entropy
from epsd.masks import Mask, Scope, prunable
from epsd.metagradients import Following, draw, gradient_norms, scoring
from epsd.types import Batch, Batches, BatchNeeds, Objective, Score, Scores

Source = Batches | Iterable[Batch] | DataLoader[Any]
LossLike = Objective | Callable[[Tensor, Tensor], Tensor]


def _endless(batches: Batches, needs: BatchNeeds) -> Iterator[Batch]:
    for number in itertools.count():
        yield from batches.epoch(number, needs)


def stream(source: Source, needs: BatchNeeds = BatchNeeds(), restart: bool = True) -> Iterator[Batch]:
    """Batches of `source` for scoring, one after the other; with `restart`, from the beginning again when used up."""
    if isinstance(source, DataLoader):
        source = as_batches(source)
    if isinstance(source, Batches):
        return _endless(source, needs) if restart else source.epoch(0, needs)
    return itertools.cycle(source) if restart else iter(source)


def _sizes(source: Source) -> tuple[int, int]:
    """(images, classes) where the source says so; 0 where it does not: an objective needs them only to train."""
    return getattr(source, "size", 0), getattr(source, "num_classes", 0)


def prune(
    model: nn.Module,
    batches: Source,
    *,
    score: Score,
    sparsity: float,
    objective: LossLike = cross_entropy,
    scope: Scope = "global",
    rounds: int = 1,
    keep_at_least_one: bool = False,
    restart: bool = True,
) -> Mask:
    """The mask that keeps the highest-scoring weights of `model`, which is left as it is in every respect.

    After `parallel.start` in each of several processes they share every scoring batch, and all of them get the mask
    that one process would find (its weights may differ in rank where rounding does).

    Parameters
    ----------
    model : its weights are the ones that will be trained; on any device.
    batches : prepared batches, a `DataLoader` of (image, label) pairs, or any iterable of `Batch`.
    score : which weights matter, e.g. `Epsd(steps=3)`.
    sparsity : share of prunable weights removed, [0, 1); exactly round(sparsity · N) are.
    objective : what the score differentiates: a self-distillation method, or a plain `loss(logits, labels)`.
    scope : scores compete in the whole net ("global") or within each layer ("layer").
    rounds : mask and score again this often, the density after round k being (1 − sparsity)^(k/rounds). Default 1;
        SynFlow: 100.
    keep_at_least_one : no layer loses its last weight. Otherwise a layer that does is named in a warning.
    restart : begin the data again when a score needs more batches than there are.

    Raises
    ------
    MaskError : nothing to prune, scores that are not finite or all zero, fewer weights left than layers.
    MetaGradientError : too few batches (without `restart`), or a loss that is not differentiable as often as the
        score needs.
    ParallelError : a batch that several processes cannot split evenly.
    """
    objective = copy.deepcopy(as_objective(objective))
    work = _copied(model)
    Mask.from_scores({name: torch.arange(p.numel()) for name, p in prunable(work).items()}, sparsity, scope)
    drawn = stream(batches, objective.needs, restart)
    mask: Mask | None = None
    for done in range(1, rounds + 1):
        objective.begin("score", *_sizes(batches))
        density = (1 - sparsity) ** (done / rounds)
        target = sparsity if done == rounds else 1 - density
        scores = score(work, drawn, objective)
        parallel.same_everywhere(scores.values())
        mask = Mask.from_scores(scores, target, scope, keep_at_least_one=keep_at_least_one, within=mask)
        mask.apply_(work)
    assert mask is not None
    _warn_of_dead_layers(mask)
    return mask


def scored(model: nn.Module, batches: Source, *, score: Score, objective: LossLike = cross_entropy) -> Scores:
    """The scores that `prune` ranks in its first round; `selected` makes a mask of them at any sparsity.

    `model` and `objective` are left as they are. Raises MetaGradientError as `prune` does.
    """
    objective = copy.deepcopy(as_objective(objective))
    objective.begin("score", *_sizes(batches))
    scores = score(_copied(model), stream(batches, objective.needs), objective)
    parallel.same_everywhere(scores.values())
    return scores


def _copied(model: nn.Module) -> nn.Module:
    """A copy to work on, the main process's weights in all of them."""
    work = copy.deepcopy(model)
    parallel.same_everywhere(work.state_dict().values())
    return work


def selected(scores: Scores, *, sparsity: float, scope: Scope = "global", keep_at_least_one: bool = False) -> Mask:
    """The mask that `prune` would give with `rounds=1` on these scores, without scoring again. Raises MaskError."""
    mask = Mask.from_scores(scores, sparsity, scope, keep_at_least_one=keep_at_least_one)
    _warn_of_dead_layers(mask)
    return mask


def _warn_of_dead_layers(mask: Mask) -> None:
    if dead := mask.dead_layers():
        warnings.warn(
            f"no weight survives in {', '.join(dead)}: nothing flows through there. "
            "Lower prune.sparsity, or set prune.keep_at_least_one.",
            stacklevel=3,
        )


def controlled(mask: Mask, control: Literal["none", "shuffled", "reinitialised"], seed: int) -> Mask:
    """The mask that a control trains: shuffled inside each layer, or as it is (the others change no mask)."""
    return mask.shuffled(seed) if control == "shuffled" else mask


def signal(model: nn.Module, batches: Source, score: Score, objective: Objective) -> dict[str, float]:
    """How live the self-distillation term is while scoring: ‖g_KL‖/‖g_CE‖ at θ₀ and at θ_i, where the outer loss
    stands.

    Empty for a score that does not look ahead and for an objective that distils nothing.
    """
    if not isinstance(score, LookAhead):
        return {}
    objective = copy.deepcopy(objective)
    objective.begin("score", *_sizes(batches))
    device = next(model.parameters()).device
    drawn = draw(stream(batches, objective.needs), score.steps + 1, "the signal report", device)
    with scoring(model):
        norms = gradient_norms(model, Following(objective), drawn, lr=score.lr, momentum=score.momentum)
    if "distillation" not in norms[-1]:
        return {}
    ratios = [norm["distillation"] / norm["supervised"] if norm["supervised"] else 0.0 for norm in norms]
    return {"distillation_signal_start": ratios[0], "distillation_signal": ratios[-1]}


def overlap_with_cross_entropy(
    mask: Mask, model: nn.Module, batches: Source, *, score: Score, objective: Objective, **selection: Any
) -> float:
    """Jaccard overlap of `mask` with the mask of the same score, on the same images, under cross entropy."""
    plain = PlainLoss(cross_entropy, objective.needs)
    return mask.jaccard(prune(model, batches, score=score, objective=plain, **selection))


class Stopwatch:
    """Seconds and peak memory (MiB: of the process, or of the GPU where there is one) of a `with` block."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> "Stopwatch":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds = time.perf_counter() - self._start

    @property
    def peak_memory(self) -> float:
        """MiB, the highest since the process began (CPU) or since the block began (GPU)."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
