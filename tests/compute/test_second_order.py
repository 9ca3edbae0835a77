"""The layers with a cheap second derivative against finite differences and against torch's own."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from epsd.compute.second_order import TwiceDifferentiable, batch_norm, conv2d, laid_out, weights_laid_out
from toys import convnet


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def product(loss: Callable[[], Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Hessian times ones."""
    gradient = torch.autograd.grad(loss(), weights, create_graph=True)
    return list(torch.autograd.grad(gradient, weights, [torch.ones_like(w) for w in weights], materialize_grads=True))


GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": 2},
    {"padding": 1, "groups": 2},
]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_equals_finite_differences(geometry: dict[str, object], biased: bool) -> None:
    torch.manual_seed(0)
    inputs = numbers(2, 4, 6, 5), numbers(6, 4 // geometry.get("groups", 1), 3, 2), numbers(6) if biased else None
    assert torch.equal(conv2d(*inputs, **geometry), F.conv2d(*inputs, **geometry))

    def function(*arguments: Tensor) -> Tensor:
        return conv2d(*arguments, **geometry)

    given = [tensor for tensor in inputs if tensor is not None]
    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2), (2, 3, 3, 2)])
def test_batch_norm_equals_finite_differences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = numbers(*shape), numbers(3), numbers(3)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, bias, training=True)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_batch_norm_moves_the_running_statistics_as_torch_does() -> None:
    torch.manual_seed(0)
    ours, torchs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    images = torch.randn(4, 3, 5, 5)
    with TwiceDifferentiable():
        result = ours(images)
    assert torch.equal(result, torchs(images))
    for key, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("dtype", "channels_last", "tolerance"),
    [(torch.float64, False, 1e-12), (torch.float32, False, 2e-5), (torch.float32, True, 2e-5)],
)
def test_hessian_products_are_torchs(dtype: torch.dtype, channels_last: bool, tolerance: float) -> None:
    model, images = convnet(dtype=dtype), torch.randn(12, 1, 4, 4, dtype=dtype)
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), laid_out(images, model)
    labels, weights = torch.arange(12) % 3, list(model.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(model(images), labels)

    expected = product(loss, weights)
    with TwiceDifferentiable():
        ours = product(loss, weights)
    for own, reference in zip(ours, expected, strict=True):
        assert (own - reference).abs().max() <= tolerance * reference.abs().max()


def test_frozen_weights_and_a_bias_alone() -> None:
    """Only what needs a gradient gets one, whichever of image, kernel and bias that is."""
    for trained in ("0.bias", "0.weight", "3.weight", "1.bias"):
        model, images = convnet(dtype=torch.float64), torch.randn(12, 1, 4, 4, dtype=torch.float64)
        model[0].bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        model.requires_grad_(False)
        weights = [model.get_parameter(trained).requires_grad_()]

        def loss(model: nn.Module = model, images: Tensor = images) -> Tensor:
            return model(images).square().mean()

        expected = product(loss, weights)
        with TwiceDifferentiable():
            ours = product(loss, weights)
        assert torch.allclose(ours[0], expected[0], rtol=1e-9, atol=1e-14), trained


def test_forms_without_a_cheap_way_are_left_to_torch() -> None:
    torch.manual_seed(0)
    image, weight = torch.randn(3, 6, 6), torch.randn(4, 3, 3, 3)
    assert torch.equal(conv2d(image, weight), F.conv2d(image, weight))
    assert torch.equal(conv2d(image[None], weight, padding="same"), F.conv2d(image[None], weight, padding="same"))
    plain = nn.BatchNorm2d(3, affine=False)
    with TwiceDifferentiable():
        assert torch.equal(plain(image[None]), copy.deepcopy(plain)(image[None]))
        assert nn.BatchNorm2d(3).eval()(image[None]).shape == (1, 3, 6, 6)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            nn.BatchNorm1d(3)(torch.randn(1, 3))


def test_a_third_derivative_is_right_or_refused() -> None:
    def third(function: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
        first = torch.autograd.grad(function(weight).pow(4).sum(), weight, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), weight, create_graph=True)[0]
        return torch.autograd.grad(second.sum(), weight)[0]

    x, weight = numbers(2, 1, 4, 4), numbers(1, 1, 3, 3)
    ours = third(lambda w: conv2d(conv2d(x, w), w, padding=1), weight)
    assert torch.allclose(ours, third(lambda w: F.conv2d(F.conv2d(x, w), w, padding=1), weight))
    with pytest.raises(RuntimeError, match="twice, not three times"):
        third(lambda w: batch_norm(x, None, None, w, torch.zeros_like(w), training=True), numbers(1))


def test_a_net_that_flattens_by_view_runs_in_every_memory_format() -> None:
    images = laid_out(torch.randn(2, 3, 4, 4), nn.Identity())
    assert images.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view"):
        images.view(2, -1)
    with TwiceDifferentiable():
        assert torch.equal(images.view(2, -1), images.flatten(1))
        assert torch.equal(images.view((2, 48)), images.flatten(1))
        assert images.view(torch.int32).dtype == torch.int32


def test_views_share_memory_where_they_can() -> None:
    """What is written into a view is seen in the tensor, as without the mode; sizes may come by name."""
    x = torch.zeros(2, 3, 4)
    with TwiceDifferentiable():
        x.view(2, -1)[:, 0] = 5
        assert x.view(size=(6, 4)).shape == (6, 4)
        assert x.view(torch.int32).dtype == torch.int32
        swapped = x.transpose(1, 2).view(2, 12)
    assert x[:, 0, 0].tolist() == [5, 5]
    assert swapped.shape == (2, 12)


@pytest.mark.parametrize("activation", [F.hardswish, F.hardsigmoid])
def test_activations_in_place_change_what_they_are_given(activation: Callable[..., Tensor]) -> None:
    weight = torch.linspace(-4, 4, 9, dtype=torch.float64).requires_grad_()

    def used(inplace: bool) -> Tensor:
        y = weight * 1.5
        result = activation(y, inplace=inplace)
        return (y if inplace else result).square().sum()

    expected = torch.autograd.grad(used(False), weight)[0]
    with TwiceDifferentiable():
        first = torch.autograd.grad(used(True), weight, create_graph=True)[0]
        plain = torch.autograd.grad(used(False), weight, create_graph=True)[0]
    torch.testing.assert_close(first, expected)
    second = [torch.autograd.grad(g.sum(), weight)[0] for g in (first, plain)]
    torch.testing.assert_close(*second)


def test_only_kernels_are_laid_out() -> None:
    """Other parameters of four dimensions keep the strides that their owner relies on (views as complex numbers)."""
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "up": nn.ConvTranspose2d(4, 3, 2)})
    model.register_parameter("filter", nn.Parameter(torch.randn(5, 3, 4, 2)))
    found = weights_laid_out(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert torch.view_as_complex(found["filter"]).shape == (5, 3, 4)
    for name in ("conv.weight", "up.weight"):
        assert found[name].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found[name], model.get_parameter(name))
    assert weights_laid_out(model, torch.float64)["conv.weight"].dtype == torch.float64


def test_where_channels_last_breaks_a_kernel_everything_is_contiguous() -> None:
    """On a processor with AVX2 the heap would be overwritten, also where the network comes in channels_last."""
    model = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2)).to(memory_format=torch.channels_last)
    assert weights_laid_out(model)["0.weight"].stride() == (4, 1, 1, 1)
    assert laid_out(torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last), model).stride() == (144, 36, 6, 1)


def test_layout_is_for_images_in_single_precision() -> None:
    for other in (torch.randn(3, 4), torch.randn(2, 3, 4, 4, dtype=torch.float64)):
        assert laid_out(other, nn.Conv2d(3, 4, 3)) is other
