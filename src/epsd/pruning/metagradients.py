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

import copy
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from epsd.compute import distributed
from epsd.compute.devices import to_device
from epsd.compute.joint_layers import together
from epsd.compute.second_order import TwiceDifferentiable, laid_out, weights_laid_out
from epsd.losses import no_such_class
from epsd.types import Batch, EpsdError, Forward, Loss, Objective, Scores

Reading = Literal["full", "first_order", "local"]
LossFunction = Callable[[Forward, Batch], Loss]
"""A loss that may carry state from call to call; `copy.copy` of it is a snapshot."""
Vector = dict[str, Tensor]


class MetaGradientError(EpsdError):
    """The loss or the model cannot be differentiated as asked."""


class Following:
    """An objective as a loss function: its state goes from step to step, and a copy is a snapshot of it."""

    def __init__(self, objective: Objective) -> None:
        self.objective = copy.copy(objective)

    def __call__(self, forward: Forward, batch: Batch) -> Loss:
        """One evaluation; the state moves on."""
        return self.objective.loss(forward, batch, 1.0)

    def __copy__(self) -> "Following":
        return Following(self.objective)


class MetaGradient(NamedTuple):
    """`gradient`: signed ∂L_i/∂m of each named weight. `losses`: L₀ … L_i, `terms` likewise by name."""

    gradient: Vector
    losses: list[float]
    terms: list[dict[str, float]]


@dataclass(frozen=True)
class Means:
    """What scores may use. memory : bytes, None = most of what the device has free when a score begins.
    precision : the autocast type, None = that of the weights.
    """

    memory: float | None = None
    precision: torch.dtype | None = None


_WITHIN: ContextVar[Means | None] = ContextVar("means", default=None)


def means() -> Means:
    """What the score that runs now may use."""
    return _WITHIN.get() or Means()


@contextmanager
def within(allowed: Means) -> Iterator[None]:
    """Scores computed in the block keep to `allowed`."""
    token = _WITHIN.set(allowed)
    try:
        yield
    finally:
        _WITHIN.reset(token)


@contextmanager
def scoring(model: nn.Module, train: bool = True) -> Iterator[None]:
    """Put `model` in train or eval mode for a score; restore every module's mode and the random states afterwards.

    Meanwhile gradients are on, layers run in a form that is cheap to differentiate twice (`epsd.compute.second_order`),
    attention in its plain one, and what is compiled as it was written: compiled code has no second derivative.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    modes = {module: module.training for module in model.modules()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.train(train)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _uncompiled(),
            keeping_random_state(_device(model)),
            sdpa_kernel(SDPBackend.MATH),
            TwiceDifferentiable(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, mode in modes.items():
            module.training = mode


def _uncompiled() -> AbstractContextManager[Any]:
    """Nothing where the compiler was never loaded: no module can be compiled then, and loading it takes a second."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


_HOOKED = (
    "this network sets hooks on what it saves for the backward pass (activation checkpointing, save_on_cpu), which "
    "scores that evaluate it with other weights cannot follow. Switch that off while pruning, as by "
    "model.set_grad_checkpointing(False)."
)


