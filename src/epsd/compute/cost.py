"""What a method costs: images sent through a network, forwards and backwards, and seconds.

One image pass is one image sent forwards through the network: about one product per layer. Going back costs two
(one product for the gradient of the layer's input, one for that of its weights), and going back through a graph that
itself holds a backward pass, as a Hessian-vector product does, costs six (two for the forward part, and two for each
of the backward part's two products). So a training step costs 3 per image, a Hessian-vector product that evaluates
its step again 9.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from epsd.compute import distributed, networks
from epsd.types import Forward

FORWARD, BACKWARD, SECOND_ORDER = 1, 2, 6
"""Image passes per image: of a forward pass, a backward pass, a backward pass through a backward pass."""


@dataclass
class Meter:
    """Counts what is really executed, here and in the processes that do equal shares of the work.

    images_forward : images sent forwards, with or without a graph.
    images_backward : images for which a gradient went back through the network once.
    images_second_order : images for which one went back through such a backward pass.
    seconds : time of the parts that were measured.

    Forward passes are counted where the network is called, backward passes where the gradient of the logits arrives:
    a forward pass whose gradient nobody asks for is never charged with one.
    """

    images_forward: int = 0
    images_backward: int = 0
    images_second_order: int = 0
    seconds: float = 0.0

    @property
    def image_passes(self) -> int:
        """All of them in forward passes: forward 1, backward 2, second order 6."""
        first = FORWARD * self.images_forward + BACKWARD * self.images_backward
        return first + SECOND_ORDER * self.images_second_order

    def figures(self, prefix: str = "") -> dict[str, float]:
        """Every count by name after `prefix`: images_forward, images_backward, images_second_order, image_passes,
        seconds.
        """
        names = ("images_forward", "images_backward", "images_second_order", "image_passes", "seconds")
        return {f"{prefix}{name}": float(getattr(self, name)) for name in names}

    @classmethod
    def of(cls, figures: Mapping[str, float], prefix: str = "") -> "Meter":
        """A meter that stands where `figures` left one; what they do not name is 0."""
        forward, backward, second = (
            int(figures.get(f"{prefix}images_{kind}", 0)) for kind in ("forward", "backward", "second_order")
        )
        return cls(forward, backward, second, float(figures.get(f"{prefix}seconds", 0.0)))

    def add(self, other: "Meter") -> None:
        """Add the counts of `other`."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def stand_at(self, other: "Meter") -> None:
        """Take over the counts of `other`."""
        vars(self).update(vars(other))

    def through(self, forward: Forward) -> Forward:
        """`forward`, counted."""

        def counted(images: Tensor) -> Tensor:
            logits = forward(images)
            self._count(len(images), logits)
            return logits

        return counted

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator["Meter"]:
        """Count every call of `model` meanwhile, also with other weights (`functional_call`) and of its deep copies."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], outputs: object) -> None:
            self._count(len(inputs[0]), outputs)

        with networks.hooked([(model, hook)]):  # a plain function: a deep copy of the model shares it
            yield self

    def _count(self, images: int, outputs: object) -> None:
        images *= distributed.world()
        self.images_forward += images
        live = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if len(live) == 1:
            live[0].register_hook(self._arriving(images))  # type: ignore[no-untyped-call]
        elif live:
            register_multi_grad_hook(live, self._arriving(images), mode="any")

    def _arriving(self, images: int) -> Callable[[Tensor], None]:
        """Called whenever a gradient reaches the logits of one forward pass.

        Autograd runs hooks with gradients enabled exactly where the backward pass leaves a graph (`create_graph`);
        whatever comes back through these logits after that comes through that graph.
        """
        kept = False

        def arrived(gradient: Tensor) -> None:
            nonlocal kept
            if kept:
                self.images_second_order += images
            else:
                self.images_backward += images
            kept = kept or torch.is_grad_enabled()

        return arrived
