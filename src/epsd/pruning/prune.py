"""Early pruning: score → schedule → mask, on a copy of the model."""

import contextlib
import copy
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from epsd.compute import distributed, networks
from epsd.compute.random_state import keeping_random_state
from epsd.data.balance import weighed
from epsd.data.loaders import Source, as_batches
from epsd.losses import PlainLoss, as_objective, cross_entropy
from epsd.masks import ALSO, Mask, MaskError, Scope, check_fits, covered, fitting, hidden, prunable
from epsd.project.progress import Progress
from epsd.pruning.blind_spots import BlindSpots, blind_spots, uncovered
from epsd.pruning.channels import Structure
from epsd.pruning.look_ahead import LookAhead, planned
from epsd.pruning.metagradients import gradient_norms
from epsd.pruning.scoring import Following, MetaGradientError, means, normalised, scoring, within
from epsd.types import Batch, Batches, BatchNeeds, EpsdError, Objective, Score, Scores

LossLike = Objective | Callable[[Tensor, Tensor], Tensor]
Average = Literal["absolute", "signed"]
Names = str | Iterable[str]


class PruneError(EpsdError):
    """A model, score or setting that cannot be pruned, or pruned with, as it is."""


class Stream(Iterator[Batch]):
    """Batches for scoring, one after the other; with `restart`, from the beginning again when used up.

    `passes` : how often the data was begun.  `images` : the first four (B, C, H, W) of the last batch, None before it.
    """

    def __init__(self, source: Source, needs: BatchNeeds = BatchNeeds(), restart: bool = True, seed: int = 0) -> None:
        given = as_batches(source, seed=seed) if isinstance(source, DataLoader) else source
        self._epoch: Callable[[int], Iterator[Batch]]
        if isinstance(given, Batches):
            self._epoch = partial(given.epoch, needs=needs)
        else:
            drawn, first = iter(given), list[Batch]()
            self._epoch = lambda number: iter(first) if number else _noting(drawn, first)
        self._restart = restart
        self._batches = self._epoch(0)
        self.passes = 1
        self.images: Tensor | None = None

    def __next__(self) -> Batch:
        batch = next(self._batches, None)
        if batch is None and self._restart:
            self._batches = self._epoch(self.passes)
            self.passes += 1
            batch = next(self._batches, None)
        if batch is None:
            raise StopIteration
        if not isinstance(batch, Batch):
            raise MetaGradientError(
                f"scoring needs batches of type epsd.Batch, the data gave {type(batch).__name__}. A DataLoader of "
                "(image, label) pairs is turned into such."
            )
        self.images = batch.images[:4].clone()
        return batch


