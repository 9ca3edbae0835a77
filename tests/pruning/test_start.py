"""Weights that exist, in another network: what fits is taken, the rest is drawn and told, a mask comes along."""

import pytest
import torch
from torch import Tensor, nn

from epsd.architectures import built
from epsd.masks import Mask, prunable
from epsd.pruning.start import Source, StartError, adapted, mask_of, narrow_as, take_

CHOICE = {"name": "resnet", "depth": 8}


def network(classes: int = 10, channels: int = 1, seed: int = 0, depth: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return built({**CHOICE, "depth": depth}, classes, (channels, 8, 8))


def names(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def source(model: nn.Module, prefix: str = "", **more: object) -> Source:
    return Source("x.pth", {prefix + name: value.clone() for name, value in model.state_dict().items()}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.backbone."])
def test_the_same_network_takes_all(prefix: str) -> None:
    theirs, mine = network(seed=1), network()
    begun = take_(mine, source(theirs, prefix), "auto", names(10))
    assert begun.share == 1 and not begun.drawn and not begun.left
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert str(begun) == "100.0% of the parameters are from x.pth."


@pytest.mark.parametrize(
    ("classes", "head", "card", "drawn"),
    [
        (10, "auto", {}, False),
        (10, "auto", {"class_names": names(10)}, False),
        (10, "auto", {"class_names": [*names(9), "ten"]}, True),
        (10, "keep", {"class_names": [*names(9), "ten"]}, False),
        (10, "new", {}, True),
        (5, "auto", {}, True),
        (5, "new", {}, True),
    ],
)
def test_the_head_is_kept_where_the_classes_are_the_same(
    classes: int, head: str, card: dict[str, object], drawn: bool
) -> None:
    theirs, mine = network(seed=1), network(classes)
    before = mine.state_dict()["fc.weight"].clone()
    begun = take_(mine, source(theirs, card=card), head, names(classes))  # type: ignore[arg-type]
    assert (begun.drawn == ["fc.weight", "fc.bias"]) == drawn
    assert torch.equal(mine.state_dict()["fc.weight"], before) == drawn
    assert torch.equal(mine.state_dict()["conv1.weight"], theirs.state_dict()["conv1.weight"])
    assert ("drawn: fc.weight, fc.bias" in str(begun)) == drawn


@pytest.mark.parametrize("ours", [1, 3, 4])
@pytest.mark.parametrize("theirs", [1, 3, 4])
def test_input_channels_are_adapted(ours: int, theirs: int) -> None:
    mine, other = network(channels=ours), network(channels=theirs, seed=1)
    begun = take_(mine, source(other), "auto", names(10))
    assert begun.adapted == ([] if ours == theirs else ["conv1.weight"]) and begun.share == 1
    torch.testing.assert_close(mine.state_dict()["conv1.weight"], adapted(other.state_dict()["conv1.weight"], ours))


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_channels_are_adapted_as_timm_does_it(channels: int) -> None:
    theirs = pytest.importorskip("timm.models").adapt_input_conv
    weight = torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(adapted(weight, channels), theirs(channels, weight.clone()))


def test_what_fits_nowhere_is_refused_with_the_first_names_of_both() -> None:
    other = Source("x.pth", {"a.weight": torch.ones(3, 4), "a.bias": torch.ones(3)})
    told = (
        r"start\.weights: x\.pth fits nowhere: it has a\.weight \(3x4\), \.\.\., the network conv1\.weight \(16x1x3x3\)"
    )
    with pytest.raises(StartError, match=told):
        take_(network(), other, "auto", names(10))


@pytest.mark.parametrize(
    ("change", "head", "message"),
    [
        (lambda value: value * torch.nan, "auto", r"conv1\.weight holds numbers that are not finite"),
        (lambda value: value * 0, "auto", "all weights are zero"),
        (
            lambda value: value,
            "keep",
            r"start\.head: keep: fc\.weight does not fit: the network has 5x64, x\.pth has 10x64",
        ),
    ],
)
def test_what_cannot_be_used_is_told(change, head, message) -> None:  # type: ignore[no-untyped-def]
    theirs = network(seed=1)
    state = {name: change(value) if value.is_floating_point() else value for name, value in theirs.state_dict().items()}
    with pytest.raises(StartError, match=message):
        take_(network(5), Source("x.pth", state), head, names(5))


def test_a_deeper_network_takes_what_is_there_and_says_so() -> None:
    begun = take_(network(depth=14), source(network(seed=1)), "auto", names(10))
    assert 0.4 < begun.share < 0.7 and "layer1.1.conv1.weight" in begun.drawn
    assert "drawn: layer1.1.conv1.weight, layer1.1.bn1.weight, layer1.1.bn1.bias and " in str(begun)


def pruned(model: nn.Module, sparsity: float = 0.8) -> Mask:
    torch.manual_seed(3)
    mask = Mask.from_scores({name: torch.rand(p.shape) for name, p in prunable(model).items()}, sparsity)
    mask.apply_(model)
    return mask


@pytest.mark.parametrize("beside", [True, False], ids=["mask beside", "zeros"])
def test_the_mask_comes_along_exactly(beside: bool) -> None:
    """From its file, or from the zeros of the weights; a new head is whole."""
    theirs, mine = network(seed=1), network(5)
    mask = pruned(theirs)
    begun = take_(
        mine, source(theirs, "module.", mask=mask.renamed("module.{}".format) if beside else None), "auto", names(5)
    )
    found = mask_of(mine, begun)
    body = {name: keep for name, keep in mask.keep.items() if name != "fc.weight"}
    assert all(torch.equal(found.keep[name], keep) for name, keep in body.items())
    assert found.keep["fc.weight"].all() and found.keep["fc.weight"].shape == (5, 64)
    found.check(mine)


def test_layers_that_the_mask_did_not_cover_stay_uncovered() -> None:
    theirs, mine = network(seed=1), network()
    mask = pruned(theirs).restricted([name for name in prunable(theirs) if name != "fc.weight"])
    found = mask_of(mine, take_(mine, source(theirs, mask=mask), "auto", names(10)))
    assert "fc.weight" not in found.keep and found == mask


def test_a_mask_follows_the_channels_of_the_images() -> None:
    theirs, mine = network(channels=3, seed=1), network(channels=1)
    mask = pruned(theirs)
    found = mask_of(mine, take_(mine, source(theirs, mask=mask), "auto", names(10)))
    assert torch.equal(found.keep["conv1.weight"], mask.keep["conv1.weight"].any(1, keepdim=True))
    weight: Tensor = mine.get_parameter("conv1.weight")
    assert not weight[~found.keep["conv1.weight"]].any()


def test_a_mask_of_other_weights_is_refused() -> None:
    theirs, mine = network(seed=1), network()
    mask = pruned(network(seed=1))
    begun = take_(mine, source(theirs, mask=mask), "auto", names(10))
    with pytest.raises(StartError, match=r"the mask beside x\.pth is not that of its weights \(conv1\.weight\)"):
        mask_of(mine, begun)


def test_a_narrow_network_stays_narrow_under_a_new_head() -> None:
    shapes = {"layer3.0.conv1.weight": (40, 32, 3, 3), "layer3.0.bn1.weight": (40,), "layer3.0.bn1.bias": (40,)}
    shapes |= {"layer3.0.bn1.running_mean": (40,), "layer3.0.bn1.running_var": (40,)}
    shapes |= {"layer3.0.conv2.weight": (64, 40, 3, 3)}
    torch.manual_seed(1)
    theirs = built(CHOICE, 10, (1, 8, 8), shapes)
    other = source(theirs, card={"shapes": shapes})
    mine = narrow_as(network(5), other)
    begun = take_(mine, other, "auto", names(5))
    assert begun.drawn == ["fc.weight", "fc.bias"]
    assert mine(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    with pytest.raises(StartError, match=r"start\.weights: x\.pth is a narrow network: 'layer3\.0\.conv1"):
        narrow_as(built({"name": "vgg"}, 10, (1, 32, 32)), other)


@pytest.mark.parametrize(("zoo", "package"), [("torchvision_zoo", "torchvision.models"), ("timm_zoo", "timm")])
def test_a_checkpoint_of_a_zoo_fits_the_network_of_its_name(zoo: str, package: str) -> None:
    """As its authors publish it: 1,000 classes, three channels, their names."""
    library = pytest.importorskip(package)
    torch.manual_seed(1)
    state = (
        library.resnet18(weights=None).state_dict()
        if zoo == "torchvision_zoo"
        else (library.create_model("resnet18", pretrained=False).state_dict())
    )
    mine = built({"name": zoo, "model": "resnet18"}, 5, (1, 32, 32))
    begun = take_(mine, Source("resnet18.pth", state), "auto", names(5))
    assert begun.drawn == ["fc.weight", "fc.bias"] and begun.left == ["fc.weight", "fc.bias"]
    assert begun.adapted == ["conv1.weight"] and begun.share > 0.99
    assert torch.equal(mine.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
