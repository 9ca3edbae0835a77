"""SGD steps on copies of a network's weights, and the way back through them: gradients and Hessian-vector products."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from epsd.compute import distributed
from epsd.compute.random_state import RandomState, random_state, set_random_state
from epsd.compute.second_order import laid_out, weights_laid_out
from epsd.losses import no_such_class
from epsd.pruning.scoring import LossFunction, MetaGradientError, Vector, calling
from epsd.types import Batch, Loss


class _Part(NamedTuple):
    """One micro-batch of a step, and what is needed to evaluate it again."""

    loss: LossFunction
    batch: Batch
    weight: float
    random_state: RandomState


def _chunks(batch: Batch, micro_batch: int | None) -> list[Batch]:
    size = len(batch.labels)
    step = min(micro_batch or size, size)
    return [batch.part(slice(start, start + step)) for start in range(0, size, step)]


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
    signs = ("does not require grad", "not implemented", "once_differentiable")
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
        """∂L_i/∂θ₀ from `outer` = ∂L_i/∂θ_i, by the recursion of `epsd.pruning.metagradients`."""
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


def _norm(gradient: list[Tensor]) -> float:
    distributed.mean_(gradient)
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.double()) for g in gradient])))
