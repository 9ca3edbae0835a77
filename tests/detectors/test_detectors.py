"""Every detector on every kind of backbone: trains, finds, keeps the classifier's weights and names."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn

from epsd.architectures.resnet import ResNet
from epsd.detectors import DETECTORS, DetectorError, Picture
from epsd.detectors._features import choose_levels, levels_of, sides
from epsd.registry import ParamsError, choose

GREY, COLOUR = Picture(64, 64, [0.3], [0.4]), Picture(48, 64, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
SMALL: dict[str, dict[str, object]] = {
    "faster_rcnn": {"channels": 16, "head_width": 16, "proposals": 20, "roi_samples": 16, "anchor_samples": 16},
    "retinanet": {"channels": 32, "extra_levels": 1},
    "ssd": {"channels": 16},
}
every = pytest.mark.parametrize("name", list(DETECTORS))


def resnet() -> tuple[nn.Module, list[str], Picture]:
    torch.manual_seed(0)
    variant = ResNet(depth=20, width=0.25)
    model = variant(10, (1, 64, 64))
    return model, variant.feature_nodes(model), GREY


def mobilenet() -> tuple[nn.Module, list[str], Picture]:
    from epsd.architectures.torchvision_zoo import TorchvisionZoo

    torch.manual_seed(0)
    variant = TorchvisionZoo(model="mobilenet_v3_small")
    model = variant(10, (3, 64, 64))
    return model, variant.feature_nodes(model), COLOUR


Backbone = Callable[[], tuple[nn.Module, list[str], Picture]]
backbones = pytest.mark.parametrize("backbone", [resnet, mobilenet])


def build(name: str, backbone: Backbone = resnet, frozen: int = 0, **settings: object) -> tuple[nn.Module, nn.Module]:
    model, nodes, picture = backbone()
    detector = choose(DETECTORS, {"name": name, **SMALL[name], **settings})
    return model, detector(model, nodes, picture, 3, frozen)


def sample(picture: Picture) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    images = list(torch.rand(2, len(picture.mean), picture.height, picture.width))
    full = {"boxes": torch.tensor([[4.0, 4.0, 24.0, 20.0], [30.0, 10.0, 50.0, 40.0]]), "labels": torch.tensor([1, 3])}
    return images, [full, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]


@every
@backbones
def test_losses_reach_every_backbone_weight_and_detections_have_the_form(name: str, backbone: Backbone) -> None:
    _, detector = build(name, backbone)
    images, targets = sample(backbone()[2])
    detector.train()
    losses = detector(images, targets)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert torch.isfinite(total)
    without = [key for key, p in detector.named_parameters() if key.startswith("backbone.") and p.grad is None]
    assert not without
    detector.eval()
    for image, output in zip(images, detector(images), strict=True):
        count = len(output["scores"])
        assert output["boxes"].shape == (count, 4)
        assert bool((output["boxes"] >= 0).all())
        assert bool((output["boxes"][:, 2] <= image.shape[2]).all())
        assert set(output["labels"].tolist()) <= {1, 2, 3}


@every
@backbones
def test_the_classifiers_weights_move_in_under_their_names(name: str, backbone: Backbone) -> None:
    model, detector = build(name, backbone)
    before = dict(model.named_parameters())
    inside = {key: p for key, p in detector.named_parameters() if key.startswith("backbone.body.")}
    assert inside
    assert all(p is before[key.removeprefix("backbone.body.")] for key, p in inside.items())
    left = {key for key in before if f"backbone.body.{key}" not in inside}
    assert any(key.startswith(("fc.", "classifier.")) for key in left)


@every
def test_a_state_dict_goes_out_and_in(name: str) -> None:
    _, one = build(name)
    _, other = build(name)
    nn.init.constant_(next(one.parameters()), 0.5)
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@every
def test_frozen_stages_stay(name: str) -> None:
    model, detector = build(name, frozen=2)
    still = {key for key, p in detector.named_parameters() if not p.requires_grad}
    assert still
    assert all(
        key.startswith(("backbone.body.conv1", "backbone.body.bn1", "backbone.body.layer1", "backbone.body.layer2"))
        for key in still
    )
    assert "backbone.body.layer1.0.conv1.weight" in still
    assert model.get_parameter("layer3.0.conv1.weight").requires_grad
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    detector.train()
    detector(*sample(GREY))
    after = detector.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any(key.startswith("backbone.body.layer3") for key in moved)
    assert not any(
        key.startswith(("backbone.body.bn1", "backbone.body.layer1", "backbone.body.layer2")) for key in moved
    )


@every
def test_frozen_norms_stay_also_after_switching_modes(name: str) -> None:
    _, detector = build(name, frozen_norms=True)
    detector.eval()
    detector.train()
    before = {key: value.clone() for key, value in detector.state_dict().items() if key.startswith("backbone.body.")}
    detector(*sample(GREY))
    after = detector.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


class OwnNorm(nn.BatchNorm2d):
    """As timm's: with an activation inside, and a check that a tracer keeps for its side effect."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        return torch.relu(super().forward(x))


