"""What a procedure is given and what it gives back."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import nn

from epsd.compute.cost import Meter
from epsd.compute.seeds import mix
from epsd.data.prepared import Prepared
from epsd.masks import Mask
from epsd.pipeline import describe
from epsd.pipeline.prune import Pruned, initial
from epsd.pipeline.train import trained
from epsd.project.params import Params
from epsd.project.settings import Choice
from epsd.pruning import paths
from epsd.training.moving import Moving
from epsd.training.record import Record

T = TypeVar("T")


class Trained(NamedTuple):
    """`model`: trained, on its device. `mask`: what was removed. `figures`: metrics of the whole cell, under the names
    that the stages log (`mask/sparsity`, `time/train`, `cost/...`), beside those of the last epoch in `history`.
    `architecture`: what builds the model, where not the cell's own.
    """

    model: nn.Module
    mask: Mask
    history: list[Record]
    figures: Mapping[str, Any]
    architecture: Choice | None = None


class Cache:
    """The last thing that was shared, by what it was made of."""

    def __init__(self) -> None:
        self._key: Any = None
        self._value: Any = None

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gave for an equal `key`, or gives now."""
        if self._key is None or self._key != key:
            self._key, self._value = None, None  # the old one may be large
            self._value = make()
            self._key = key
        value: T = self._value
        return value


@dataclass(frozen=True)
class Desk:
    """What a cell works with: `folder` and `mark` for its checkpoints, `log` for the record of an epoch."""

    folder: Path
    mark: str
    log: Callable[[Record], None]
    cache: Cache
    key: Any

    def shared(self, make: Callable[[], T]) -> T:
        """What `make` gave to an earlier cell that shares with this one (`Procedure.shares`), or gives now."""
        return make() if self.key is None else self.cache.get(self.key, make)


class Procedure(Protocol):
    """From parameters and prepared data to a trained model."""

    def check(self, params: Params) -> None:
        """Raises EpsdError for parameters that cannot work with this procedure. Called before anything is trained."""
        return

    def story(self, params: Params, data: Prepared) -> str:
        """What the run was, in plain words, for its page; by default as the stage `train` tells it."""
        return describe.story(params, data)

    def __call__(self, params: Params, data: Prepared, desk: Desk) -> Trained:
        """Train. Called again with the same arguments after a kill, it goes on."""

    def shares(self, params: Params) -> Mapping[str, Any] | None:
        """What cells with an equal mapping have in common (data set and procedure are compared besides); or nothing."""
        return None


def finished(params: Params, data: Prepared, found: Pruned, desk: Desk, moving: Moving | None = None) -> Trained:
    """Train what was pruned, under a mask that `moving` may move; the figures are those of the last mask."""
    begun, masks = time.perf_counter(), deque([found.mask], maxlen=1)
    history = trained(
        params,
        data,
        found.model,
        found.mask,
        on_epoch=desk.log,
        checkpoint=desk.folder / "last.safetensors",
        mark=desk.mark,
        meter=Meter.of(found.report),
        moving=moving,
        on_mask=masks.append,
    )
    figures, seconds = dict(found.report), {"time/train": time.perf_counter() - begun}
    if moving is not None:
        examined = paths.examined(found.model, masks[0], data.image_shape, mix(params.seed, "random erk"))
        figures |= {**masks[0].summary(), **examined.summary()}
    return Trained(found.model, masks[0], history, {f"mask/{name}": value for name, value in figures.items()} | seconds)


def dense(params: Params, data: Prepared) -> Pruned:
    """The initial network with nothing removed, and nothing spent on it."""
    model = initial(params, data)
    mask = Mask.dense(model, params.prune.exclude)
    return Pruned(mask, model, mask.summary())