def _noting(batches: Iterator[Batch], seen: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        seen.append(batch)
        yield batch


def _sizes(source: Source) -> tuple[int, int]:
    """(images, classes) where the source says so; 0 where it does not: an objective needs them only to train."""
    return getattr(source, "size", 0), getattr(source, "num_classes", 0)


def prune(
    model: nn.Module,
    source: Source,
    *,
    score: Score,
    sparsity: float,
    objective: LossLike = cross_entropy,
    scope: Scope = "global",
    densities: Mapping[str, float] | None = None,
    channel_cap: float | None = None,
    rounds: int = 1,
    batches: int = 1,
    average: Average = "absolute",
    keep_at_least_one: bool = False,
    include: Names | None = None,
    exclude: Names = (),
    restart: bool = True,
    seed: int = 0,
    on_scores: Callable[[Scores], object] | None = None,
) -> Mask:
    """The mask that keeps the highest-scoring weights of `model`, which is left as it is in every respect.

    After `parallel.start` in each of several processes they share every scoring batch, and all of them get the mask
    that one process would find (its weights may differ in rank where rounding does).

    Parameters
    ----------
    model : its weights are the ones that will be trained; on any device.
    source : prepared batches, a `DataLoader` of (image, label) pairs, or any iterable of `Batch`.
    score : which weights matter, e.g. `Epsd(steps=3)`.
    sparsity : share of prunable weights removed, [0, 1); exactly round(sparsity · N) are. Weights on which the output
        does not depend are not of the N: a warning names them, and what else the score cannot see (`blind_spots`).
    objective : what the score differentiates: a self-distillation method, or a plain `loss(logits, labels)`.
    scope, densities, channel_cap : where scores compete, for how many places, and what of them counts: see
        `Mask.from_scores`.
    rounds : mask and score again this often, the density after round k being (1 − sparsity)^(k/rounds); a later round
        scores the pruned net, at the cost of the first. Default 1; SynFlow: 100.
    batches : score this often in each round, on new batches, and take the mean. Default 1.
    average : mean of the scores ("absolute", default), each normalised, or score of the mean gradient ("signed"), in
        which what changes its sign from batch to batch cancels. GraSP, whose sign counts, is averaged with it.
    keep_at_least_one : no layer loses its last weight. Otherwise a layer that does is named in a warning.
    include, exclude : the layers that the mask covers and that it leaves whole, see `masks.covered` ("fc",
        "*.downsample.*"). The scores of the others are what they are without. `include` may name parameters of other
        layers, too ("lstm"): of a layer its matrices. A score of one's own covers all that it scores.
    restart : begin the data again when a score needs more batches than there are.
    seed : of order and augmentation where `batches` is a DataLoader.
    on_scores : is given the scores that the last round ranked.

    Raises
    ------
    MaskError : nothing to prune, scores that are not finite or all zero, a layer whose initial weights are all zero,
        fewer weights left than layers; a name in `include` or `exclude` that fits no layer.
    MetaGradientError : too few batches, or a loss that is not differentiable as often as the score needs.
    PruneError : `rounds` or `batches` below 1; an unknown `average`; a model that cannot be pruned as it is
        (DataParallel, TorchScript, no copy of it); something else than a score or an objective.
    ParallelError : a batch that several processes cannot split evenly.
    """
    if rounds < 1:
        raise PruneError(f"rounds: {rounds} is below 1.")
    objective = _own(model, score, objective, source)
    selection: dict[str, Any] = {"scope": scope, "densities": densities, "channel_cap": channel_cap}
    selection["keep_at_least_one"] = keep_at_least_one
    work = _copied(model)
    wanted = _wanted(work, include, exclude)
    check_fits(wanted, sparsity, **selection)
    repeated = _Repeated(score, batches, average)
    drawn = Stream(source, objective.needs, restart, seed)
    mask: Mask | None = None
    with Progress("prune", rounds) if rounds > 1 else contextlib.nullcontext() as bar:
        for done in range(1, rounds + 1):
            scores = repeated(work, drawn, objective, _sizes(source))
            if mask is None:
                first = _only(_widened(work, wanted, scores, include, exclude), scores)
                first = _seen(work, first, drawn, score) if sparsity else first
            mask = Mask.from_scores(_only(first, scores), sparsity, **selection, within=mask, progress=done / rounds)
            mask.apply_(work)
            if bar is not None:
                bar.step()
    assert mask is not None
    if on_scores is not None:
        on_scores(_only(first, scores))
    _warn_of_dead_layers(mask, first)
    return mask


def _wanted(model: nn.Module, include: Names | None, exclude: Names) -> dict[str, nn.Parameter]:
    """The weights to cover. Of other layers than those that are prunable, `model` is told which are wanted as well."""
    weights = prunable(model)
    for pattern in _each(include or ()):
        others = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in weights}
        if not fitting(weights, pattern) and (found := fitting(others, pattern)):
            _cover(model, [name for name in found if name == pattern or others[name].dim() > 1])
            weights = prunable(model)
    return covered(weights, include, _meant(model, exclude))


def _widened(
    model: nn.Module, wanted: dict[str, nn.Parameter], scores: Scores, include: Names | None, exclude: Names
) -> dict[str, nn.Parameter]:
    """Where nobody said what to cover, also parameters of other layers that a score of one's own has scored.

    Raises MaskError: a score of something that is no trainable parameter.
    """
    if include is not None or not (more := [name for name in scores if name not in prunable(model)]):
        return wanted
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if unknown := [name for name in more if name not in trainable]:
        raise MaskError(f"the score gives '{unknown[0]}', which is no trainable parameter of the model.")
    _cover(model, more)
    return covered(prunable(model), exclude=_meant(model, exclude))


