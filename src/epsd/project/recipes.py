"""How to train, a classifier or a detector: the settings and their ranges.

The sections `train` and `detect` of params.yaml are these recipes, with what their stages need beside.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from epsd.project.settings import TIMING, Bearing, Count, Natural, NonNegative, Positive, Section, Share

Precision = Literal["auto", "fp32", "bf16", "fp16"]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]
Update = Literal["auto", "fused", "foreach", "loop"]
Optimiser = Literal["sgd", "adamw"]
Compile = Literal["auto", "none", "kernels", "graphs"]


class Quantise(Section):
    """Weights rounded to `bits` (8 or 4) in every pass, after `from_epoch` epochs in full precision.

    Validation is of the rounded network from the first epoch on: it is what would be kept.
    """

    bits: Literal[8, 4]
    from_epoch: Natural = 0


class Recipe(Section):
    """How to train a classifier. Defaults: the CIFAR recipe shared by ProsPr and CS-KD (200 epochs, SGD, 0.1, ÷10 at 50
    and 75 %).

    epochs : passes over train.  lr : peak learning rate.
    optimiser : "sgd" (with `momentum`, `nesterov`) or "adamw" (torch's; `momentum` is β1, β2 is 0.999).
    weight_decay : on every parameter; decoupled in AdamW.  decay_norms : false spares vectors (norms, biases).
    head_lr : factor on the learning rate of the layer that gives the logits.
    freeze : parameters or modules, by name or pattern, that stay as they are; what is frozen whole is in eval mode.
    freeze_epochs : for so many epochs; null = to the end.
    ema : decay per step of a running mean of weights and statistics, which is what is judged and kept; null = none.
    keep : the weights of the "last" epoch or of the "best" by top-1, then NLL, on validation.
    schedule : "step" (× gamma at each of `milestones`, shares of the epochs), "cosine" (to 0 at the end) or "constant".
    warmup_epochs : linear warm-up from lr / steps.  clip_norm : largest gradient norm, null = none.
    precision : "auto" (bf16 on a GPU or processor that computes in it, else fp32), "fp32", "bf16", "fp16" (with loss
        scaling).  memory_format : of images and convolution weights, "auto" (channels_last; contiguous for a network
        that it breaks on a CPU, `epsd.compute.devices.breaks_channels_last`), "channels_last" or "contiguous".
    update : how optimiser and mask go over the parameters ("auto", "fused", "foreach", "loop"), and
    compile : of the passes through the network ("auto", "none", "kernels", "graphs"): see `epsd.compute.speed`.
    accumulate : parts of equal size in which a batch is computed, their gradients added, "auto": 1, doubled until a
        step fits into memory. Each part is normalised by BatchNorm statistics of its own, so the result is that of
        the smaller batch there and of the whole one everywhere else. DLB distils part n from part n of the last batch.
    quantise : weights rounded in every pass, see `epsd.compute.quantise`; null = none.
    """

    epochs: Count = 200
    lr: Positive = 0.1
    momentum: Share = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 5e-4
    optimiser: Annotated[Optimiser, Bearing(neutral="sgd")] = "sgd"
    decay_norms: Annotated[bool, Bearing(neutral="true")] = True
    head_lr: Annotated[Positive, Bearing(neutral="1.0")] = 1.0
    freeze: Annotated[list[str], Bearing(neutral="[]")] = Field(default_factory=list)
    freeze_epochs: Annotated[Count | None, Bearing(neutral="null")] = None
    ema: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, Bearing(neutral="null")] = None
    keep: Annotated[Literal["last", "best"], Bearing(neutral="last")] = "last"
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=lambda: [0.5, 0.75])
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup_epochs: Natural = 0
    clip_norm: Positive | None = None
    precision: Annotated[Precision, Bearing(timed_with=True)] = "auto"
    memory_format: Annotated[MemoryFormat, TIMING] = "auto"
    update: Annotated[Update, TIMING] = "auto"
    compile: Annotated[Compile, TIMING] = "auto"
    accumulate: Literal["auto"] | Count = 1
    quantise: Annotated[Quantise | None, Bearing(neutral="null")] = None

    def __repr__(self) -> str:
        """What differs from the defaults, and what one always wants to know."""
        usual = {name: field.get_default(call_default_factory=True) for name, field in type(self).model_fields.items()}
        always = ("epochs", "lr", "optimiser", "schedule")
        told = [f"{name}={value!r}" for name, value in self if name in always or value != usual[name]]
        return f"{type(self).__name__}({', '.join(told)})"

    __str__ = __repr__

    @model_validator(mode="after")
    def _warm_in_time(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs} is more than epochs ({self.epochs}): lr never gets there"
            )
        if self.quantise is not None and self.quantise.from_epoch >= self.epochs:
            raise ValueError(
                f"quantise.from_epoch: {self.quantise.from_epoch} is not before the end (epochs: {self.epochs}): no "
                "weight would ever be rounded"
            )
        if sorted(set(self.milestones)) != self.milestones:
            raise ValueError("milestones: each must be larger than the one before")
        if self.freeze_epochs is not None and not self.freeze:
            raise ValueError('freeze_epochs: freeze names nothing, e.g. ["conv1", "layer?.*"]')
        return self

    def weight_bits(self, epoch: int) -> int | None:
        """Bits to which the weights of epoch `epoch` (from 0) are rounded; None for as they are."""
        return None if self.quantise is None or epoch < self.quantise.from_epoch else self.quantise.bits


STEPS = 400
"""Optimiser steps after which a detector finds its training pictures again: measured on a hundred photographs, which
100 steps teach nothing (benchmarks/results/photos-cpu.md)."""
LEAST_EPOCHS = 8


class DetectorRecipe(Section):
    """How to train a detector: SGD, linear warm-up by steps, then a cosine to zero.

    epochs : "auto": as many as STEPS take, and LEAST_EPOCHS at least.
    clip_norm : largest gradient norm, null = none.  flip : mirror half of the pictures, drawn anew each epoch.
    precision : as of `Recipe`.
    """

    epochs: Count | Literal["auto"] = "auto"
    batch_size: Count
    lr: Positive
    momentum: Share = 0.9
    weight_decay: NonNegative = 1e-4
    clip_norm: Positive | None = None
    warmup_steps: Natural = 0
    flip: bool = False
    precision: Precision = "auto"

    def passes(self, pictures: int) -> int:
        """`epochs`, over so many pictures, as a number."""
        if self.epochs != "auto":
            return self.epochs
        return max(LEAST_EPOCHS, math.ceil(STEPS / max(1, math.ceil(pictures / self.batch_size))))