def calling(model: nn.Module, weights: Vector, counted: bool = False) -> Forward:
    """`model` called with `weights` (or buffers) in place of its own; other buffers are copied, never changed.

    In the precision of `Means`; logits are in that of the weights, so that losses are exact. `counted`: what is saved
    for the backward pass is being counted (`memory.Saved`), by such hooks as are refused otherwise.

    MetaGradientError, when called: the network checkpoints activations, or gives something else than logits.
    """
    lower = means().precision

    def forward(images: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with together(), torch.autocast(images.device.type, dtype=lower, enabled=lower is not None):
            logits = _called(model, {**buffers, **weights}, images, counted)
        return logits.to(images.dtype)

    return forward


def _called(model: nn.Module, weights: Vector, images: Tensor, counted: bool) -> Tensor:
    try:
        with nullcontext() if counted else torch.autograd.graph.disable_saved_tensors_hooks(_HOOKED):
            logits = functional_call(model, weights, (images,))
    except RuntimeError as error:
        if _HOOKED not in str(error):
            raise
        raise MetaGradientError(_HOOKED) from None
    if not isinstance(logits, Tensor):
        raise MetaGradientError(
            f"the network gives {type(logits).__name__}, a score needs logits (B, K): wrap it in a module that "
            "returns them alone."
        )
    return logits


class RandomState(NamedTuple):
    """Of every generator that a network may draw from: torch's on the CPU and on its device, Python's, numpy's."""

    cpu: Tensor
    device: Tensor | None
    python: Any
    numpy: Any


def random_state(device: torch.device) -> RandomState:
    """What dropout and stochastic depth on `device` will draw from."""
    kinds: dict[str, Callable[[], Tensor]] = {
        "cuda": lambda: torch.cuda.get_rng_state(device),
        "mps": torch.mps.get_rng_state,
    }
    own = kinds[device.type]() if device.type in kinds else None
    return RandomState(torch.get_rng_state(), own, random.getstate(), np.random.get_state())


def set_random_state(device: torch.device, state: RandomState) -> None:
    """Draw again what was drawn after `state` was taken."""
    torch.set_rng_state(state.cpu)
    if state.device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state.device, device)
    elif state.device is not None:
        torch.mps.set_rng_state(state.device)
    random.setstate(state.python)
    np.random.set_state(state.numpy)


