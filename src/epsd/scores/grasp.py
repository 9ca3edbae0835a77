"""GraSP: keep gradient flow (Wang et al., ICLR 2020; official code alecwangcq/GraSP)."""

from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from epsd.compute import distributed
from epsd.compute.random_state import random_state, set_random_state
from epsd.compute.second_order import laid_out, weights_laid_out
from epsd.losses import are_classes
from epsd.masks import prunable
from epsd.project.settings import Count, Positive
from epsd.pruning.scoring import LossFunction, MetaGradientError, calling, draw, of_labels, scoring, wide
from epsd.pruning.unroll import contract, gradient_of
from epsd.registry import variant
from epsd.types import Batch, Objective, Scores

Group = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and labels (B,) that are evaluated together."""


@variant
class Grasp:
    """w ⊙ Hg / |Σ|, g and H of the cross entropy with logits divided by a temperature. Higher = keep.

    The official code also re-draws every Linear weight (Xavier) in its private copy, so that it scores weights other
    than those that are trained; here the model's own are scored. To get the official behaviour, score a copy with
    re-drawn weights. It computes −w ⊙ Hg and removes the highest; the sign is turned here, so that higher means keep as
    everywhere.

    temperature : divides the logits. Default 200 (official).
    samples_per_class : take this many images of each class, in the order of the data, and split them in two halves;
        null = whole batches. Default 10 (official for CIFAR-10; CIFAR-100 with VGG 10, Tiny-ImageNet 1 with
        `repeats: 10`). A class with fewer images gives some of them again, augmented anew.
    interleave : deal the classes of the selected images evenly over the two halves. Default true; the official code
        concatenates class by class and cuts in the middle, so that each half holds half of the classes and BatchNorm
        sees class-sorted halves: `false`.
    batches : [1, ...) whole batches where samples_per_class is null. Default 1 (Synaptic-Flow's port).
    repeats : fetch and add up this often ("num_iters"). Default 1.
    mode : "train" (default, official) or "eval" (Synaptic-Flow's port).
    """

    temperature: Positive = 200.0
    samples_per_class: Count | None = 10
    interleave: bool = True
    batches: Count = 1
    repeats: Count = 1
    mode: Literal["train", "eval"] = "train"

    follows_objective: ClassVar[bool] = False
    signed: ClassVar[bool] = True

    def __call__(self, model: nn.Module, batches: Iterable[Batch], objective: Objective) -> Scores:
        """Draws batches until every class has its samples (or `batches` of them), `repeats` times.

        Of the objective a plain loss alone counts (`scoring.of_labels`).
        """
        names = list(prunable(model))
        if not names:
            return {}
        device = next(model.parameters()).device
        source = iter(batches)
        groups = [group for _ in range(self.repeats) for group in self._groups(source, model, device)]
        with scoring(model, self.mode == "train"):
            trained = {name for name, p in model.named_parameters() if p.requires_grad}
            weights = {n: w.requires_grad_() for n, w in weights_laid_out(model).items() if n in trained}
            curvature = self._curvature(self._scaled(of_labels(objective), model, weights), weights, groups, names)
        saliency = {name: wide(weights[name].detach()) * wide(curvature[name]) for name in names}
        return _normalised(saliency)

    def _scaled(self, loss: LossFunction, model: nn.Module, weights: dict[str, Tensor]) -> Callable[[Group], Tensor]:
        """The loss of images and labels with logits divided by the temperature, of this process's slice of them."""
        forward = calling(model, weights)

        def of(group: Group) -> Tensor:
            if len(group[1]) % distributed.world():  # cannot be sliced evenly: all of it in each, to the same end
                with distributed.alone():
                    return of(group)
            images, labels = (part[distributed.share(len(part))] for part in group)
            batch = Batch(images, labels, torch.arange(len(labels)))
            return loss(lambda x: forward(laid_out(x, model)) / self.temperature, batch).total

        return of

    def _curvature(
        self, loss: Callable[[Group], Tensor], weights: dict[str, Tensor], groups: list[Group], names: list[str]
    ) -> dict[str, Tensor]:
        """H g over the prunable weights, one group's graph at a time: first all of g, then each H_b g.

        Each of several processes takes its slice of every group.
        """
        chosen = {name: weights[name] for name in names}
        device = next(iter(chosen.values())).device
        states = []
        g = [torch.zeros_like(w) for w in chosen.values()]
        for group in groups:
            states.append(random_state(device))
            torch._foreach_add_(g, gradient_of(loss(group), chosen, create_graph=False))
        distributed.mean_(g)
        product = [torch.zeros_like(w) for w in g]
        for group, state in zip(groups, states, strict=True):
            set_random_state(device, state)
            part = gradient_of(loss(group), chosen, create_graph=True)
            torch._foreach_add_(product, contract(part, g, chosen))
        distributed.mean_(product)
        return dict(zip(names, product, strict=True))

    def _groups(self, source: Iterator[Batch], model: nn.Module, device: torch.device) -> list[Group]:
        if self.samples_per_class is None:
            drawn = draw(source, self.batches, f"score grasp with batches={self.batches}", device)
            return [(batch.images, batch.labels) for batch in drawn]
        first = draw(source, 1, "score grasp", device)[0]
        if not are_classes(first.labels):
            raise MetaGradientError(
                "score grasp picks images by class, and these labels are no classes: samples_per_class=None takes "
                "whole batches."
            )
        with scoring(model, False), torch.no_grad():
            classes = max(2, calling(model, {})(first.images[:2])[0].numel())  # one output tells two classes
        images, labels = self._selected(first, source, classes, device)
        half = len(labels) // 2
        return [(images[:half], labels[:half]), (images[half:], labels[half:])]

    def _selected(
        self, first: Batch, source: Iterator[Batch], classes: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        wanted = self.samples_per_class or 0
        found: list[list[Tensor]] = [[] for _ in range(classes)]
        batch: Batch | None = first
        taken_in = 0
        while batch is not None:
            for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
                if label >= classes:
                    raise MetaGradientError(f"a label is {label}: the network has no output for it.")
                if len(found[label]) < wanted:
                    found[label].append(image.to(device))
                    taken_in = _passes(source)
            missing = [label for label, images in enumerate(found) if len(images) < wanted]
            fruitless = _passes(source) - taken_in >= 2  # a whole pass through the data between the two
            batch = next(source, None) if missing and not fruitless else None
        if missing:
            raise MetaGradientError(
                f"score grasp needs samples_per_class={wanted} images of each class; the data ran out "
                f"with class {missing[0]} at {len(found[missing[0]])}. Lower prune.score.samples_per_class."
            )
        pairs = [(image, label) for label, images in enumerate(found) for image in images]
        if self.interleave:
            pairs = pairs[::2] + pairs[1::2]
        images, labels = zip(*pairs, strict=True)
        return torch.stack(list(images)), torch.tensor(labels, device=device)


def _passes(source: Iterator[Batch]) -> int:
    """How often an endless source (`pruning.Stream`) has begun the data again; 0 where it does not say."""
    return int(getattr(source, "passes", 0))


def _normalised(saliency: dict[str, Tensor]) -> Scores:
    """Divide by |Σ saliency| (float64): GraSP's own normaliser, without the 1e-10 that distorts small sums."""
    total = abs(sum(float(tensor.sum(dtype=torch.float64)) for tensor in saliency.values()))
    return {name: tensor / total for name, tensor in saliency.items()} if total > 0 else saliency
