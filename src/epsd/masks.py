"""Masks over prunable weights: the mask is a value, checked on creation, that knows its sparsity and saves itself."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from epsd.files import digests
from epsd.types import EpsdError, Scores

Scope = Literal["global", "layer", "erk", "lamp"]
"""Where scores compete. global : in the whole net. layer : within each layer, all of one density. erk : within each
layer, of Erdős-Rényi-Kernel density (`erk_factor`). lamp : in the whole net, each score divided by the sum of those of
its layer that are not smaller, so that no layer is emptied (Lee et al., ICLR 2021, there for magnitudes)."""
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
ALSO = "epsd_also"
"""Attribute of a network under work: names of parameters of other layers that a user wants covered as well."""
W = TypeVar("W")


class MaskError(EpsdError):
    """Scores or a mask that do not fit: not finite, all zero, other names or shapes than the model's."""


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that inputs are multiplied by, by parameter name, in registration order.

    Every convolution and `nn.Linear` weight, first layer, shortcuts and classifier included, and the fused projections
    of `nn.MultiheadAttention`; never a bias or a normalisation parameter (the convention of the ProsPr, SNIP, GraSP
    and SynFlow code), nor a weight that is computed from others (`hidden`). A tied weight appears once.
    """
    wanted: set[int] = set()
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear):
            wanted.add(id(module._parameters.get("weight")))
        elif isinstance(module, nn.MultiheadAttention):
            wanted.update(id(getattr(module, name)) for name in _ATTENTION)
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `matrices` that pruning may remove: all that are not frozen (`requires_grad` False)."""
    wanted = getattr(model, ALSO, frozenset()) | matrices(model).keys()
    return {name: p for name, p in model.named_parameters() if name in wanted and p.requires_grad}


def hidden(model: nn.Module) -> list[str]:
    """Layers whose weight is no parameter: weight_norm, spectral_norm and other parametrisations compute it."""
    layers = [name for name, module in model.named_modules() if isinstance(module, _ConvNd | nn.Linear)]
    return [name for name in layers if model.get_submodule(name)._parameters.get("weight") is None]


def covered(
    weights: Mapping[str, W], include: str | Iterable[str] | None = None, exclude: str | Iterable[str] = ()
) -> dict[str, W]:
    """Those of `weights` (by parameter name) that a mask shall cover: all, or those in `include`, without `exclude`.

    Both name a parameter ("fc.weight"), a module and all within it ("fc", "layer4"), or several at once by `*`, `?` and
    `[...]` ("*.downsample.*"). MaskError: a name that meets no weight; nothing left.
    """
    chosen, out = (
        {name for pattern in ([given] if isinstance(given, str) else given) for name in named(weights, pattern, which)}
        for which, given in (("include", weights if include is None else include), ("exclude", exclude))
    )
    found = {name: weight for name, weight in weights.items() if name in chosen and name not in out}
    if weights and not found:
        raise MaskError("exclude: no prunable weight is left.")
    return found


def fitting(names: Iterable[str], pattern: str) -> list[str]:
    """Parameters that fit `pattern`, or that a module which fits it holds."""

    def fits(name: str) -> bool:
        parts = name.split(".")
        return any(fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))

    return [name for name in names if fits(name)]


def shortened(names: Iterable[str], most: int = 6) -> str:
    """The first of `names`, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def named(names: Iterable[str], pattern: str, which: str, kind: str = "layer") -> list[str]:
    """The same, one at least. MaskError where none fits."""
    if found := fitting(names, pattern):
        return found
    raise MaskError(f"{which}: no {kind} fits '{pattern}'. {kind.capitalize()}s: {', '.join(names)}.")


def check_fits(weights: Mapping[str, Tensor], sparsity: float, scope: Scope = "global", **options: Any) -> None:
    """Whether weights of these shapes can be pruned so, told before anything is scored. `options`: of `from_scores`.

    Raises MaskError: nothing to prune; `sparsity` outside [0, 1); fewer weights left than layers; an unknown `scope`;
    densities of layers that are not there, or that do not go with `sparsity`; a cap below 1.
    """
    _budgets({name: weight.shape for name, weight in weights.items()}, sparsity, scope, **options)


def erk_factor(shape: torch.Size) -> float:
    """To what a layer's density is proportional, up to 1: (n_in + n_out + k_h + k_w) / (n_in · n_out · k_h · k_w).

    Erdős-Rényi-Kernel: Mocanu et al. 2018 (without the kernel), Evci et al. 2020.
    """
    return sum(shape) / math.prod(shape)


def erk_ranked(shape: torch.Size) -> Tensor:
    """Scores (N,) in float64, descending, of which a share min(1, f/τ) lies above any τ; f the layer's `erk_factor`."""
    size = shape.numel()
    return erk_factor(shape) / ((torch.arange(size).double() + 0.5) / size)


