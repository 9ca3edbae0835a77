"""How to train a classifier: the settings of one training, and its learning rate at each step."""

import math
from typing import Annotated, Literal

from pydantic import Field

from epsd.compute.speed import Compile, Update
from epsd.registry import variant


@variant
class Recipe:
    """How to train. Defaults: the CIFAR recipe shared by ProsPr and CS-KD (200 epochs, SGD, 0.1, ÷10 at 50 and 75 %).

    epochs : passes over train.  lr : peak learning rate.  momentum, nesterov, weight_decay : of SGD, on every
        parameter.
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
    """

    epochs: Annotated[int, Field(ge=1)] = 200
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=lambda: [0.5, 0.75])
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    update: Update = "auto"
    compile: Compile = "auto"
    accumulate: Literal["auto"] | Annotated[int, Field(ge=1)] = 1

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of optimiser step `step` (from 0)."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "step":
            passed = sum(step // steps_per_epoch >= max(1, round(share * self.epochs)) for share in self.milestones)
            return self.lr * self.gamma**passed
        if self.schedule == "cosine":
            total = max(1, self.epochs * steps_per_epoch - warmup)
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / total))
        return self.lr
