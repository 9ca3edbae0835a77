"""In how many parts a batch is computed so that a training step fits into memory."""

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

from epsd.compute import distributed, shortage
from epsd.compute.memory import SAMPLE, share
from epsd.project.runtime import note
from epsd.types import Batch, Loss

if TYPE_CHECKING:
    from epsd.training.fit import _Loop


class Fitting:
    """In how many parts a batch is computed so that a step fits into memory: found at the first batch, then fixed.

    A resumed training keeps the number it began with: it is a part of the result. Several processes take the number
    that the one with least memory needs.
    """

    def __init__(self, loop: "_Loop", asked: int | Literal["auto"]) -> None:
        self.loop, self.asked = loop, asked
        self.parts = 1 if asked == "auto" else asked
        self.known = False
        self._batch: Batch | None = None

    def find(self, batch: Batch) -> None:
        """Estimate on a CPU, which gives no second chance where memory runs out; with "auto" also try on a GPU.

        Several processes estimate there too: one that ran out while trying would leave the others waiting.
        """
        self._batch, self.known = batch, True
        size, device = len(batch.labels), self.loop.device
        tried = device.type != "cpu" and distributed.world() == 1
        with self._untouched():
            room = None if tried else _room(device)
            if room is not None and size >= SAMPLE:
                needed = self._need()
                while needed.of(-(-size // self.parts)) > room:
                    if self.asked != "auto" or self.parts * 4 > size:
                        raise shortage.OutOfMemory(self.advice())
                    self.parts *= 2
            while self.asked == "auto" and tried and not self._fits():
                self.parts *= 2
        if self.asked == "auto" and self.parts > 1 and distributed.is_main():
            note(f"train: a batch of {size} does not fit into memory: computed in {self.parts} parts.")

    def advice(self) -> str:
        """What to do about a batch that does not fit. Asks no other process, which may be elsewhere."""
        processes = distributed.world()
        with distributed.alone():
            return self._advice(processes)

    def _advice(self, processes: int) -> str:
        device = self.loop.device
        if self._batch is None or len(self._batch.labels) < SAMPLE:
            return f"out of memory on {device} before the first step. Take a smaller network, or free memory."
        self.loop.updates.forget()
        with self._untouched():
            needed = self._need()
        size = len(self._batch.labels)
        return shortage.advice(size, self.parts, needed, shortage.free(device), device, processes)

    def _need(self) -> shortage.Need:
        """From a few images of the batch under the objective itself, with a state of its own."""
        assert self._batch is not None
        objective = copy.copy(self.loop.objective)
        objective.begin("score", self.loop.train.size, self.loop.train.num_classes)
        recipe = self.loop.recipe
        moments = 2 if recipe.optimiser == "adamw" else int(recipe.momentum > 0)
        copies = 1 + moments + (self.loop.updates.holder is not None) + (recipe.ema is not None)

        def graph(batch: Batch) -> object:
            with torch.no_grad():
                objective.loss(self.loop.forward, batch, 1.0)  # DLB looks back at it
            return objective.loss(self.loop.forward, batch, 1.0)

        net, self.loop.net = self.loop.net, self.loop.model  # nothing is compiled for so few images
        try:
            return shortage.need(self.loop.model, graph, self._batch, copies)
        finally:
            self.loop.net = net

    def _fits(self) -> bool:
        """Whether the gradient of the batch can be computed in that many parts."""
        assert self._batch is not None
        try:
            self.loop.backward(shortage.parts(self._batch, self.parts), 1.0)
        except (RuntimeError, MemoryError) as error:
            if not shortage.is_shortage(error) or self.parts * 4 > len(self._batch.labels):
                raise
            shortage.release(error, self.loop.device)
            return False
        return True

    @contextlib.contextmanager
    def _untouched(self) -> Iterator[None]:
        """What is tried leaves no trace in the network's buffers, gradients, or a training that has not begun."""
        loop = self.loop
        buffers = {name: buffer.clone() for name, buffer in loop.model.named_buffers()}
        state, meter = loop.objective.state_dict(), copy.copy(loop.meter)
        try:
            yield
        finally:
            loop.meter.stand_at(meter)
            for name, buffer in loop.model.named_buffers():
                buffer.copy_(buffers[name])
            loop.updates.forget()
            if not state:
                loop.objective.begin("train", loop.train.size, loop.train.num_classes)


def _room(device: torch.device) -> float | None:
    """Bytes for each process."""
    free = shortage.free(device)
    return None if free is None else distributed.least(share(free, device))


def added(parts: list[Loss]) -> Loss:
    """The loss of a batch from those of its parts, each already weighted by its share; logits (B, K) in order."""
    total = torch.stack([part.total for part in parts]).sum()
    terms = {name: torch.stack([part.terms[name] for part in parts]).sum() for name in parts[0].terms}
    logits = [part.logits for part in parts if part.logits is not None]
    return Loss(total, terms, torch.cat(logits) if logits else None)