def ours() -> tuple[nn.Module, list[str], Picture]:
    """Three stages with norm layers of another library."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), OwnNorm(after))
        for before, after in ((1, 8), (8, 16), (16, 16))
    ]
    model = nn.Sequential(
        OrderedDict(
            a=stages[0],
            b=stages[1],
            c=stages[2],
            fc=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
        )
    )
    return model, ["a", "b", "c"], GREY


@every
def test_norm_layers_of_other_libraries_are_frozen_and_cut_alike(name: str) -> None:
    _, detector = build(name, ours, frozen=1)
    still = {key for key, p in detector.named_parameters() if not p.requires_grad}
    assert still == {f"backbone.body.a.{key}" for key in ("0.weight", "0.bias", "1.weight", "1.bias")}
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    detector.train()
    detector(*sample(GREY))
    moved = {key for key, value in detector.state_dict().items() if not torch.equal(before[key], value)}
    assert any(key.startswith("backbone.body.b") for key in moved)
    assert not any(key.startswith("backbone.body.a") for key in moved)
    _, detector = build(name, ours, frozen_norms=True)
    before = {key: value.clone() for key, value in detector.state_dict().items() if key.startswith("backbone.body.")}
    detector.train()
    detector(*sample(GREY))
    assert all(torch.equal(value, detector.state_dict()[key]) for key, value in before.items())


@every
def test_more_frozen_stages_than_there_are(name: str) -> None:
    with pytest.raises(
        DetectorError, match=r"detect\.frozen_stages: 4, but the backbone has 3 \(layer1, layer2, layer3\)"
    ):
        build(name, frozen=4)


@every
def test_without_a_pyramid(name: str) -> None:
    _, detector = build(name, fpn=False)
    detector.train()
    assert all(torch.isfinite(loss) for loss in detector(*sample(GREY)).values())


@every
def test_a_network_without_feature_maps_is_refused(name: str) -> None:
    model, _, _ = resnet()
    detector = choose(DETECTORS, {"name": name})
    with pytest.raises(DetectorError, match=r"Net: has no feature maps .*convolutional"):
        detector(model, [], GREY, 3)
    with pytest.raises(DetectorError, match="node 'fc' gives no feature map"):
        detector(model, ["layer1", "fc"], GREY, 3)
    with pytest.raises(DetectorError, match="Net: no feature maps can be taken"):
        detector(model, ["layer9"], GREY, 3)


@every
def test_tokens_of_a_transformer_are_no_feature_map(name: str) -> None:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(128, 32, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)
    with pytest.raises(DetectorError, match="VisionTransformer: node 'encoder' gives no feature map"):
        choose(DETECTORS, {"name": name})(model, ["encoder"], COLOUR, 3)


@every
def test_wrong_channels_are_named(name: str) -> None:
    model, nodes, _ = resnet()
    with pytest.raises(DetectorError, match="3 channels"):
        choose(DETECTORS, {"name": name})(model, nodes, COLOUR, 3)


@every
def test_building_leaves_modes_and_statistics_alone(name: str) -> None:
    model, nodes, picture = resnet()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    choose(DETECTORS, {"name": name, **SMALL[name]})(model, nodes, picture, 3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"name": "yolo"}, "faster_rcnn, retinanet, ssd"),
        ({"name": "ssd", "proposal": 10}, r"unknown 'proposal'"),
        ({"name": "faster_rcnn", "anchor_scale": 0.0}, "anchor_scale"),
        ({"name": "retinanet", "channels": 40}, "channels.*32"),
        ({"name": "faster_rcnn", "aspect_ratios": []}, "aspect_ratios"),
    ],
)
def test_bad_settings(choice: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        choose(DETECTORS, choice, "detect.detector")


def test_levels_and_how_they_are_chosen() -> None:
    model, nodes, _ = resnet()
    levels = levels_of(model, nodes, 1)
    assert [(level.node, level.stride, level.channels) for level in levels] == [
        ("layer1", 1, 4),
        ("layer2", 2, 8),
        ("layer3", 4, 16),
    ]
    strides = lambda finest, pyramid: [level.stride for level in choose_levels(levels, finest, pyramid)]  # noqa: E731
    assert strides(2, True) == [2, 4]
    assert strides(8, True) == [4]  # nothing that coarse: the coarsest there is
    assert strides(1, False) == [4]


def test_resizing_rule() -> None:
    assert sides(Picture(64, 64, [0.0], [1.0]), None, None) == (64, 107)
    assert sides(Picture(375, 500, [0.0], [1.0]), 600, 1000) == (600, 1000)
    assert sides(Picture(100, 300, [0.0], [1.0]), None, None) == (100, 300)