@contextmanager
def keeping_random_state(device: torch.device) -> Iterator[None]:
    """What is drawn in the block leaves no trace."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(device, state)


class _Part(NamedTuple):
    """One micro-batch of a step, and what is needed to evaluate it again."""

    loss: LossFunction
    batch: Batch
    weight: float
    random_state: RandomState


def _chunks(batch: Batch, micro_batch: int | None) -> list[Batch]:
    if micro_batch is None or micro_batch >= len(batch.labels):
        return [batch]
    fields = [
        [None] * math.ceil(len(batch.labels) / micro_batch) if f is None else torch.split(f, micro_batch) for f in batch
    ]
    return [Batch(*parts) for parts in zip(*fields, strict=True)]


def batch_laid_out(batch: Batch, model: nn.Module) -> Batch:
    """Images and partners in the memory format in which they are convolved fastest."""
    partner = None if batch.partner is None else laid_out(batch.partner, model)
    return batch._replace(images=laid_out(batch.images, model), partner=partner)


def gradient_of(loss: Tensor, weights: Vector, create_graph: bool) -> list[Tensor]:
    """∂loss/∂weights in their order, zero where a weight has no part. MetaGradientError: not differentiable."""
    try:
        return list(
            torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph, materialize_grads=True)
        )
    except RuntimeError as error:
        raise _not_differentiable(error) from error


def _not_differentiable(error: RuntimeError) -> Exception:
    text = str(error).splitlines()[0]
    signs = ("does not require grad", "not implemented", "once_differentiable", "differentiate twice", "no grad_fn")
    if not any(sign in text for sign in signs):
        return error
    return MetaGradientError(
        f"the loss is not differentiable twice with respect to the weights ({text}). "
        "Reading 'full' needs second derivatives; 'first_order' and 'local' need first ones only."
    )


class Unroll:
    """i SGD steps on copies of a model's trainable parameters, remembered so that one can go back through them.

    Parameters
    ----------
    model : its trainable parameters are the start; nothing of it is changed.
    loss : evaluated once per step; state follows from step to step.
    lr, momentum : η > 0 and μ in [0, 1) of the steps.
    micro_batch : images evaluated at once (in all processes together). Exact where the loss is a batch mean and the
        net has no batch statistics; with BatchNorm in train mode each micro-batch is normalised by its own statistics.
    graphs_kept : the last so many steps keep their graph instead of being evaluated again: faster, more memory.
    for_return : remember what `back` needs. Without, only the first and the last weights are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        lr: float = 0.1,
        momentum: float = 0.0,
        micro_batch: int | None = None,
        graphs_kept: int = 0,
        for_return: bool = True,
    ) -> None:
        self._model, self._for_return = model, for_return
        self._lr, self._momentum = lr, momentum
        self._micro_batch, self._graphs_kept = micro_batch, graphs_kept
        self._loss = loss
        self._streams: list[LossFunction] = []
        self._velocity: list[Tensor] | None = None
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        start = {name: weight for name, weight in weights_laid_out(model).items() if name in trained}
        self._device = next(iter(start.values())).device if start else torch.device("cpu")
        self.weights: list[Vector] = [start]
        self._parts: list[list[_Part]] = []
        self._graphs: dict[int, list[list[Tensor]]] = {}
        self._leaves: dict[int, Vector] = {}
        self.losses: list[float] = []
        self.terms: list[dict[str, float]] = []

    def _evaluate(self, part: _Part, weights: Vector) -> tuple[Loss, LossFunction]:
        loss = copy.copy(part.loss)
        set_random_state(self._device, part.random_state)
        try:
            return loss(calling(self._model, weights), part.batch), loss
        except (IndexError, RuntimeError) as error:
            if told := no_such_class(error):
                raise MetaGradientError(told) from None
            raise

    def gradient(self, batch: Batch, keep_graph: bool = False) -> Vector:
        """∇L_k(θ_k) on `batch`, which becomes step k's. Advances the loss's state.

        Each of several processes evaluates its slice of every micro-batch. Raises ParallelError where a micro-batch
        cannot be split evenly.
        """
        step = len(self._parts)
        leaves = {name: w.detach().requires_grad_() for name, w in self.weights[-1].items()}
        chunks = _chunks(batch_laid_out(batch, self._model), self._micro_batch)
        self._streams += [copy.copy(self._loss) for _ in chunks[len(self._streams) :]]
        parts, graphs, shares = [], [], [len(chunk.labels) / len(batch.labels) for chunk in chunks]
        total = [torch.zeros_like(w) for w in leaves.values()]
        sums: dict[str, float] = {}
        for position, chunk in enumerate(chunks):
            distributed.check_batch(len(chunk.labels), "images scored at once", distributed.world())
            share, mine = shares[position], distributed.part(chunk)
            part = _Part(self._streams[position], mine, share, random_state(self._device))
            loss, self._streams[position] = self._evaluate(part, leaves)
            gradient = gradient_of(loss.total, leaves, keep_graph)
            torch._foreach_add_(total, [g.detach() for g in gradient], alpha=share)
            parts.append(part)
            if keep_graph:
                graphs.append(gradient)
            for name, value in {"": loss.total.detach(), **loss.terms}.items():
                sums[name] = sums.get(name, 0.0) + share * float(value)
        self._parts.append(parts if self._for_return else [])
        if keep_graph:
            self._graphs[step], self._leaves[step] = graphs, leaves
        told = torch.tensor(list(sums.values()), dtype=torch.float64)
        distributed.mean_([*total, told])
        terms = dict(zip(sums, told.tolist(), strict=True))
        self.losses.append(terms.pop(""))
        self.terms.append(terms)
        return dict(zip(leaves, total, strict=True))

    def advance(self, batches: Sequence[Batch]) -> None:
        """Take one SGD step per batch."""
        for step, batch in enumerate(batches):
            gradient = list(self.gradient(batch, step >= len(batches) - self._graphs_kept).values())
            if self._velocity is None or self._momentum == 0:
                self._velocity = gradient
            else:
                torch._foreach_mul_(self._velocity, self._momentum)
                torch._foreach_add_(self._velocity, gradient)
            moved = torch._foreach_add(list(self.weights[-1].values()), self._velocity, alpha=-self._lr)
            if not self._for_return:
                del self.weights[1:]
            self.weights.append(dict(zip(self.weights[0], moved, strict=True)))

    def norms(self, batch: Batch) -> dict[str, float]:
        """Euclidean norm of the gradient of each summand of the loss (`Loss.parts`) on `batch` at the last weights.

        As `gradient` would evaluate it, but nothing moves on.
        """
        leaves = {name: w.detach().requires_grad_() for name, w in self.weights[-1].items()}
        sums: dict[str, list[Tensor]] = {}
        for position, chunk in enumerate(_chunks(batch_laid_out(batch, self._model), self._micro_batch)):
            state = self._streams[position] if position < len(self._streams) else self._loss
            share = len(chunk.labels) / len(batch.labels)
            part = _Part(state, distributed.part(chunk), share, random_state(self._device))
            for name, term in self._evaluate(part, leaves)[0].parts.items():
                total = sums.setdefault(name, [torch.zeros_like(w) for w in leaves.values()])
                if term.requires_grad:
                    found = torch.autograd.grad(term, list(leaves.values()), retain_graph=True, materialize_grads=True)
                    torch._foreach_add_(total, found, alpha=share)
        return {name: _norm(total) for name, total in sums.items()}

    def hessian_vector(self, step: int, vector: list[Tensor]) -> list[Tensor]:
        """H_k(θ_k) · vector for step k, one micro-batch's graph at a time."""
        total = [torch.zeros_like(v) for v in vector]
        leaves = self._leaves.pop(step, None)
        kept = self._graphs.pop(step, None)
        if leaves is None:
            leaves = {name: w.detach().requires_grad_() for name, w in self.weights[step].items()}
        for position, part in enumerate(self._parts[step]):
            if kept is not None:
                gradient, kept[position] = kept[position], []
            else:
                gradient = gradient_of(self._evaluate(part, leaves)[0].total, leaves, create_graph=True)
            product = contract(gradient, vector, leaves)
            del gradient
            torch._foreach_add_(total, product, alpha=part.weight)
        distributed.mean_(total)
        return total

    def back(self, outer: Vector, *, detach_first_step: bool = False) -> Vector:
        """∂L_i/∂θ₀ from `outer` = ∂L_i/∂θ_i, by the recursion of the module's docstring."""
        names = list(outer)
        adjoint = [tensor.clone() for tensor in outer.values()]
        velocity = [torch.zeros_like(tensor) for tensor in adjoint]
        for step in reversed(range(len(self.weights) - 1)):
            torch._foreach_add_(velocity, adjoint, alpha=-self._lr)
            if not (step == 0 and detach_first_step):
                torch._foreach_add_(adjoint, self.hessian_vector(step, velocity))
            torch._foreach_mul_(velocity, self._momentum)
            self.weights.pop()
        return dict(zip(names, adjoint, strict=True))


