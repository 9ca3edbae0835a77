"""Looking ahead: the score of EPSD and of ProsPr, computed within the memory there is."""

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import nn

from epsd.compute import distributed
from epsd.compute.memory import GIB, Saved, free_bytes, lines, share
from epsd.compute.random_state import keeping_random_state
from epsd.compute.second_order import weights_laid_out
from epsd.losses import PlainLoss
from epsd.masks import prunable
from epsd.project.runtime import note
from epsd.project.settings import Count, Natural, Positive, Share
from epsd.pruning.metagradients import Reading, mask_gradient
from epsd.pruning.scoring import Following, LossFunction, MetaGradientError, calling, draw, means, normalised, scoring
from epsd.pruning.unroll import batch_laid_out, gradient_of
from epsd.registry import variant
from epsd.types import Batch, Scores


@variant
class LookAhead:
    """Settings of a score that looks i SGD steps ahead.

    steps : i ≥ 0. Default 3 (ProsPr's command line); 0 with cross entropy is SNIP.
    lr : η > 0 of those steps. Default 0.1 (ProsPr's command line; its README example uses 0.5).
    momentum : [0, 1). Default 0 (ProsPr's command line; its README example uses 0.9).
    reading : "full" (default, as ProsPr's), "first_order", "local": see `mask_gradient`.
    new_batch_per_step : a fresh batch for each step and for the outer loss. Default true (ProsPr's package default;
        its command line uses one batch throughout).
    detach_first_step : with momentum, treat the first buffer as a constant, as the official code does by detaching
        it. Default false: the exact derivative.
    micro_batch : images evaluated at once (in all processes together), null = the whole batch, or what of it fits where
        nothing changes by that. See `Unroll` for when that is exact.
    graphs_kept : steps whose graph is kept rather than evaluated again: faster, more memory, the same scores. Default
        "auto": as many as `prune.memory` has room for.
    """

    steps: Natural = 3
    lr: Positive = 0.1
    momentum: Share = 0.0
    reading: Reading = "full"
    new_batch_per_step: bool = True
    detach_first_step: bool = False
    micro_batch: Count | None = None
    graphs_kept: Natural | Literal["auto"] = "auto"

    derivative: ClassVar[bool] = True

    def drawn(self, batches: Iterable[Batch], who: str, device: torch.device) -> list[Batch]:
        """The batches of all steps and of the outer loss, on `device`. Raises MetaGradientError as `draw` does."""
        count = self.steps + 1
        return draw(batches, count, who, device) if self.new_batch_per_step else draw(batches, 1, who, device) * count


class Need(NamedTuple):
    """Bytes that the steps of a look-ahead take, linear in the images, measured on a few of them.

    fixed, per_image : of one step's twice differentiable graph.  plain : of one step's ordinary graph, per image.
    parameters : of one copy of the trainable parameters.  steps : i.
    """

    fixed: float
    per_image: float
    plain: float
    parameters: float
    steps: int

    def bytes(self, kept: int, images: int, at_once: int) -> float:
        """At the peak: all kept graphs beside the outer gradient, or later one graph that is made again."""
        graph = self.fixed + self.per_image * images
        together = kept * graph + self.fixed + _WORKING * self.plain * at_once
        again = self.fixed + _WORKING * self.per_image * at_once if kept < self.steps else 0.0
        return (self.steps + _COPIES) * self.parameters + max(together, again)


_COPIES = 7
"""Copies of the parameters beside the weights of every step: gradient, update, adjoint, velocity, product, layouts."""
_WORKING = 1.45
"""What is alive at the peak of a backward pass, as a multiple of what was saved for it. Both constants were fitted to
the peaks of ResNet-18 and VGG-19, which they meet to 6 % (benchmarks/results/scoring-cpu.md)."""


def measured(model: nn.Module, loss: LossFunction, batch: Batch, steps: int) -> Need:
    """From the loss of a few images of `batch`, see `memory.lines`."""
    plain, graph = lines(lambda part: _saved(model, loss, part), batch)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return Need(graph.fixed, graph.each, plain.each, parameters, steps)


def _saved(model: nn.Module, loss: LossFunction, batch: Batch) -> tuple[int, int]:
    """Bytes for an ordinary and for a twice differentiable graph, of the second evaluation: objectives may remember the
    first. What hangs on the model's output (a count of passes, say) does not see either."""
    loss, batch, model = copy.copy(loss), batch_laid_out(batch, model), copy.copy(model)
    model._forward_hooks = OrderedDict()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    leaves = {n: w.requires_grad_() for n, w in weights_laid_out(model).items() if n in trained}
    forward = calling(model, leaves, counted=True)
    with torch.no_grad():
        loss(forward, batch)
    with Saved([*leaves.values(), batch.images]) as saved:
        total = loss(forward, batch).total
        plain = saved.bytes
        gradient = gradient_of(total, leaves, create_graph=True)
    del gradient
    return plain, saved.bytes


