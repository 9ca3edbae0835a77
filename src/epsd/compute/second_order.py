"""Layers whose second derivative costs what its arithmetic costs.

A Hessian-vector product differentiates a backward pass. Torch's own derivative of a convolution's backward pass runs
convolutions whose kernels are as large as the images, and its derivative of batch normalisation is some forty passes
over the activations. Here both are written out with the kernels of the first backward pass: for a convolution
y = x ∗ W whose backward pass gave (gx, gW) from gy, and adjoints a of gx and v of gW,

    adjoint of gy = a ∗ W + x ∗ v,     of x: the input gradient of (gy, v),     of W: the weight gradient of (gy, a),

six times the forward pass's products for one Hessian-vector product: two plain training steps. The values are torch's,
to rounding. A third derivative is refused where it would be wrong.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from epsd.compute import distributed
from epsd.compute.devices import pick_memory_format

_OPS: Any = torch.ops.aten
Pair = int | tuple[int, ...] | list[int] | str


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.bias = geometry, None if bias is None else list(bias.shape)
        return _OPS.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        return *_ConvolutionBack.apply(*gradients, x, weight, ctx.geometry, ctx.bias, wanted), None


class _ConvolutionBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gy: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: tuple[Any, ...],
        bias: list[int] | None,
        wanted: list[bool],
    ) -> Any:
        ctx.save_for_backward(gy, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _OPS.convolution_backward(gy, x, weight, bias, *geometry, wanted)

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> Any:
        gy, x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = adjoints
        for_gy = for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_gy = _adjoint_of_gradient(ctx.geometry, ((of_x, weight), (x, of_weight)), of_bias, gy)
        if ctx.needs_input_grad[1] and of_weight is not None:
            for_x = _OPS.convolution_backward(gy, x, of_weight, None, *ctx.geometry, [True, False, False])[0]
        if ctx.needs_input_grad[2] and of_x is not None:
            for_weight = _OPS.convolution_backward(gy, of_x, weight, None, *ctx.geometry, [False, True, False])[1]
        return for_gy, for_x, for_weight, None, None, None


def _adjoint_of_gradient(
    geometry: tuple[Any, ...],
    products: tuple[tuple[Tensor | None, Tensor | None], ...],
    of_bias: Tensor | None,
    like: Tensor,
) -> Tensor | None:
    """Σ x ∗ W over the pairs that are there, plus the bias."""
    total: Tensor | None = None
    for x, weight in products:
        if x is None or weight is None:
            continue
        product = _OPS.convolution(x, weight, of_bias if total is None else None, *geometry)
        total = product if total is None else total.add_(product)
    if total is None and of_bias is not None:
        return of_bias.view(1, -1, 1, 1).expand_as(like)
    return total


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        joint: bool,
    ) -> Any:
        """`joint`: by the statistics of the slices of all processes, which need not be of one length."""
        if joint:
            mean, variance, ctx.count = _joint_moments(x)
            _move(running, (mean, variance * (ctx.count / (ctx.count - 1).clamp(min=1))), momentum)
            y = _OPS.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
            scale = torch.rsqrt(variance + eps)
        else:
            y, mean, scale = _OPS.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
            ctx.count = None
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        result = _BatchNormBack.apply(*gradients, *ctx.saved_tensors, ctx.eps, ctx.count)
        return *result, None, None, None, None


class _BatchNormBack(torch.autograd.Function):
    """With n values per channel, x̂ = s(x − μ), s = 1/√(σ² + ε): gx = γs(gy − mean gy − x̂ mean(gy x̂)), gγ = Σ gy x̂.

    The adjoints (a, b, c) of (gx, gγ, gβ) give, with A = Σ a x̂, P = Σ gy x̂, Q = Σ a·gy − Σa Σgy/n − AP/n:
    of gy: γs(a − mean a − x̂A/n) + b x̂ + c;  of γ: sQ;  of x: s(h − mean h − x̂ mean(h x̂)) − γQs² x̂/n, where
    h = −(γsP/n) a + (b − γsA/n) gy is the adjoint of x̂.

    Where several processes hold slices of the batch (`count`: n of all of them), sums go over all slices, except that
    gγ, gβ and the adjoint of γ are this slice's part: what belongs to parameters is added up at the end, with the
    rest of their gradients. It is then assumed that b and c are the same everywhere, as a vector to be multiplied
    with the Hessian is.
    """

    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float, count: Tensor | None
    ) -> Any:
        back = _normalisation_back(gy, x, weight, mean, scale, eps, count)
        ctx.save_for_backward(gy, x, weight, mean, scale, *back.sums)
        ctx.eps, ctx.count = eps, count
        return back.gradient, *back.own

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor) -> Any:
        if torch.is_grad_enabled():  # the sums below are saved as numbers
            raise RuntimeError("batch normalisation inside a score is differentiable twice, not three times")
        a, b, c = adjoints
        gy, x, weight, mean, s, P, sum_gy = ctx.saved_tensors
        n = x.numel() // x.shape[1] if ctx.count is None else ctx.count
        for_gy, own, (A, sum_a) = _normalisation_back(a, x, weight, mean, s, ctx.eps, ctx.count)
        own_Q = _dot(a, gy, weight) - own[1] * sum_gy / n - own[0] * P / n
        Q = own_Q if ctx.count is None else _added(own_Q)
        of_a, of_gy = -weight * s * P / n, b - weight * s * A / n
        mean_h, mean_hx = (of_a * sum_a + of_gy * sum_gy) / n, (of_a * A + of_gy * P) / n
        of_x = -(s * mean_hx + weight * Q * s * s / n) * s
        _add_scaled(for_gy, x, b * s, c - b * s * mean)
        for_x = a * _per_channel(s * of_a, a)
        _add_scaled(for_x, gy, s * of_gy)
        _add_scaled(for_x, x, of_x, -s * mean_h - of_x * mean)
        return for_gy, for_x, s * own_Q, None, None, None, None


class _Back(NamedTuple):
    """`gradient`: γs(gy − mean gy − x̂ mean(gy x̂)).  `own`: Σ gy x̂ and Σ gy of this slice.  `sums`: of all slices."""

    gradient: Tensor
    own: tuple[Tensor, Tensor]
    sums: tuple[Tensor, Tensor]


def _normalisation_back(
    gy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float, count: Tensor | None
) -> _Back:
    """One kernel where the batch is here as a whole, else one for this slice and one message about the sums."""
    if count is None:
        kernel = _OPS.native_batch_norm_backward(gy, x, weight, None, None, mean, scale, True, eps, [True] * 3)
        return _Back(kernel[0], (kernel[1], kernel[2]), (kernel[1], kernel[2]))
    variance = scale.square().reciprocal() - eps
    given = (mean, variance, mean, scale, False, eps, [True] * 3)  # as constants, so that only γs·gy comes back
    gradient, P, sum_gy = _OPS.native_batch_norm_backward(gy, x, weight, *given)
    total_P, total_gy = _added(torch.stack([P, sum_gy]))
    of_x = -weight * scale * scale * total_P / count
    _add_scaled(gradient, x, of_x, -weight * scale * total_gy / count - of_x * mean)
    return _Back(gradient, (P, sum_gy), (total_P, total_gy))


def _added(tensor: Tensor) -> Tensor:
    """Sum over the processes."""
    total = tensor.clone()
    distributed.sum_([total])
    return total


def _joint_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (biased) variance (C,) over the slices of all processes, and how many values per channel there are.

    By the moments of each slice about its own mean, so that nothing cancels.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    dims = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(wide, dims, correction=0)
    number = mean.new_tensor([x.numel() // x.shape[1]])
    told = distributed.gather(torch.cat([number, mean, variance])[None])
    counts, means, variances = torch.split(told, [1, len(mean), len(mean)], dim=1)
    shares = counts / counts.sum()
    joint = (shares * means).sum(0)
    return joint, (shares * (variances + (means - joint).square())).sum(0), counts.sum()


@torch.no_grad()
def _move(running: tuple[Tensor | None, Tensor | None], towards: tuple[Tensor, Tensor], momentum: float) -> None:
    for old, new in zip(running, towards, strict=True):
        if old is not None:
            old.lerp_(new.to(old.dtype), momentum)


def _dot(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Σ a·b of each channel: what the kernel calls Σ gy x̂ when nothing is subtracted or scaled. (C,)."""
    nothing, one = torch.zeros_like(like), torch.ones_like(like)
    wanted = [False, True, False]
    result: Tensor = _OPS.native_batch_norm_backward(a, b, like, None, None, nothing, one, True, 0.0, wanted)[1]
    return result


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def _add_scaled(total: Tensor, x: Tensor, factor: Tensor, constant: Tensor | None = None) -> None:
    """total += factor · x + constant, `factor` and `constant` (C,)."""
    total.addcmul_(x, _per_channel(factor, x))
    if constant is not None:
        total.add_(_per_channel(constant, total))


