"""Which weights a training leaves: its own or their running mean, of the last epoch or of the best one."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from epsd.compute import distributed
from epsd.masks import Mask
from epsd.project.recipes import Recipe
from epsd.training.record import Record, TrainingError


def kept(history: Sequence[Record], keep: Literal["last", "best"]) -> Record:
    """The record of the epoch whose weights a training leaves; of equally good ones the first."""
    return max(history, key=_rank) if keep == "best" else history[-1]


def check_judged(recipe: Recipe, judged: bool) -> None:
    """TrainingError where nothing will tell which epoch is the best."""
    if recipe.keep == "best" and not judged:
        raise TrainingError(
            "train.keep: best is told by validation, and there is none: use last, or data.validation above 0."
        )


def chosen(record: Record) -> dict[str, float]:
    """What tells of an epoch that was kept as the best: its figures of validation, and which it was."""
    judged = {name: value for name, value in record.items() if name.startswith("val/")}
    return judged | {"train/chosen_epoch": record["epoch"]}


def _rank(record: Record) -> tuple[float, float]:
    return record["val/top1"], -record["val/nll"]


class Result:
    """What `fit` leaves in the network once it has trained, by `recipe.ema` and `recipe.keep`."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._model, self._recipe = model, recipe
        self._best: dict[str, Tensor] = {}
        self._mean: AveragedModel | None = None
        if recipe.ema is not None:
            mean = get_ema_multi_avg_fn(recipe.ema)  # type: ignore[no-untyped-call]
            self._mean = AveragedModel(model, multi_avg_fn=mean, use_buffers=True)

    @property
    def network(self) -> nn.Module:
        """What is judged, and kept: the network, or the mean of what it was."""
        return self._model if self._mean is None else self._mean.module

    def hold(self, mask: Mask) -> None:
        """From now on what `mask` removes is zero in the mean, too."""
        if self._mean is not None:
            mask.apply_(self._mean.module)

    def step(self) -> None:
        """The network has taken a step."""
        if self._mean is not None:
            self._mean.update_parameters(self._model)

    def average_buffers(self) -> None:
        """Running statistics that each process kept for itself, at the end of an epoch."""
        if self._mean is not None:
            distributed.settle_buffers(self._mean.module)

    def consider(self, history: Sequence[Record]) -> None:
        """An epoch is over. TrainingError where nothing tells how good it is."""
        if self._recipe.keep == "last":
            return
        if "val/top1" not in history[-1]:
            raise TrainingError("train.keep: best is told by top-1, which is not judged here: use last.")
        if kept(history, "best") is history[-1]:
            self._best = {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    @torch.no_grad()
    def settle(self) -> None:
        """Training is over: put the weights that stay into the network."""
        if self._best or self._mean is not None:
            self._model.load_state_dict(self._best or self.network.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to leave the same."""
        mean = {} if self._mean is None else {"mean": self._mean.state_dict()}
        return mean | ({"best": self._best} if self._best else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._best = dict(state.get("best", {}))
        if self._mean is not None:
            self._mean.load_state_dict(state["mean"])
