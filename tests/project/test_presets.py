"""Every shipped parameter file: it loads, all its choices exist, and its networks, score and objective take a step."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from epsd.architectures import ARCHITECTURES
from epsd.datasets import DATASETS
from epsd.detectors import DETECTORS
from epsd.detectors._features import Picture
from epsd.objectives import OBJECTIVES
from epsd.pipeline.stage import check
from epsd.project import presets
from epsd.project.params import Params, flatten, parse, read_yaml
from epsd.pruning import prune as pruning
from epsd.registry import ParamsError, choose
from epsd.scores import SCORES
from epsd.training.fit import fit
from epsd.types import Batch, BatchNeeds

FOLDER = Path(__file__).resolve().parents[2] / "presets"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
EXPECTED = {"digits-channels", "cifar10-resnet18-channels"} | {
    "digits-finetune", "cub200-transfer", "cifar10-transfer",
    "cifar10-quick", "cifar10-resnet18", "cifar10-vgg19", "cifar100-resnet18", "cifar100-vgg19", "cub200-resnet18",
    "digits", "imagenet-resnet50", "own-photos", "photos-faster-rcnn", "tiny-imagenet-resnet18", "voc07-faster-rcnn",
}  # fmt: skip
QUICK = {"digits", "cifar10-quick", "cub200-resnet18"}
every = pytest.mark.parametrize("name", NAMES)

IMAGES = {  # classes and the image shape of each data set; large images stand in at 64 px, which the nets take as well
    "digits": (10, (1, 8, 8)),
    "cifar": (10, (3, 32, 32)),
    "tiny_imagenet": (200, (3, 64, 64)),
    "imagenet": (1000, (3, 64, 64)),
    "cub": (200, (3, 64, 64)),
    "image_folder": (10, (3, 64, 64)),
}


class Noise:
    """Random images, in batches that an objective can use: neighbours share their class."""

    def __init__(self, classes: int, shape: tuple[int, int, int], batch_size: int = 2, batches: int = 2):
        self.num_classes, self.shape, self.batch_size, self.size = classes, shape, batch_size, batch_size * batches

    def __len__(self) -> int:
        return self.size // self.batch_size

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        random = torch.Generator().manual_seed(number)
        for first in range(0, self.size, self.batch_size):
            images, partner = torch.randn(2, self.batch_size, *self.shape, generator=random)
            indices = torch.arange(first, first + self.batch_size)
            yield Batch(images, indices // 2 % self.num_classes, indices, partner if needs.partner != "none" else None)


def test_all_are_shipped() -> None:
    assert set(NAMES) == EXPECTED
    assert presets.names() == NAMES


@every
def test_loads_and_every_choice_exists(name: str) -> None:
    params = parse(presets.read(name))
    check(params)
    assert params.seed == 0
    assert params.train.milestones == sorted(params.train.milestones)


@every
def test_has_every_key_of_the_default_file(name: str, root: Path) -> None:
    choices = ("dataset.", "architecture.", "objective.", "prune.score.", "voc.", "detect.detector.", "tune.")

    def keys(tree: dict[str, Any]) -> set[str]:
        return {key for key, _ in flatten(tree) if not key.startswith(choices)}

    assert keys(presets.read(name)) == keys(read_yaml(root / "params.yaml"))


@every
def test_every_line_says_what_it_means(name: str) -> None:
    head, _, body = presets.whole(name).partition("\nseed:")
    assert head.startswith(f"# {name}: ")
    assert f"# Command: epsd preset {name} --apply && dvc repro" in head
    assert "# Time: " in head and "# Memory: " in head
    silent = [line for line in body.splitlines() if ": " in line and "#" not in line]
    assert {line.split(":")[0].strip() for line in silent} <= {"name", "nesterov", "flip"}


def test_digits_is_the_default_file(root: Path) -> None:
    default, preset = (root / "params.yaml").read_text(), (FOLDER / "digits.yaml").read_text()
    assert preset.endswith(default)
    assert all(line.startswith("#") for line in preset.removesuffix(default).splitlines())


def test_a_preset_on_a_base_is_that_one_but_for_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "presets").mkdir()
    monkeypatch.setattr(presets, "folder", lambda: tmp_path / "presets")

    def write(name: str, text: str) -> None:
        (tmp_path / "presets" / f"{name}.yaml").write_text(text)

    net = "net:  # which\n  name: a\n  size: 1   # of a\n"
    write("low", f"# low: words\nseed: 0   # why\n\n{net}\nlast:\n  x: 1  # ex\n  y: null\n")
    write("mid", "# mid: more\n# words\nbase: low\nlast:\n    x: 1.5    # other\n")
    write("top", "base: mid\nnet:\n  name: b\nseed: 2\n")
    assert presets.whole("mid") == (
        f"# mid: more\n# words\nseed: 0   # why\n\n{net}\nlast:\n  x: 1.5      # other\n  y: null\n"
    )
    assert presets.whole("top") == (
        "seed: 2   # why\n\nnet:  # which\n  name: b\n\nlast:\n  x: 1.5      # other\n  y: null\n"
    )
    write("low", "base: top\n")
    with pytest.raises(ParamsError, match=r"low\.yaml: base: unknown 'top'"):
        presets.whole("top")
    write("mid", "base: lo\n")
    with pytest.raises(ParamsError, match=r"mid\.yaml: base: unknown 'lo'\. Did you mean 'low'"):
        presets.whole("mid")
    write("mid", "base: [\n")
    with pytest.raises(ParamsError, match=r"mid\.yaml: not valid YAML"):
        presets.whole("mid")


def mini(params: Params) -> tuple[Any, Any, Noise]:
    classes, shape = IMAGES[params.dataset["name"]]
    classes = params.dataset.get("classes", classes)
    torch.manual_seed(params.seed)
    architecture = choose(ARCHITECTURES, params.architecture)
    return architecture, architecture(classes, shape), Noise(classes, shape)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_one_mini_step(name: str) -> None:
    """Score, mask, one epoch of two batches: finite, exactly as sparse as asked, and something was learnt.

    A look-ahead has one step here, whatever the preset's number: the networks are large, and a step is like the others.
    """
    params = parse(presets.read(name))
    chosen = params.prune.score | ({"steps": 1} if "steps" in params.prune.score else {})
    assert choose(DATASETS, params.dataset)
    _, net, noise = mini(params)
    own = {key: value for key, value in params.objective.items() if value != "auto"}  # noise has no labels to count
    objective = choose(OBJECTIVES, own)
    score = choose(SCORES, chosen)
    mask = pruning.prune(
        net, noise, score=score, objective=objective, sparsity=params.prune.sparsity, scope=params.prune.scope
    )
    assert mask.total - mask.kept == round(params.prune.sparsity * mask.total)
    recipe = params.train.model_copy(update={"epochs": 1, "warmup_epochs": 0})
    before = {key: value.clone() for key, value in net.state_dict().items()}
    (record,) = fit(net, noise, objective=objective, mask=mask, recipe=recipe)
    assert 0 < record["train/loss"] < math.inf
    weights = dict(net.named_parameters())
    assert all(not weights[layer][~keep].any() for layer, keep in mask.keep.items())
    assert any(not torch.equal(before[key], value) for key, value in net.state_dict().items())


@every
def test_the_detector_fits_the_backbone(name: str) -> None:
    params = parse(presets.read(name))
    architecture, net, noise = mini(params)
    channels = noise.shape[0]
    detector = choose(DETECTORS, params.detect.detector)(
        net, architecture.feature_nodes(net), Picture(64, 64, [0.5] * channels, [0.2] * channels), 20,
        params.detect.frozen_stages,
    )  # fmt: skip
    trained = {parameter for parameter in detector.parameters() if parameter.requires_grad}
    assert 0 < len(trained) <= len(list(detector.parameters()))
    assert any(key.startswith("backbone.body.") for key in detector.state_dict())


class TestApply:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("DVC_ROOT", raising=False)
        monkeypatch.chdir(tmp_path)

    def test_keeps_a_copy_each_time(self, tmp_path: Path) -> None:
        target = tmp_path / "params.yaml"
        assert presets.apply("digits", target) is None  # there was nothing to keep
        first = "mine: 1\n"
        target.write_text(first)
        copies = [presets.apply("cifar10-vgg19", target), presets.apply("digits", target)]
        assert copies[0] != copies[1]
        assert copies[0].read_text() == first
        assert copies[1].read_text() == presets.whole("cifar10-vgg19")
        assert target.read_text() == presets.whole("digits")

    def test_applying_it_again_makes_no_copy(self, tmp_path: Path) -> None:
        presets.apply("digits", tmp_path / "params.yaml")
        assert presets.apply("digits", tmp_path / "params.yaml") is None
        assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]

    def test_the_projects_own_presets_come_first_and_must_be_fit(self, tmp_path: Path) -> None:
        (tmp_path / "dvc.yaml").write_text("stages: {}\n")
        (tmp_path / "presets").mkdir()
        (tmp_path / "presets/mine.yaml").write_text("# mine: a broken one\nsed: 0\n")
        (tmp_path / "params.yaml").write_text("before: 1\n")
        assert presets.names() == ["mine"]
        assert presets.summary("mine") == "a broken one"
        with pytest.raises(ParamsError, match="Did you mean 'seed'"):
            presets.apply("mine", tmp_path / "params.yaml")
        assert (tmp_path / "params.yaml").read_text() == "before: 1\n"

    def test_an_unknown_one_lists_the_valid(self) -> None:
        with pytest.raises(ParamsError, match=r"Did you mean 'digits'.*cifar10-quick"):
            presets.find("digit")