def _pair(value: Pair) -> list[int]:
    assert not isinstance(value, str)
    return [value, value] if isinstance(value, int) else [*value] * (2 // len(value))


def _lowered(*tensors: Tensor | None) -> list[Tensor | None]:
    """In the precision that autocast asks for, where it is on: a convolution called by name is not cast by it."""
    first = tensors[0]
    assert first is not None
    device = first.device.type
    if not torch.is_autocast_enabled(device) or first.dtype == torch.float64:
        return list(tensors)
    lower = torch.get_autocast_dtype(device)
    return [None if t is None else t.to(lower) for t in tensors]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` with a cheap second derivative. `input` (B, C, H, W)."""
    if input.dim() != 4 or isinstance(padding, str):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
    geometry = (_pair(stride), _pair(padding), _pair(dilation), False, [0, 0], groups)
    result: Tensor = _Convolution.apply(*_lowered(input, weight, bias), geometry)
    return result


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    joint: bool = False,
) -> Tensor:
    """`torch.nn.functional.batch_norm` with a cheap second derivative where it normalises by the batch itself; `joint`:
    by the statistics of the slices of all processes.
    """
    if joint and training:
        like = input.new_empty(0, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)
        weight = like.new_ones(input.shape[1]) if weight is None else weight
        bias = like.new_zeros(input.shape[1]) if bias is None else bias
    elif not training or weight is None or bias is None or input.numel() == input.shape[1]:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    result: Tensor = _BatchNorm.apply(input, weight, bias, (running_mean, running_var), momentum, eps, joint)
    return result


def _hard_sigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    result = F.relu6(x + 3) / 6
    return x.copy_(result) if inplace else result


def _hard_swish(x: Tensor, inplace: bool = False) -> Tensor:
    given = x.clone() if inplace else x  # which the product below needs again on the way back
    result = given * F.relu6(given + 3) / 6
    return x.copy_(result) if inplace else result


def _view(x: Tensor, *shape: Any, **named: Any) -> Tensor:
    """A net that flattens its features by `view` works in every memory format, there on a copy."""
    try:
        return x.view(*shape, **named)
    except RuntimeError:
        return x.reshape(*shape, *named.values())


class Instead(TorchFunctionMode):
    """While entered, some functions run in another form."""

    INSTEAD: ClassVar[dict[Any, Callable[..., Tensor]]]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.INSTEAD.get(func, func)(*args, **(kwargs or {}))


class TwiceDifferentiable(Instead):
    """While entered, layers run in the form whose second derivative exists and is cheap.

    Hard activations (MobileNetV3) by their definition: their kernels have no second derivative. Convolutions and batch
    normalisation as above.
    """

    INSTEAD: ClassVar[dict[Any, Any]] = {
        F.hardsigmoid: _hard_sigmoid,
        F.hardswish: _hard_swish,
        F.conv2d: conv2d,
        F.batch_norm: batch_norm,
        Tensor.view: _view,
    }


def weights_laid_out(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every parameter, detached, as `dtype`; those that are convolved with in the memory format of `laid_out`."""
    kernels = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }
    found = {name: p.detach().to(dtype or p.dtype) for name, p in model.named_parameters()}
    return {name: laid_out(weight, model) if name in kernels else weight for name, weight in found.items()}


def laid_out(tensor: Tensor, model: nn.Module) -> Tensor:
    """Images for `model`, or a kernel of it, in the memory format in which their device convolves fastest."""
    if tensor.dim() != 4 or tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
        return tensor
    # not `contiguous`: that leaves the strides of a 1x1 kernel, which is contiguous in both formats, as they are
    return tensor.to(memory_format=pick_memory_format("auto", model, tensor.device))
