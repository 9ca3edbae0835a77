"""Exact meta-gradients of a mask through SGD steps, by the adjoint recursion.

The mask m multiplies the initial weights once, θ₀ = m ⊙ θ_init (ProsPr's convention), and every parameter then takes
i plain SGD steps on the losses L₀ … L_{i−1}:

    v_{k+1} = μ v_k + ∇L_k(θ_k),     θ_{k+1} = θ_k − η v_{k+1}.

The gradient of L_i(θ_i) with respect to m at m = 1 follows by going back through the steps:

    λ ← ∇L_i(θ_i), ν ← 0;     for k = i−1 … 0:   ν ← ν − η λ;   λ ← λ + H_k(θ_k) ν;   ν ← μ ν;     ∂L_i/∂m = λ ⊙ θ_init.

Several processes (`compute.distributed`) take a slice of every batch each and average their gradients and products.

H_k ν is a Hessian-vector product, for which step k is evaluated again, with the same batch, objective state and
random numbers. So only one step's graph is alive at a time, and memory grows with i by one copy of the parameters a
step, where unrolled automatic differentiation (the official ProsPr code) keeps every graph. `graphs_kept` trades the
second evaluation back for memory; `epsd.pruning.look_ahead` measures how many the memory at hand allows.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn

from epsd.pruning.scoring import LossFunction, Vector, wide
from epsd.pruning.unroll import Unroll
from epsd.types import Batch

Reading = Literal["full", "first_order", "local"]


class MetaGradient(NamedTuple):
    """`gradient`: signed ∂L_i/∂m of each named weight. `losses`: L₀ … L_i, `terms` likewise by name."""

    gradient: Vector
    losses: list[float]
    terms: list[dict[str, float]]


def mask_gradient(
    model: nn.Module,
    loss: LossFunction,
    batches: Sequence[Batch],
    names: Sequence[str],
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    reading: Reading = "full",
    detach_first_step: bool = False,
    micro_batch: int | None = None,
    graphs_kept: int = 0,
) -> MetaGradient:
    """∂L(θ_i)/∂m of the weights `names`, after i = len(batches) − 1 SGD steps; the last batch is the outer loss's.

    `reading`: "full" differentiates through the steps; "first_order" takes the inner gradients as
    constants, g_i ⊙ θ_init; "local" puts the mask at θ_i, g_i ⊙ θ_i. Equal for i = 0, where with cross entropy they
    are SNIP. `detach_first_step`: treat the first momentum buffer as a constant, as the official ProsPr code does
    where momentum ≠ 0. Call inside `scoring(model)`. Parameters, buffers and gradients of `model` are not touched.

    Raises
    ------
    MetaGradientError : a loss that is not differentiable (twice, for "full").
    """
    full = reading == "full"
    unroll = Unroll(
        model,
        loss,
        lr=lr,
        momentum=momentum,
        micro_batch=micro_batch,
        graphs_kept=graphs_kept if full else 0,
        for_return=full,
    )
    start = unroll.weights[0]
    unroll.advance(batches[:-1])
    outer = unroll.gradient(batches[-1])
    factor = unroll.weights[-1] if reading == "local" else start
    if full:
        outer = unroll.back(outer, detach_first_step=detach_first_step and momentum > 0)
    return MetaGradient({name: wide(outer[name]) * wide(factor[name]) for name in names}, unroll.losses, unroll.terms)


def gradient_norms(
    model: nn.Module,
    loss: LossFunction,
    batches: Sequence[Batch],
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    micro_batch: int | None = None,
) -> list[dict[str, float]]:
    """Euclidean norm of the gradient of each summand of the loss (`Loss.parts`) at θ₀ … θ_i of the scoring steps.

    The prune report's ‖g_KL‖/‖g_CE‖: whether the self-distillation term is live while scoring.
    """
    unroll = Unroll(model, loss, lr=lr, momentum=momentum, micro_batch=micro_batch, for_return=False)
    norms = []
    for step, batch in enumerate(batches):
        norms.append(unroll.norms(batch))
        if step + 1 < len(batches):
            unroll.advance([batch])
    return norms