def _refuse_broken(gradient: list[Tensor]) -> None:
    """Find functions that may be differentiated once only: autograd, asked for some inputs, passes over them."""
    seen: set[object] = set()
    waiting = [g.grad_fn for g in gradient]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("::Error"):
            raise _not_differentiable(RuntimeError("a function is marked with @once_differentiable"))
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)


def contract(gradient: list[Tensor], vector: list[Tensor], leaves: Vector) -> list[Tensor]:
    """H · vector from a `gradient_of` with its graph. MetaGradientError: not differentiable twice."""
    live = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
    if not live:
        return [torch.zeros_like(v) for v in vector]
    outputs, vectors = [g for g, _ in live], [v for _, v in live]
    _refuse_broken(outputs)
    try:
        return list(torch.autograd.grad(outputs, list(leaves.values()), vectors, materialize_grads=True))
    except RuntimeError as error:
        raise _not_differentiable(error) from error


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


def wide(tensor: Tensor) -> Tensor:
    """At least single precision: a saliency is a product of small numbers, which half precision would round to 0."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def draw(batches: Iterable[Batch], count: int, who: str, device: torch.device) -> list[Batch]:
    """The first `count` batches, on `device`. MetaGradientError says how many are needed when there are fewer."""
    drawn = [to_device(batch, device) for batch in itertools.islice(batches, count)]
    if not drawn:
        raise MetaGradientError(f"{who} needs {count} batches, the data gave none.")
    if len(drawn) < count:
        raise MetaGradientError(
            f"{who} needs {count} batches, the data gave {len(drawn)}. Use a smaller prune.batch_size, fewer "
            "steps, or restart=True (begin the data again when they are used up)."
        )
    return drawn


def normalised(saliency: Vector) -> Scores:
    """|saliency| / Σ |saliency| over all weights, the sum in float64. Changes no ranking."""
    scores = {name: tensor.detach().abs() for name, tensor in saliency.items()}
    total = sum(float(score.sum(dtype=torch.float64)) for score in scores.values())
    return {name: score / total for name, score in scores.items()} if 0 < total < math.inf else scores


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


def _norm(gradient: list[Tensor]) -> float:
    distributed.mean_(gradient)
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.double()) for g in gradient])))
