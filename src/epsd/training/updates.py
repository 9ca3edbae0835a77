"""The update that ends a training step, of a classifier as of a detector."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from epsd.compute.speed import align_, pick_update, sgd
from epsd.masks import Mask, MaskHolder
from epsd.project.recipes import DetectorRecipe, Recipe, Update


class Updates:
    """SGD by `recipe` on the weights of `model`, under a mask that holds.

    update : how it goes over the parameters, see `epsd.compute.speed.pick_update`.  scaled : whether losses are scaled,
    as half precision needs it.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe | DetectorRecipe, update: Update, device: torch.device, *, scaled: bool
    ) -> None:
        self.model, self.clip_norm, self.update = model, recipe.clip_norm, pick_update(update, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        nesterov = isinstance(recipe, Recipe) and recipe.nesterov and recipe.momentum > 0
        settings = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
        self.optimiser = sgd(model, self.update, **settings, nesterov=nesterov)
        self.holder: MaskHolder | None = None

    def hold(self, mask: Mask) -> None:
        """From now on what `mask` removes is zero: weights, and momentum of those that it just removed."""
        mask.apply_(self.model)
        self.holder = MaskHolder(mask, self.model, foreach=self.update != "loop")
        for name, keep in mask.keep.items():
            velocity = self.optimiser.state.get(self.model.get_parameter(name), {}).get("momentum_buffer")
            if velocity is not None:
                velocity.masked_fill_(~keep.to(velocity.device), 0.0)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to those that are there."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """No gradient is there."""
        self.optimiser.zero_grad(set_to_none=True)

    def take(self, lr: float, moved: Callable[[], bool] = lambda: False) -> Tensor:
        """One update by the gradients that are there; their norm, masked, before clipping, as a scalar on the device.

        moved : asked once they are whole, when the mask may move; where it says so, no weight is trained in this step.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimiser)
        resting = moved()
        if self.holder is not None:
            self.holder.gradients_()
        norm = self._clipped()
        if not resting:
            self.scaler.step(self.optimiser)
        self.scaler.update()
        return norm

    @torch.no_grad()
    def _clipped(self) -> Tensor:
        if self.clip_norm is not None:
            return nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def settle(self) -> None:
        """Zero the removed weights once more: SGD keeps them there by itself, see `MaskHolder`."""
        if self.holder is not None:
            self.holder.weights_()

    def state_dict(self) -> dict[str, Any]:
        """Of optimiser and scaler."""
        return {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As they were; laid out in memory as the weights are."""
        self.optimiser.load_state_dict(state["optimiser"])
        align_(self.optimiser)
        self.scaler.load_state_dict(state["scaler"])