def _each(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _meant(model: nn.Module, exclude: Names) -> list[str]:
    """The patterns but for those that name parameters of other layers alone: a score of one's own may score them."""
    weights, all_names = prunable(model), [name for name, _ in model.named_parameters()]
    return [name for name in _each(exclude) if fitting(weights, name) or not fitting(all_names, name)]


def _cover(model: nn.Module, names: Iterable[str]) -> None:
    setattr(model, ALSO, getattr(model, ALSO, frozenset()) | frozenset(names))


def _only(names: Iterable[str], scores: Scores) -> Scores:
    return {name: scores[name] for name in names if name in scores}


def scored(
    model: nn.Module,
    source: Source,
    *,
    score: Score,
    objective: LossLike = cross_entropy,
    batches: int = 1,
    average: Average = "absolute",
    include: Names | None = None,
    exclude: Names = (),
) -> Scores:
    """The scores that `prune` ranks in its first round, by parameter name; `Mask.from_scores` makes a mask of them at
    any sparsity.

    `model` and `objective` are left as they are. Parameters as of `prune`. Raises MetaGradientError, MaskError and
    PruneError as `prune` does.
    """
    objective = _own(model, score, objective, source)
    work, drawn = _copied(model), Stream(source, objective.needs)
    wanted = _wanted(work, include, exclude)
    scores = _Repeated(score, batches, average)(work, drawn, objective, _sizes(source))
    return _seen(work, _only(_widened(work, wanted, scores, include, exclude), scores), drawn, score)


def gates(
    model: nn.Module,
    source: Source,
    structure: Structure,
    *,
    score: Score,
    objective: LossLike = cross_entropy,
    batches: int = 1,
    average: Average = "absolute",
) -> Scores:
    """|∂L/∂g| of every channel, (size,) by group of `structure`: what `widths.chosen` ranks. `model` is left as it is.

    batches, average : as of `prune`. Raises PruneError: a score that is no derivative with respect to a mask, and what
    `prune` raises.
    """
    if not getattr(score, "derivative", False):
        raise PruneError("prune.score: channels are scored by their gates, which epsd, prospr and snip differentiate.")
    objective = _own(model, score, objective, source)
    work, drawn = _copied(model), Stream(source, objective.needs)
    total = {name: torch.zeros(group.size, dtype=torch.float64) for name, group in structure.groups.items()}
    with within(replace(means(), signed=True)):
        for _ in range(batches):
            objective.begin("score", *_sizes(source))
            for name, gate in structure.gates(score(work, drawn, objective)).items():
                total[name] += gate.abs() if average == "absolute" else gate
    distributed.same_everywhere(total.values())
    return {name: gate.abs() / batches for name, gate in total.items()}


class _Repeated:
    """A score on several draws of batches, the same in all processes."""

    def __init__(self, score: Score, batches: int, average: Average) -> None:
        if batches < 1:
            raise PruneError(f"batches: {batches} is below 1.")
        if average not in get_args(Average):
            raise PruneError(f"average: unknown '{average}'. Valid: {', '.join(get_args(Average))}.")
        self._score = score
        self._times = batches if getattr(score, "follows_data", True) else 1
        self._signed = average == "signed" and self._times > 1 and not getattr(score, "signed", False)

    def __call__(self, model: nn.Module, drawn: Stream, objective: Objective, sizes: tuple[int, int]) -> Scores:
        total: Scores = {}
        with within(replace(means(), signed=self._signed)):
            for _ in range(self._times):
                objective.begin("score", *sizes)
                for name, found in self._score(model, drawn, objective).items():
                    total[name] = total[name] + found if name in total else found
        if self._times > 1:
            total = {name: found / self._times for name, found in total.items()}
        scores = normalised(total) if self._signed else total
        distributed.same_everywhere(scores.values())
        return scores


def _own(model: nn.Module, score: object, objective: LossLike, source: Source) -> Objective:
    known = as_batches(source) if isinstance(source, DataLoader) else source
    return weighed(copy.deepcopy(as_objective(_checked(model, score, objective))), known)


def _checked(model: nn.Module, score: object, objective: LossLike) -> LossLike:
    """`objective`; what cannot be scored, and what cannot score, is named first."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise PruneError(f"the model is wrapped in {type(model).__name__}: prune what is inside, model.module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise PruneError(
            "the model is a TorchScript module, which has no layers to look at: prune it before scripting."
        )
    networks.check(model)
    if isinstance(score, type):
        raise PruneError(f"score: got the class {score.__name__}: make one, {score.__name__}().")
    if not callable(score):
        raise PruneError(f"score: expected a score such as Epsd(steps=3), got {score!r}.")
    if layers := hidden(model):
        warnings.warn(
            f"not pruned, as their weights are computed from other parameters (weight_norm, spectral_norm, ...): "
            f"{', '.join(layers)}.",
            stacklevel=4,
        )
    return objective


def _seen(model: nn.Module, scores: Scores, drawn: Stream, score: Score) -> Scores:
    """`scores` of the weights that the output depends on. What else a score cannot see is named (`blind_spots`).

    Raises MaskError: a layer that starts at zero, which every score that multiplies by the initial weights would take.
    """
    spots = _spots(model, drawn)
    seen = {name: given for name, given in scores.items() if name not in spots.unused}
    weights = prunable(model)
    for name, given in seen.items():
        if not given.any() and not weights[name].any():
            raise MaskError(
                f"every weight of '{name}' is zero, so that no score can rank them and all would be removed. "
                f"Initialise the layer, or leave it out: exclude '{name}'."
            )
    ahead = isinstance(score, LookAhead) and bool(spots.zeros)  # a few steps ahead a little of them is seen
    silent = [name for name in spots.silent if name in seen and (ahead or not seen[name].any())]
    unused = [name for name in scores if name not in seen]
    for told in (*BlindSpots(unused, silent, spots.zeros).told(), *uncovered(model)):
        warnings.warn(told, stacklevel=3)
    return seen


def _spots(model: nn.Module, drawn: Stream) -> BlindSpots:
    """By the images that the score drew last, or else by the first ones. Without any there is nothing to try."""
    if drawn.images is None:
        next(drawn, None)
    if drawn.images is None:
        return BlindSpots([], [], [])
    return blind_spots(model, drawn.images.to(next(model.parameters()).device))


def _copied(model: nn.Module) -> nn.Module:
    """A copy to work on, the main process's weights in all of them."""
    try:
        work = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        kept = [
            f"{name}.{key}".strip(".")
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        told = f"it keeps {', '.join(kept)}, computed from other tensors: set that to None" if kept else str(error)
        raise PruneError(f"the model cannot be copied: {told}.") from None
    distributed.same_everywhere(work.state_dict().values())
    return work


def selected(scores: Scores, *, sparsity: float, **selection: Any) -> Mask:
    """The mask that `prune` would give with `rounds=1` on these scores, without scoring again.

    `selection`: `scope`, `densities`, `channel_cap`, `keep_at_least_one`. Raises MaskError.
    """
    mask = Mask.from_scores(scores, sparsity, **selection)
    _warn_of_dead_layers(mask, scores)
    return mask


def _warn_of_dead_layers(mask: Mask, scores: Scores) -> None:
    """Those that the sparsity is to blame for: of a layer without any score was told before."""
    if dead := [name for name in mask.dead_layers() if scores[name].any()]:
        warnings.warn(
            f"no weight survives in {', '.join(dead)}: nothing flows through there. "
            "Lower prune.sparsity, or set prune.keep_at_least_one.",
            stacklevel=3,
        )


def controlled(mask: Mask, control: Literal["none", "shuffled", "reinitialised"], seed: int) -> Mask:
    """The mask that a control trains: shuffled inside each layer, or as it is (the others change no mask)."""
    return mask.shuffled(seed) if control == "shuffled" else mask


def rescale_(model: nn.Module, mask: Mask) -> None:
    """Scale the weights that each layer keeps, in place, to the mean square that all of them had.

    A score of a loss, |w · g|, keeps large weights: at a density of 2 % their mean square is four times the layer's. In
    front of BatchNorm no output changes with it, but a step of SGD turns the weights by η / ‖w‖² (van Laarhoven 2017,
    arXiv:1706.05350), so that such a layer begins to learn that much more slowly.
    """
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, keep in mask.keep.items():
            kept = weights[name][keep]
            if kept.any():
                weights[name][keep] = kept * (weights[name].square().mean() / kept.square().mean()).sqrt()


def signal(model: nn.Module, batches: Source, score: Score, objective: Objective) -> dict[str, float]:
    """How live the self-distillation term is while scoring: ‖g_KL‖/‖g_CE‖ at θ₀ and at θ_i, where the outer loss
    stands.

    Empty for a score that does not look ahead along the objective, for an objective that distils nothing, and for one
    without a label loss to compare with (PS-KD with alpha 1).
    """
    if not isinstance(score, LookAhead) or not follows_objective(score):
        return {}
    objective = copy.deepcopy(objective)
    objective.begin("score", *_sizes(batches))
    device = next(model.parameters()).device
    loss = Following(objective)
    drawn = score.drawn(Stream(batches, objective.needs), "the signal report", device)
    with scoring(model):
        with keeping_random_state(device):
            together = planned(model, loss, drawn[0], score).micro_batch
        norms = gradient_norms(model, loss, drawn, lr=score.lr, momentum=score.momentum, micro_batch=together)
    if "distillation" not in norms[-1] or not all(norm["supervised"] for norm in norms):
        return {}
    ratios = [norm["distillation"] / norm["supervised"] for norm in norms]
    return {"distillation_signal_start": ratios[0], "distillation_signal": ratios[-1]}


def overlap_with_cross_entropy(
    mask: Mask, model: nn.Module, source: Source, *, score: Score, objective: Objective, **selection: Any
) -> float:
    """Jaccard overlap of `mask` with the mask of the same score, on the same images, under cross entropy.

    1 without scoring again where the score does not look at the objective.
    """
    if not follows_objective(score):
        return 1.0
    plain = PlainLoss(cross_entropy, objective.needs)
    return mask.jaccard(prune(model, source, score=score, objective=plain, **selection))


def follows_objective(score: Score) -> bool:
    """Whether the run's objective enters `score`. One that does not say so (`follows_objective`) is taken to do."""
    return bool(getattr(score, "follows_objective", True))


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