class _Budget(NamedTuple):
    """Layers whose weights compete with each other, and how many of theirs stay."""

    names: list[str]
    kept: int


def _budgets(
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    scope: Scope,
    *,
    keep_at_least_one: bool = False,
    densities: Mapping[str, float] | None = None,
    channel_cap: float | None = None,
    progress: float = 1.0,
) -> list[_Budget]:
    """Of all layers, `progress` of the way there. Raises what `check_fits` says."""
    if not shapes:
        raise MaskError("no prunable weight: the model has no trainable Conv or Linear weight.")
    if not 0 <= sparsity < 1:
        raise MaskError(f"sparsity: {sparsity} is outside [0, 1).")
    if scope not in get_args(Scope):
        raise MaskError(f"scope: unknown '{scope}'. Valid: {', '.join(get_args(Scope))}.")
    if channel_cap is not None and not channel_cap >= 1:
        raise MaskError(f"channel_cap: {channel_cap} is below 1, the even share.")
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    given = _given(sizes, sparsity, densities or {})
    rest = {name: shape for name, shape in shapes.items() if name not in given}
    free = sum(sizes[name] for name in rest)
    left = _kept(sum(sizes.values()), sparsity) - sum(given.values())
    if left > free:
        raise MaskError(f"densities: with prune.sparsity {sparsity} the other layers keep {left} of {free} weights.")
    share = 1 - left / free if given and free else sparsity
    _check_room(sizes, rest, left, sparsity, share, scope)
    target = share if progress == 1 else 1 - (1 - share) ** progress
    kept = left if progress == 1 else _kept(free, target)
    found = [
        _Budget([n], k if progress == 1 else _kept(sizes[n], 1 - (k / sizes[n]) ** progress)) for n, k in given.items()
    ]
    if scope == "layer":
        return found + [_Budget([name], _kept(sizes[name], target)) for name in rest]
    if scope == "erk":
        return found + [_Budget([name], count) for name, count in _erk(rest, kept, keep_at_least_one).items()]
    return [*found, _Budget(list(rest), kept)] if rest else found


def _given(sizes: Mapping[str, int], sparsity: float, densities: Mapping[str, float]) -> dict[str, int]:
    """Weights that stay in each layer whose density is given; of several patterns that fit a layer the first counts."""
    found: dict[str, int] = {}
    for pattern, density in densities.items():
        if not 0 < density <= 1:
            raise MaskError(f"densities: {density} of '{pattern}' is outside (0, 1].")
        for name in named(sizes, pattern, "densities"):
            found.setdefault(name, max(1, round(density * sizes[name])))
    over = sum(found.values()) - _kept(sum(sizes.values()), sparsity)
    if len(found) == len(sizes) and abs(over) <= len(sizes):  # they were rounded each by itself
        found[max(found, key=lambda name: sizes[name])] -= over
    elif over > 0 or len(found) == len(sizes):
        raise MaskError(
            f"densities: they keep {sum(found.values())} weights, prune.sparsity {sparsity} keeps "
            f"{sum(found.values()) - over} of {sum(sizes.values())} in all."
        )
    return found


def _check_room(
    sizes: Mapping[str, int], rest: Iterable[str], left: int, sparsity: float, share: float, scope: Scope
) -> None:
    """Every layer could keep a weight."""
    rest = list(rest)
    for names in [[name] for name in rest] if scope == "layer" else [rest]:
        total = sum(sizes[name] for name in names)
        if (kept := _kept(total, share) if scope == "layer" else left) < len(names):
            told = ", ".join(names) if len(names) < 4 else f"{len(names)} layers"
            given = "" if len(rest) < len(sizes) else f" At most {1 - len(names) / total:.6g} works here."
            raise MaskError(
                f"prune.sparsity {sparsity} leaves {kept} of {total} weights for {told}: "
                f"fewer weights than layers.{given}"
            )


