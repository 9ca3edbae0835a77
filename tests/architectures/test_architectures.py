"""What every architecture keeps: forward, prunable weights, masks, a training step, a backbone, published sizes."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from epsd.architectures import ARCHITECTURES, Architecture, _features
from epsd.architectures._features import ArchitectureError
from epsd.masks import Mask, prunable
from epsd.pruning.prune import prune
from epsd.registry import ParamsError, choose
from epsd.scores import SCORES
from epsd.types import EpsdError
from toys import ToyBatches

Shape = tuple[int, int, int]

CONVOLUTIONAL: list[tuple[dict[str, Any], Shape]] = [
    ({"name": "resnet", "depth": 20, "width": 0.5}, (1, 8, 8)),
    ({"name": "resnet", "depth": 20, "shortcut": "padding"}, (3, 32, 32)),
    ({"name": "resnet", "depth": 18, "width": 0.25}, (3, 32, 32)),
    ({"name": "resnet", "depth": 18, "width": 0.25, "stem": "tiny_imagenet"}, (3, 64, 64)),
    ({"name": "resnet", "depth": 50, "width": 0.25, "stem": "imagenet"}, (3, 64, 64)),
    ({"name": "resnet", "depth": 50, "width": 0.125, "shortcut": "padding"}, (4, 16, 16)),
    ({"name": "vgg", "depth": 11}, (3, 32, 32)),
    ({"name": "torchvision_zoo", "model": "mobilenet_v3_small"}, (3, 64, 64)),
    ({"name": "torchvision_zoo", "model": "regnet_y_400mf"}, (2, 64, 64)),
]
SLOW: list[tuple[dict[str, Any], Shape]] = [
    ({"name": "torchvision_zoo", "model": "efficientnet_b0"}, (1, 64, 64)),
    ({"name": "torchvision_zoo", "model": "convnext_tiny"}, (3, 64, 64)),
    ({"name": "torchvision_zoo", "model": "densenet121"}, (3, 64, 64)),
    ({"name": "torchvision_zoo", "model": "googlenet"}, (3, 64, 64)),
]
TOKENS: list[tuple[dict[str, Any], Shape]] = [({"name": "torchvision_zoo", "model": "vit_b_32"}, (3, 32, 32))]
TIMM_CONVOLUTIONAL: list[tuple[dict[str, Any], Shape]] = [
    ({"name": "timm_zoo", "model": "resnet10t"}, (1, 64, 64)),
    ({"name": "timm_zoo", "model": "mobilenetv3_small_050"}, (3, 64, 64)),
]
TIMM_TOKENS: list[tuple[dict[str, Any], Shape]] = [({"name": "timm_zoo", "model": "vit_tiny_patch16_224"}, (3, 32, 32))]


def label(value: Any) -> str | None:
    return "-".join(str(part) for part in value.values()) if isinstance(value, dict) else None


def build(choice: dict[str, Any], shape: Shape, classes: int = 7) -> tuple[Architecture, nn.Module]:
    if choice["name"] == "timm_zoo":
        pytest.importorskip("timm")
    torch.manual_seed(0)
    architecture = choose(ARCHITECTURES, choice, "architecture")
    return architecture, architecture(classes, shape)


slow = [pytest.param(*entry, marks=pytest.mark.slow) for entry in SLOW]
maps = [*CONVOLUTIONAL, *TIMM_CONVOLUTIONAL, *slow]
every = pytest.mark.parametrize(("choice", "shape"), [*maps, *TOKENS, *TIMM_TOKENS], ids=label)
with_maps = pytest.mark.parametrize(("choice", "shape"), maps, ids=label)
without_maps = pytest.mark.parametrize(("choice", "shape"), TOKENS + TIMM_TOKENS, ids=label)


def test_every_name_has_a_contract() -> None:
    tested = {choice["name"] for choice, _ in CONVOLUTIONAL + TIMM_CONVOLUTIONAL}
    assert tested == set(ARCHITECTURES)


@every
def test_prunes_trains_and_keeps_its_mask(choice: dict[str, Any], shape: Shape) -> None:
    _, net = build(choice, shape)
    images, labels = torch.randn(4, *shape), torch.arange(4)
    weights = prunable(net)
    assert weights
    assert all(weight.dim() >= 2 for weight in weights.values())
    share = sum(w.numel() for w in weights.values()) / sum(p.numel() for p in net.parameters())
    assert share > 0.75  # what is left are biases, norms, tokens and positions

    mask = Mask.from_scores({name: w.detach().abs() for name, w in weights.items()}, 0.5, scope="layer")
    mask.apply_(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    loss = nn.functional.cross_entropy(net(images), labels)
    loss.backward()
    optimiser.step()
    mask.apply_(net)
    assert math.isfinite(loss.item())
    assert all(not weights[name][~mask.keep[name]].any() for name in weights)
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
    logits = net.eval()(images)
    assert logits.shape == (4, 7)
    assert torch.isfinite(logits).all()


@every
def test_same_seed_same_weights_and_construction_trains_nothing(choice: dict[str, Any], shape: Shape) -> None:
    first, second = build(choice, shape)[1], build(choice, shape)[1]
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert first.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in first.parameters())


@with_maps
def test_backbone_keeps_names_and_weights(choice: dict[str, Any], shape: Shape) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    architecture, net = build(choice, shape)
    nodes = architecture.feature_nodes(net)
    backbone = create_feature_extractor(net, nodes)
    image = torch.randn(2, *shape)
    maps = backbone(image)
    assert list(maps) == nodes
    heights = [value.shape[2] for value in maps.values()]
    assert all(value.dim() == 4 for value in maps.values())
    assert heights == sorted(heights, reverse=True)
    assert len(heights) >= 3
    own = dict(net.named_parameters())
    kept = dict(backbone.named_parameters())
    assert kept.keys() <= own.keys()
    assert all(torch.equal(kept[name], own[name]) for name in kept)
    assert len(prunable(backbone)) >= 0.7 * len(prunable(net))


@without_maps
def test_token_networks_are_refused_as_backbones_with_the_reason(choice: dict[str, Any], shape: Shape) -> None:
    architecture, net = build(choice, shape)
    with pytest.raises(ArchitectureError, match="no pyramid of feature maps"):
        architecture.feature_nodes(net)


@pytest.mark.parametrize("model", ["vgg11_bn", "alexnet"])
def test_a_pooling_to_a_fixed_size_is_no_feature_map(model: str) -> None:
    architecture, net = build({"name": "torchvision_zoo", "model": model}, (3, 64, 64))
    assert "avgpool" not in architecture.feature_nodes(net)
    last = architecture.feature_nodes(net)[-1]
    sides = [_features._shapes(net, [last], torch.zeros(1, 3, side, side))[last][2] for side in (224, 448)]
    assert sides[1] >= 2 * sides[0]


def test_feature_maps_are_looked_for_where_the_network_is() -> None:
    architecture, net = build({"name": "torchvision_zoo", "model": "mobilenet_v3_small"}, (3, 64, 64))
    found = architecture.feature_nodes(net)
    assert len(found) > 2
    assert architecture.feature_nodes(net.to("meta")) == found


def test_networks_that_standardise_their_weights_are_refused() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ArchitectureError, match=r"standardises its convolution weights .*cannot be pruned"):
        build({"name": "timm_zoo", "model": "nf_regnet_b0"}, (3, 64, 64))


@pytest.mark.parametrize(
    ("choice", "shape"),
    [
        *(TOKENS + TIMM_TOKENS + TIMM_CONVOLUTIONAL),
        pytest.param({"name": "timm_zoo", "model": "swinv2_cr_tiny_ns_224"}, (3, 64, 64), marks=pytest.mark.slow),
    ],
    ids=label,
)
def test_no_layer_starts_at_zero_nor_scales_by_it(choice: dict[str, Any], shape: Shape) -> None:
    """A score could not rank its weights; vision transformers come with such a classifier, ResNets with such norms."""
    _, net = build(choice, shape)
    assert all(weight.any() for name, weight in net.named_parameters() if name.endswith("weight"))
    other = build(choice, shape)[1]
    assert all(torch.equal(weight, other.get_parameter(name)) for name, weight in net.named_parameters())


def test_the_branches_of_timms_resnets_take_part() -> None:
    """There the last norm of every block starts at zero: all scores before it would be 0, and its weights go."""
    _, net = build({"name": "timm_zoo", "model": "resnet10t"}, (1, 64, 64))
    mask = prune(net, ToyBatches(16, 8, 4, (1, 64, 64)), score=SCORES["snip"](), sparsity=0.95)
    assert not mask.dead_layers()
    counts = [count for name, count in mask.per_layer().items() if ".conv" in name]
    assert sum(kept for kept, _ in counts) > 0.03 * sum(total for _, total in counts)


def test_fused_attention_weights_are_prunable() -> None:
    _, net = build(*TOKENS[0])
    assert any(name.endswith("in_proj_weight") for name in prunable(net))


PUBLISHED: list[tuple[dict[str, Any], int, Shape, int]] = [
    ({"name": "resnet", "depth": 20, "shortcut": "padding"}, 10, (3, 32, 32), 269_722),
    ({"name": "resnet", "depth": 32, "shortcut": "padding"}, 10, (3, 32, 32), 464_154),
    ({"name": "resnet", "depth": 44, "shortcut": "padding"}, 10, (3, 32, 32), 658_586),
    ({"name": "resnet", "depth": 56, "shortcut": "padding"}, 10, (3, 32, 32), 853_018),
    ({"name": "resnet", "depth": 110, "shortcut": "padding"}, 10, (3, 32, 32), 1_727_962),
    ({"name": "resnet", "depth": 18}, 10, (3, 32, 32), 11_173_962),
    ({"name": "resnet", "depth": 18, "stem": "imagenet"}, 1000, (3, 224, 224), 11_689_512),
    ({"name": "resnet", "depth": 34, "stem": "imagenet"}, 1000, (3, 224, 224), 21_797_672),
    ({"name": "resnet", "depth": 50, "stem": "imagenet"}, 1000, (3, 224, 224), 25_557_032),
    ({"name": "resnet", "depth": 101, "stem": "imagenet"}, 1000, (3, 224, 224), 44_549_160),
    ({"name": "resnet", "depth": 152, "stem": "imagenet"}, 1000, (3, 224, 224), 60_192_808),
    ({"name": "vgg", "depth": 16}, 10, (3, 32, 32), 14_728_266),
    ({"name": "vgg", "depth": 19}, 10, (3, 32, 32), 20_040_522),
]


@pytest.mark.parametrize(("choice", "classes", "shape", "parameters"), PUBLISHED, ids=label)
def test_published_parameter_counts(choice: dict[str, Any], classes: int, shape: Shape, parameters: int) -> None:
    with torch.device("meta"):
        net = choose(ARCHITECTURES, choice)(classes, shape)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_resnet_computes_what_torchvisions_does(depth: int) -> None:
    import torchvision

    net = choose(ARCHITECTURES, {"name": "resnet", "depth": depth, "stem": "imagenet"})(10, (3, 64, 64))
    other = torchvision.models.get_model(f"resnet{depth}", weights=None, num_classes=10)
    other.load_state_dict(net.state_dict())  # the names are torchvision's
    image = torch.randn(2, 3, 64, 64)
    assert torch.allclose(net(image), other(image), atol=1e-5)


def test_initial_weights_are_kaiming_fan_out() -> None:
    torch.manual_seed(0)
    net = choose(ARCHITECTURES, {"name": "resnet", "depth": 18})(10, (3, 32, 32))
    weight = net.get_parameter("layer4.1.conv2.weight")
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)


@pytest.mark.parametrize(("stem", "side"), [("cifar", 64), ("tiny_imagenet", 32), ("imagenet", 16)])
def test_stems_have_their_stride(stem: str, side: int) -> None:
    net = choose(ARCHITECTURES, {"name": "resnet", "depth": 18, "width": 0.125, "stem": stem})(2, (3, 64, 64))
    sides = []
    net.get_submodule("layer1").register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    net(torch.randn(2, 3, 64, 64))
    assert sides == [side]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"name": "resnet", "depth": 21}, "architecture.depth"),
        ({"name": "resnet", "width": 0.0}, "architecture.width"),
        ({"name": "resnet", "stem": "cifra"}, "'cifar'"),
        ({"name": "resnet", "dept": 18}, "Did you mean 'depth'"),
        ({"name": "vgg", "depth": 12}, "11, 13, 16 or 19"),
        ({"name": "torchvision_zoo"}, "architecture.model"),
        ({"name": "torchvision_zoo", "model": "mobilnet_v3_small"}, "Did you mean 'mobilenet_v3_small'"),
        ({"name": "timm_zoo", "model": "resnett26"}, "resnet26"),
    ],
    ids=label,
)
def test_wrong_settings_name_the_key_or_the_valid_names(choice: dict[str, Any], words: str) -> None:
    if choice["name"] == "timm_zoo":
        pytest.importorskip("timm")
    with pytest.raises(ParamsError, match=words):
        choose(ARCHITECTURES, choice, "architecture")


@pytest.mark.parametrize(
    ("choice", "shape"),
    [
        ({"name": "vgg", "depth": 11}, (3, 16, 16)),
        ({"name": "torchvision_zoo", "model": "inception_v3"}, (3, 32, 32)),
        ({"name": "torchvision_zoo", "model": "alexnet"}, (1, 28, 28)),
        ({"name": "torchvision_zoo", "model": "vit_b_32"}, (3, 40, 40)),
        ({"name": "timm_zoo", "model": "vit_tiny_patch16_224"}, (3, 8, 8)),
    ],
    ids=label,
)
def test_images_that_do_not_fit_are_refused_with_their_size(choice: dict[str, Any], shape: Shape) -> None:
    with pytest.raises(EpsdError, match=f"{shape[1]}x{shape[2]}"):
        build(choice, shape)


def test_timm_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ArchitectureError, match="pip install"):
        choose(ARCHITECTURES, {"name": "timm_zoo", "model": "resnet18"})


def test_zoos_stay_off_the_start_up_path() -> None:
    code = "import sys, epsd.architectures; sys.exit(bool({'torchvision', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
