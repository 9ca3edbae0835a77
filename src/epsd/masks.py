"""Masks over prunable weights: the mask is a value, checked on creation, that knows its sparsity and saves itself."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from epsd.types import EpsdError, Scores

Scope = Literal["global", "layer"]
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_FORMAT = "epsd-mask-1"


class MaskError(EpsdError):
    """Scores or a mask that do not fit: not finite, all zero, other names or shapes than the model's."""


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that pruning may remove, by parameter name, in registration order.

    Every convolution and `nn.Linear` weight, first layer, shortcuts and classifier included, and the fused projections
    of `nn.MultiheadAttention`; never a bias or a normalisation parameter (the convention of the ProsPr, SNIP, GraSP
    and SynFlow code). A weight that is frozen (`requires_grad` False) is not prunable, nor one that is computed from
    others (`hidden`). A tied weight appears once.
    """
    wanted: set[int] = set()
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear):
            wanted.add(id(module._parameters.get("weight")))
        elif isinstance(module, nn.MultiheadAttention):
            wanted.update(id(getattr(module, name)) for name in _ATTENTION)
    return {name: p for name, p in model.named_parameters() if id(p) in wanted and p.requires_grad}


def hidden(model: nn.Module) -> list[str]:
    """Layers whose weight is no parameter: weight_norm, spectral_norm and other parametrisations compute it."""
    layers = [name for name, module in model.named_modules() if isinstance(module, _ConvNd | nn.Linear)]
    return [name for name in layers if model.get_submodule(name)._parameters.get("weight") is None]


def check_fits(sizes: Mapping[str, int], sparsity: float, scope: Scope) -> None:
    """Whether weights of these sizes by layer can be pruned so, told before anything is scored.

    Raises MaskError: nothing to prune; `sparsity` outside [0, 1); fewer weights left than layers; an unknown `scope`.
    """
    if not sizes:
        raise MaskError("no prunable weight: the model has no trainable Conv or Linear weight.")
    if not 0 <= sparsity < 1:
        raise MaskError(f"sparsity: {sparsity} is outside [0, 1).")
    if scope not in get_args(Scope):
        raise MaskError(f"scope: unknown '{scope}'. Valid: {', '.join(get_args(Scope))}.")
    for names in [list(sizes)] if scope == "global" else [[name] for name in sizes]:
        total = sum(sizes[name] for name in names)
        if (kept := _kept(total, sparsity)) < len(names):
            told = ", ".join(names) if len(names) < 4 else f"{len(names)} layers"
            raise MaskError(
                f"prune.sparsity {sparsity} leaves {kept} of {total} weights for {told}: "
                f"fewer weights than layers. At most {1 - len(names) / total:.6g} works here."
            )


def _kept(total: int, sparsity: float) -> int:
    return total - round(sparsity * total)


def _select(scores: Tensor, kept: int) -> Tensor:
    """True for the `kept` highest of a flat score vector; among equal scores at the cut the earlier position stays."""
    if kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = torch.kthvalue(scores, scores.numel() - kept + 1).values
    keep = scores > cut
    ties = torch.nonzero(scores == cut).flatten()
    keep[ties[: kept - int(keep.sum())]] = True
    return keep


def _flat(scores: Scores) -> Tensor:
    return torch.cat([score.detach().flatten() for score in scores.values()])


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pieces = torch.split(flat, [tensor.numel() for tensor in like.values()])
    return {name: piece.view(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


def _check(scores: Scores, sparsity: float) -> None:
    for name, score in scores.items():
        if (
            not torch.isfinite(score.sum()) and not torch.isfinite(score).all()
        ):  # the sum is one pass, and rarely infinite
            bad = int((~torch.isfinite(score)).sum())
            raise MaskError(
                f"scores of '{name}': {bad} of {score.numel()} are NaN or infinite. "
                "A smaller prune.score.lr, fewer steps or a normalised input usually helps."
            )
    if sparsity > 0 and all(not score.any() for score in scores.values()):
        raise MaskError(
            "every score is zero: the loss does not depend on any prunable weight, so nothing can be ranked."
        )


def _revive(flat: Tensor, keep: Tensor, sizes: list[int]) -> Tensor:
    """Give every dead layer its best weight, and take as many of the lowest from layers that can spare one."""
    start = 0
    protected = torch.zeros_like(keep)
    for size in sizes:
        layer = slice(start, start + size)
        kept = flat[layer].masked_fill(~keep[layer], -torch.inf) if keep[layer].any() else flat[layer]
        best = int(kept.argmax())
        protected[start + best] = bool(kept[best] > -torch.inf)  # or an earlier mask took the whole layer
        start += size
    ranked = flat.masked_fill(protected, torch.inf)
    return _select(ranked, int(keep.sum()))


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """Which weights survive. `keep`: parameter name -> bool tensor of the parameter's shape, True = survives.

    A value: two masks are equal where the same weights of the same layers survive.
    """

    keep: dict[str, Tensor]

    def __post_init__(self) -> None:
        if not self.keep:
            raise MaskError("a mask needs at least one layer.")
        for name, keep in self.keep.items():
            if keep.dtype != torch.bool:
                raise MaskError(f"mask of '{name}': expected bool, found {keep.dtype}.")

    @classmethod
    def from_scores(
        cls,
        scores: Scores,
        sparsity: float,
        scope: Scope = "global",
        *,
        keep_at_least_one: bool = False,
        within: "Mask | None" = None,
    ) -> Self:
        """Remove exactly `round(sparsity · N)` lowest scores (N of all layers, or of each layer with scope "layer").

        Ties go by position: the earlier weight stays. `within`: what that mask removed stays removed.
        `keep_at_least_one`: no layer loses its last weight, at the same total.

        Raises
        ------
        MaskError : no scores; a score that is NaN or infinite; all scores zero; `sparsity` outside [0, 1); fewer
            weights left than layers; more than `within` left.
        """
        check_fits({name: score.numel() for name, score in scores.items()}, sparsity, scope)
        _check(scores, sparsity)
        ranked = {
            name: score if within is None else score.masked_fill(~within.keep[name].to(score.device), -torch.inf)
            for name, score in scores.items()
        }
        groups = [ranked] if scope == "global" else [{name: score} for name, score in ranked.items()]
        keep: dict[str, Tensor] = {}
        for group in groups:
            flat = _flat(group)
            kept = _kept(flat.numel(), sparsity)
            if within is not None and kept > (left := sum(int(within.keep[name].sum()) for name in group)):
                raise MaskError(
                    f"sparsity {sparsity} keeps {kept} weights, the mask within which it prunes has {left}."
                )
            chosen = _select(flat, kept)
            if keep_at_least_one:
                chosen = _revive(flat, chosen, [score.numel() for score in group.values()])
            keep.update(_split(chosen, group))
        return cls({name: tensor.cpu() for name, tensor in keep.items()})

    @classmethod
    def dense(cls, model: nn.Module) -> Self:
        """The mask that keeps everything prunable."""
        return cls({name: torch.ones(p.shape, dtype=torch.bool) for name, p in prunable(model).items()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    @property
    def total(self) -> int:
        """Prunable weights."""
        return sum(keep.numel() for keep in self.keep.values())

    @property
    def kept(self) -> int:
        """Surviving weights."""
        return sum(int(keep.sum()) for keep in self.keep.values())

    @property
    def sparsity(self) -> float:
        """Share of prunable weights removed, [0, 1]."""
        return 1 - self.kept / self.total

    def per_layer(self) -> dict[str, tuple[int, int]]:
        """Parameter name -> (kept, total)."""
        return {name: (int(keep.sum()), keep.numel()) for name, keep in self.keep.items()}

    def digest(self) -> str:
        """64 hexadecimal digits over names, shapes and what survives."""
        found = hashlib.sha256()
        for name, keep in self.keep.items():
            found.update(f"{name} {tuple(keep.shape)}".encode() + keep.cpu().numpy().tobytes())
        return found.hexdigest()

    def dead_layers(self) -> list[str]:
        """Layers that lost every weight: nothing flows through them."""
        return [name for name, (kept, _) in self.per_layer().items() if kept == 0]

    def summary(self) -> dict[str, float]:
        """Counts for the tracker: sparsity, kept, total, layers, dead_layers."""
        return {
            "sparsity": self.sparsity,
            "kept": self.kept,
            "total": self.total,
            "layers": len(self.keep),
            "dead_layers": len(self.dead_layers()),
        }

    def jaccard(self, other: "Mask") -> float:
        """Overlap |A ∩ B| / |A ∪ B| of the surviving weights of two masks of one model, [0, 1]."""
        self._same_layers(other.keep)
        other._same_layers(self.keep)
        both = sum(int((keep & other.keep[name]).sum()) for name, keep in self.keep.items())
        either = sum(int((keep | other.keep[name]).sum()) for name, keep in self.keep.items())
        return both / either if either else 1.0

    def shuffled(self, seed: int) -> "Mask":
        """The same density in every layer, other weights: the control of Frankle et al. (2021)."""
        generator = torch.Generator().manual_seed(seed)
        return Mask(
            {
                name: keep.flatten()[torch.randperm(keep.numel(), generator=generator)].view(keep.shape)
                for name, keep in self.keep.items()
            }
        )

    def renamed(self, rename: Callable[[str], str]) -> "Mask":
        """The same mask under other parameter names, as where a backbone becomes a part of a detector."""
        return Mask({rename(name): keep for name, keep in self.keep.items()})

    def restricted(self, names: Iterable[str]) -> "Mask":
        """Only the layers in `names`, as where a backbone leaves the classifier behind."""
        wanted = set(names)
        return Mask({name: keep for name, keep in self.keep.items() if name in wanted})

    def apply_(self, model: nn.Module) -> None:
        """Set the removed weights of `model` to exactly +0, in place. MaskError when names or shapes differ.

        Filled, not multiplied: a negative weight times 0 is −0, which a bit-exact file would store as a value.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._same_layers(parameters)
        with torch.no_grad():
            for name, keep in self.keep.items():
                parameters[name].masked_fill_(~keep.to(parameters[name].device), 0.0)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save_file

        save_file(
            {n: k.contiguous() for n, k in self.keep.items()},
            path,
            {"format": _FORMAT, "order": json.dumps(list(self.keep))},
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. MaskError names a file that is missing, corrupt or something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise MaskError(f"{path}: not a mask file of this project.")
                return cls({name: file.get_tensor(name) for name in json.loads(metadata["order"])})
        except FileNotFoundError:
            raise MaskError(f"{path}: no such file.") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise MaskError(f"{path}: damaged or not a mask file ({error}).") from None

    def _same_layers(self, shapes: Mapping[str, Tensor]) -> None:
        for name, keep in self.keep.items():
            if name not in shapes:
                raise MaskError(f"mask: the model has no parameter '{name}'. It has: {', '.join(list(shapes)[:8])} ...")
            if shapes[name].shape != keep.shape:
                raise MaskError(
                    f"mask of '{name}': shape {tuple(keep.shape)}, the model's is {tuple(shapes[name].shape)}."
                )


def _multiply_each(tensors: list[Tensor], factors: list[Tensor]) -> None:
    for tensor, factor in zip(tensors, factors, strict=True):
        tensor.mul_(factor)


class MaskHolder:
    """A mask bound to the parameters of one model, for a training loop.

    The gradient is masked before the optimiser sees it, so that neither momentum nor gradient clipping feels removed
    weights. SGD then leaves them at +0 by itself: their momentum stays ±0, weight decay of 0 is 0, and +0 minus ±0 is
    +0. Other optimisers, and whoever wants to be sure, mask the weights too.
    """

    def __init__(self, mask: Mask, model: nn.Module, *, foreach: bool = True) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        mask._same_layers(parameters)
        self._parameters: list[Tensor] = [parameters[name] for name in mask.keep]
        # laid out in memory as the weights are: other strides would cost a fused multiplication its speed
        self._factors = [
            torch.empty_like(p).copy_(k) for k, p in zip(mask.keep.values(), self._parameters, strict=True)
        ]
        self._multiply = torch._foreach_mul_ if foreach else _multiply_each

    @torch.no_grad()
    def gradients_(self) -> None:
        """Zero the gradients of removed weights, in place. Parameters without a gradient are passed over."""
        pairs = [(p.grad, f) for p, f in zip(self._parameters, self._factors, strict=True) if p.grad is not None]
        if pairs:
            self._multiply([g for g, _ in pairs], [f for _, f in pairs])

    @torch.no_grad()
    def weights_(self) -> None:
        """Zero the removed weights, in place. After `Mask.apply_` no −0 appears: +0 times 0 and +0 minus ±0 are +0."""
        self._multiply(self._parameters, self._factors)