def _erk(shapes: Mapping[str, torch.Size], kept: int, keep_at_least_one: bool) -> dict[str, int]:
    """How many weights of each layer `Random(distribution="erk")` keeps of `kept` in all."""
    ranked = torch.cat([erk_ranked(shape) for shape in shapes.values()])
    chosen, sizes = highest(ranked, kept), [shape.numel() for shape in shapes.values()]
    if keep_at_least_one:
        chosen = _revive(ranked, chosen, sizes)
    return {name: int(part.sum()) for name, part in zip(shapes, torch.split(chosen, sizes), strict=True)}


def _kept(total: int, sparsity: float) -> int:
    return total - round(sparsity * total)


def _competing(score: Tensor, alive: Tensor | None, scope: Scope, channel_cap: float | None) -> Tensor:
    """A layer's scores as they compete; what is not `alive` is at −∞."""
    score = score.detach() if alive is None else score.masked_fill(~alive.to(score.device), -torch.inf)
    score = score if channel_cap is None else _capped(score, channel_cap)
    return _lamp(score) if scope == "lamp" else score


def _lamp(score: Tensor) -> Tensor:
    """Positive scores over the sum of the layer's that are not smaller; among equal ones the earlier is first."""
    flat = score.flatten().double()
    order = flat.argsort(descending=True, stable=True)
    gains = flat[order].clamp(min=0)
    relative = torch.where(gains > 0, gains / gains.cumsum(0), flat[order])
    return torch.empty_like(flat).scatter_(0, order, relative).view(score.shape)


def _capped(score: Tensor, cap: float) -> Tensor:
    """Positive scores, scaled channel by channel so that none has more than `cap` times its even share of the layer's
    sum, which stays. Channels are the outputs (first axis); one without a positive score does not count.
    """
    gains = score.clamp(min=0).double()
    mass = gains.flatten(1).sum(1) if score.dim() > 1 else gains
    limit = _limit(mass[mass > 0], cap)
    scale = torch.where(mass > limit, limit / mass, 1.0)
    scale = scale * (mass.sum() / (scale * mass).sum()) if limit > 0 else scale
    return torch.where(score > 0, gains * scale.view(-1, *[1] * (score.dim() - 1)), score)


def _limit(mass: Tensor, cap: float) -> float:
    """t with t = cap · mean(min(mass, t)): the most that a channel may have of what is left; ∞ where all have less."""
    ordered = mass.sort(descending=True).values.tolist()
    count, below = len(ordered), math.fsum(ordered)
    for clipped, largest in enumerate(ordered):
        limit = cap * below / (count - cap * clipped) if count > cap * clipped else math.inf
        if largest <= limit:
            return limit if clipped else math.inf
        below -= largest
    return ordered[-1] if ordered else math.inf


