"""Weights on a grid: zeros stay, the gradient passes, torchao rounds to the same numbers, wrappers change nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from epsd.compute import quantise
from epsd.compute.networks import NetworkError
from epsd.masks import matrices, prunable
from toys import convnet, mlp


def weights() -> torch.Tensor:
    """Output channels of all sorts: small, large, one-sided, with zeros, of zeros alone."""
    torch.manual_seed(0)
    found = torch.randn(6, 5, 3, 3) * torch.tensor([1e-6, 1.0, 100.0, 1.0, 1.0, 0.0]).view(6, 1, 1, 1)
    found[3].abs_()
    found[4, ::2] = 0
    return found


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_is_a_whole_number_of_its_channels_distance(bits: int) -> None:
    given, found = weights(), quantise.rounded(weights(), bits)
    levels = quantise.LEVELS[bits]
    largest = given.flatten(1).abs().amax(1)
    assert torch.allclose(found.flatten(1).abs().amax(1), largest), "the largest stays what it is"
    codes = found[:5] / (largest[:5] / levels).view(5, 1, 1, 1)
    assert torch.allclose(codes, codes.round(), atol=1e-3) and codes.abs().max() < levels + 0.01
    assert ((found - given).abs().amax((1, 2, 3)) <= largest / levels / 2 * 1.0001).all()
    assert len(found[1].unique()) > (8 if bits == 4 else 20)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_and_none_is_negative(bits: int) -> None:
    found = quantise.rounded(weights(), bits)
    assert not found[weights() == 0].any() and not torch.signbit(found[found == 0]).any()
    assert torch.isfinite(found).all() and not found[5].any()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_gradient_passes_as_if_nothing_was_rounded(bits: int) -> None:
    given, factors = weights().requires_grad_(), torch.randn(6, 5, 3, 3)
    (quantise.rounded(given, bits) * factors).sum().backward()
    assert torch.equal(given.grad, factors)


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_rounds_to_the_same_numbers(bits: int) -> None:
    qat = pytest.importorskip("torchao.quantization.qat", reason="compares with torchao, of the extra dev")
    kind = {8: torch.int8, 4: torch.int4}[bits]
    theirs = qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(kind, "per_channel", is_dynamic=False))
    flat = weights()[:5].flatten(1)
    theirs.scale = flat.abs().amax(1, keepdim=True) / quantise.LEVELS[bits]
    theirs.zero_point = torch.zeros_like(theirs.scale, dtype=torch.int32)
    assert torch.equal(theirs(flat), quantise.rounded(flat, bits))


def test_a_pass_and_a_rounded_network_say_the_same() -> None:
    model, images = convnet().eval(), torch.randn(4, 1, 4, 4)
    plain, before = model(images), copy.deepcopy(model.state_dict())
    assert torch.equal(quantise.passed(model, images, None), plain)
    found = quantise.passed(model, images, 4)
    assert not torch.equal(found, plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    quantise.round_(model, 4)
    assert torch.equal(model(images), found)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == list(matrices(model)) == ["0.weight", "3.weight", "8.weight"]


def test_frozen_and_tied_weights_and_attention_are_rounded_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[1].weight
    layer.linear1.weight.requires_grad_(False)
    assert "0.linear1.weight" not in prunable(model)
    images = torch.randn(2, 3, 8)
    found = quantise.passed(model, images, 4)
    names = ["0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight", "0.linear1.weight", "0.linear2.weight"]
    assert list(matrices(model)) == [*names, "1.weight"]
    quantise.round_(model, 4)
    assert torch.allclose(model(images), found, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(weight_norm(nn.Linear(4, 3))), "the weight of '0' is computed from others"),
        (mlp(dtype=torch.float64), "rounds weights of float32, these are torch.float64"),
        (nn.Sequential(nn.ConvTranspose2d(1, 2, 3)), "'0' is a transposed convolution"),
    ],
)
def test_what_cannot_be_rounded_is_said_in_one_line(model: nn.Module, reason: str) -> None:
    with pytest.raises(NetworkError, match=rf"^train\.quantise: {reason}.*use null\.$"):
        quantise.check(model)
