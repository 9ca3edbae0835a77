"""The update that ends a training step, of a classifier as of a detector."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from epsd.compute.speed import align_, optimiser, pick_update
from epsd.masks import Mask
from epsd.project.recipes import DetectorRecipe, Recipe, Update
from epsd.training.groups import parameter_groups


def _multiply_each(tensors: list[Tensor], factors: list[Tensor]) -> None:
    for tensor, factor in zip(tensors, factors, strict=True):
        tensor.mul_(factor)


class MaskHolder:
    """A mask bound to the parameters of one model, for a training loop.

    The gradient is masked before the optimiser sees it, so that neither momentum nor gradient clipping feels removed
    weights. SGD and AdamW then leave them at +0 by themselves: their moments stay ±0, weight decay of 0 is 0, and +0
    minus ±0 is +0. Whoever wants to be sure masks the weights too.
    """

    def __init__(self, mask: Mask, model: nn.Module, *, foreach: bool = True) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        mask.check_layers(parameters)
        self._weights: list[Tensor] = [parameters[name] for name in mask.keep]
        # laid out in memory as the weights are: other strides would cost a fused multiplication its speed
        self._factors = [torch.empty_like(p).copy_(k) for k, p in zip(mask.keep.values(), self._weights, strict=True)]
        self._multiply = torch._foreach_mul_ if foreach else _multiply_each

    @torch.no_grad()
    def gradients_(self) -> None:
        """Zero the gradients of removed weights, in place. Parameters without a gradient are passed over."""
        pairs = [(p.grad, f) for p, f in zip(self._weights, self._factors, strict=True) if p.grad is not None]
        if pairs:
            self._multiply([g for g, _ in pairs], [f for _, f in pairs])

    @torch.no_grad()
    def weights_(self) -> None:
        """Zero the removed weights, in place. After `Mask.apply_` no −0 appears: +0 times 0 and +0 minus ±0 are +0."""
        self._multiply(self._weights, self._factors)


class Updates:
    """SGD or AdamW by `recipe` on the weights of `model`, under a mask that holds.

    update : how it goes over the parameters, see `epsd.compute.speed.pick_update`.  scaled : whether losses are scaled,
    as half precision needs it.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe | DetectorRecipe, update: Update, device: torch.device, *, scaled: bool
    ) -> None:
        self.model, self.clip_norm, self.update = model, recipe.clip_norm, pick_update(update, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        groups = parameter_groups(model, **recipe.model_dump(include={"head_lr", "decay_norms"}))
        kind = recipe.optimiser if isinstance(recipe, Recipe) else "sgd"
        nesterov = isinstance(recipe, Recipe) and recipe.nesterov and recipe.momentum > 0
        own: dict[str, dict[str, Any]] = {
            "sgd": {"momentum": recipe.momentum, "nesterov": nesterov},
            "adamw": {"betas": (recipe.momentum, 0.999)},
        }
        shared = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        self.optimiser = optimiser(kind, groups, self.update, **shared, **own[kind])
        self.holder: MaskHolder | None = None

    def hold(self, mask: Mask) -> None:
        """From now on what `mask` removes is zero: weights, and moments of those that it just removed."""
        mask.apply_(self.model)
        self.holder = MaskHolder(mask, self.model, foreach=self.update != "loop")
        for name, keep in mask.keep.items():
            for moment in self.optimiser.state.get(self.model.get_parameter(name), {}).values():
                if isinstance(moment, Tensor) and moment.shape == keep.shape:
                    moment.masked_fill_(~keep.to(moment.device), 0.0)

    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """These are trained from here on: torch's fused SGD wants the momentum of all or of none."""
        if self.optimiser.defaults.get("momentum"):
            for parameter in parameters:
                self.optimiser.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

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
            group["lr"] = lr * group["factor"]
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
        """Zero the removed weights once more: the optimiser keeps them there by itself, see `MaskHolder`."""
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