def highest(scores: Tensor, kept: int) -> Tensor:
    """True for the `kept` highest of a flat score vector; among equal scores at the cut the earlier position stays."""
    if kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = torch.kthvalue(scores, scores.numel() - kept + 1).values
    keep = scores > cut
    ties = torch.nonzero(scores == cut).flatten()
    keep[ties[: kept - int(keep.sum())]] = True
    return keep


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pieces = torch.split(flat, [tensor.numel() for tensor in like.values()])
    return {name: piece.view(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


def _check(scores: Scores, sparsity: float) -> None:
    for name, score in scores.items():
        # the sum is one pass, and rarely infinite
        if bad := 0 if torch.isfinite(score.sum()) else int((~torch.isfinite(score)).sum()):
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
    return highest(ranked, int(keep.sum()))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
        densities: Mapping[str, float] | None = None,
        channel_cap: float | None = None,
        within: "Mask | None" = None,
        progress: float = 1.0,
    ) -> Self:
        """Remove exactly `round(sparsity · N)` lowest scores (N of all layers, or of each layer with scope "layer").

        Ties go by position: the earlier weight stays.

        scope : where scores compete, see `Scope`.
        keep_at_least_one : no layer loses its last weight, at the same total.
        densities : layer, or pattern such as "layer3.*" -> (0, 1], the share of its weights that stays, whatever the
            scope; the other layers share what is left of the total.
        channel_cap : [1, ...), times its even share of a layer's summed scores that one output channel may have:
            the scores of channels with more are scaled down to it before anything competes, the layer's sum stays.
            1: all channels alike. The ranking within a channel never changes.
        within : what that mask removed stays removed.
        progress : (0, 1] of the way from dense on an exponential schedule, on which density d is at d^progress.

        Raises
        ------
        MaskError : no scores; a score that is NaN or infinite; all scores zero; more than `within` left; and what
            `check_fits` names.
        """
        options: dict[str, Any] = {"keep_at_least_one": keep_at_least_one, "densities": densities, "progress": progress}
        shapes = {name: score.shape for name, score in scores.items()}
        budgets = _budgets(shapes, sparsity, scope, channel_cap=channel_cap, **options)
        _check(scores, sparsity)
        ranked = {
            name: _competing(score, None if within is None else within.keep[name], scope, channel_cap)
            for name, score in scores.items()
        }
        keep: dict[str, Tensor] = {}
        for names, kept in budgets:
            group = {name: ranked[name] for name in names}
            flat = torch.cat([score.detach().flatten() for score in group.values()])
            if within is not None and kept > (left := sum(int(within.keep[name].sum()) for name in group)):
                raise MaskError(
                    f"sparsity {sparsity} keeps {kept} weights, the mask within which it prunes has {left}."
                )
            chosen = highest(flat, kept)
            if keep_at_least_one:
                chosen = _revive(flat, chosen, [score.numel() for score in group.values()])
            keep.update(_split(chosen, group))
        return cls({name: keep[name].cpu() for name in scores})

    @classmethod
    def dense(cls, model: nn.Module, exclude: str | Iterable[str] = ()) -> Self:
        """The mask that keeps everything prunable; it covers no layer of `exclude`."""
        weights = covered(prunable(model), exclude=exclude)
        return cls({name: torch.ones(p.shape, dtype=torch.bool) for name, p in weights.items()})

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str] | None = None) -> Self:
        """What is zero was removed. `names`: of parameters (else MaskError); None: all that is prunable."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        wanted = list(prunable(model) if names is None else names)
        if missing := [name for name in wanted if name not in parameters]:
            raise MaskError(f"mask: the model has no parameter '{missing[0]}'.")
        return cls({name: parameters[name].detach().cpu() != 0 for name in wanted})

    def __repr__(self) -> str:
        layers = f"{len(self.keep)} layer{'s' if len(self.keep) > 1 else ''}"
        return f"Mask: {self.kept:,} of {self.total:,} weights kept in {layers}, sparsity {self.sparsity:.4f}"

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
        counts = {"kept": self.kept, "total": self.total, "layers": len(self.keep)}
        return {"sparsity": self.sparsity, **counts, "dead_layers": len(self.dead_layers())}

    def jaccard(self, other: "Mask") -> float:
        """Overlap |A ∩ B| / |A ∪ B| of the surviving weights of two masks of one model, [0, 1]."""
        self.check_layers(other.keep)
        other.check_layers(self.keep)
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

    def check(self, model: nn.Module) -> None:
        """Raises MaskError where the model has no such parameter, or one of another shape."""
        self.check_layers(dict(model.named_parameters(remove_duplicate=False)))

    def apply_(self, model: nn.Module) -> None:
        """Set the removed weights of `model` to exactly +0, in place. MaskError when names or shapes differ.

        Filled, not multiplied: a negative weight times 0 is −0, which a bit-exact file would store as a value.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.check_layers(parameters)
        with torch.no_grad():
            for name, keep in self.keep.items():
                parameters[name].masked_fill_(~keep.to(parameters[name].device), 0.0)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a digest, the same bytes for the same mask."""
        keep = {name: keep.contiguous() for name, keep in self.keep.items()}
        digests.save_tensors(Path(path), "mask", keep, {"order": list(keep)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. DamagedFile or MaskError names a file that is missing, damaged, or no such mask."""
        keep, about = digests.load_tensors(Path(path), "mask")
        try:
            mask = cls({name: keep[name] for name in about["order"]})
        except (MaskError, LookupError, TypeError) as error:
            raise MaskError(f"{path}: {error}") from None
        if not mask.kept:
            raise MaskError(f"{path}: it keeps no weight at all.")
        return mask

    def check_layers(self, shapes: Mapping[str, Tensor]) -> None:
        """Raises MaskError where one of the mask's layers is not in `shapes`, or of another shape there."""
        for name, keep in self.keep.items():
            if name not in shapes:
                raise MaskError(f"mask: the model has no parameter '{name}'. It has: {', '.join(list(shapes)[:8])} ...")
            if shapes[name].shape != keep.shape:
                raise MaskError(
                    f"mask of '{name}': shape {tuple(keep.shape)}, the model's is {tuple(shapes[name].shape)}."
                )