class Plan(NamedTuple):
    """How the steps of a look-ahead are evaluated within the memory there is."""

    graphs_kept: int
    micro_batch: int | None


def planned(model: nn.Module, loss: LossFunction, batch: Batch, settings: LookAhead) -> Plan:
    """As many graphs kept as `Means.memory` has room for; fewer images at once only where that is exact.

    Several processes decide alike, by the one that has least.

    Raises MetaGradientError where one step's graph does not fit, naming the batch that would.
    """
    if settings.reading != "full" or settings.steps == 0:
        return Plan(0, settings.micro_batch)
    if settings.graphs_kept != "auto":
        return Plan(settings.graphs_kept, settings.micro_batch)
    device, processes = batch.images.device, distributed.world()
    images = len(batch.labels) // processes
    budget = distributed.least(_budget(device))
    need = measured(model, loss, batch, settings.steps)
    at_once = min((settings.micro_batch or images * processes) // processes, images)
    if need.bytes(0, images, at_once) > budget:
        at_once = _fewer_at_once(_what_parts_change(model, loss, batch), need, images, at_once, budget)
    kept = max(k for k in range(settings.steps + 1) if k == 0 or need.bytes(k, images, at_once) <= budget)
    return Plan(kept, None if at_once == images else at_once * processes)


def _budget(device: torch.device) -> float:
    """Bytes that scoring may take in this process."""
    allowed = means().memory
    if allowed is not None:
        return allowed
    mine = share(free_bytes(device), device)
    return mine if device.type == "cuda" else 0.8 * mine  # the rest is for freed memory that is kept


def _fewer_at_once(changed: str, need: Need, images: int, at_once: int, budget: float) -> int:
    """`changed`: what would come out otherwise where fewer images are taken, "" where nothing would."""
    fits = next((count for count in range(at_once, 0, -1) if need.bytes(0, images, count) <= budget), 0)
    lacking = (
        f"scoring {at_once} images at once needs about {need.bytes(0, images, at_once) / GIB:.2f} GiB of memory, "
        f"prune.memory allows {budget / GIB:.2f}"
    )
    if not fits:
        least = need.bytes(0, images, 1) / GIB
        raise MetaGradientError(f"{lacking}, and one image needs {least:.2f}. Raise prune.memory, or lower steps.")
    if not changed:
        if distributed.is_main():
            note(f"{lacking}: {fits} are taken at once, with the same scores.")
        return fits
    together = fits * distributed.world()
    raise MetaGradientError(
        f"{lacking}. Set prune.batch_size: {together}; or prune.score.micro_batch: {together}, with which {changed}; "
        "or raise prune.memory."
    )


def _what_parts_change(model: nn.Module, loss: LossFunction, batch: Batch) -> str:
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules()):
        return "BatchNorm normalises each part by itself"
    if isinstance(loss, Following) and isinstance(loss.objective, PlainLoss):
        with torch.no_grad():
            shape = calling(model, {})(batch.images[:1]).shape[1:]
        if not loss.objective.averages(batch.labels, shape):
            return "the loss, which is no mean over the batch, is that of each part"
    return ""


def look_ahead_scores(
    model: nn.Module,
    loss: LossFunction,
    batches: Iterable[Batch],
    settings: LookAhead,
    who: str,
) -> Scores:
    """The score of EPSD and of ProsPr: normalised |∂L(θ_i)/∂m| of every prunable weight of `model`.

    Draws i + 1 batches (one, used throughout, with `new_batch_per_step` off).
    """
    names = list(prunable(model))
    if not names:
        return {}
    device = next(model.parameters()).device
    drawn = settings.drawn(batches, f"score {who} with steps={settings.steps}", device)
    with scoring(model):
        with keeping_random_state(device):
            plan = planned(model, loss, drawn[0], settings)
        result = mask_gradient(
            model,
            loss,
            drawn,
            names,
            lr=settings.lr,
            momentum=settings.momentum,
            reading=settings.reading,
            detach_first_step=settings.detach_first_step,
            micro_batch=plan.micro_batch,
            graphs_kept=plan.graphs_kept,
        )
    return normalised(result.gradient)
