"""Prune and train from weights that exist: of a file, a folder, a run; the mask they bring is exact to the end."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from conftest import ROOT
from epsd.architectures import narrowed
from epsd.compute.narrow import Shapes
from epsd.data.prepared import Prepared
from epsd.datasets import DATASETS
from epsd.evaluation import compact_file
from epsd.masks import prunable
from epsd.pipeline import changes, stage
from epsd.pipeline.backbone import backbone
from epsd.pipeline.describe import method, run_name, story
from epsd.pipeline.prune import begun, pruned, scoring_key
from epsd.pipeline.train import card, trained
from epsd.pipeline.weights import content_of
from epsd.preparing.write import prepare
from epsd.project import artifacts, presets
from epsd.project.artifacts import ArtifactError
from epsd.project.params import Params, override, parse, read_yaml
from epsd.pruning.start import StartError
from epsd.registry import ParamsError, choose
from epsd.tracking import track
from epsd.types import EpsdError
from preparing.test_write import arrays

SMALL = {
    "data.limit": 12, "architecture.width": 0.5, "prune.batch_size": 32, "threads": 1, "prune.sparsity": 0.8,
    "prune.compare": False, "train.epochs": 2, "train.batch_size": 16, "prune.round_to": 4, "prune.macs": 0.5,
}  # fmt: skip
KINDS = ["weights", "channels"]


def params(**changes: Any) -> Params:
    tree = read_yaml(ROOT / "params.yaml")
    for key, value in {**SMALL, **changes}.items():
        override(tree, key, value)
    return parse(tree)


class Elsewhere:
    """A project that has pruned and trained: its folder, mask, network, and the images it knows."""

    def __init__(self, folder: Path, data: Prepared, structure: str) -> None:
        self.folder, self.data = folder, data
        how = params(**{"prune.structure": structure, "prune.sparsity": 0.5 if structure == "channels" else 0.8})
        found = pruned(how, data)
        self.mask, self.model = found.mask, found.model
        trained(how, data, self.model, self.mask, on_epoch=lambda record: None)
        self.card = card(how, data, self.mask, self.model)
        shapes: Shapes = narrowed(self.model, how.architecture, data.num_classes, data.image_shape)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            artifacts.save_pruned(self.mask, self.model, {}, [{"layer": 1}], found.channels, shapes)
            artifacts.save_model(self.model, artifacts.MODEL, self.card)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("data")
    prepare(choose(DATASETS, {"name": "digits"})(), folder, limit=12)
    return Prepared.load(folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Two classes of pictures in colour."""
    folder = tmp_path_factory.mktemp("other")
    prepare(arrays(60, channels=3), folder, validation=0.2, test=0.2)
    return Prepared.load(folder)


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory, digits: Prepared) -> dict[str, Elsewhere]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {kind: Elsewhere(tmp_path_factory.mktemp(kind), digits, kind) for kind in KINDS}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    shutil.copy(empty_store, tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same(one: nn.Module, other: nn.Module, but: str = "nothing") -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items() if not name.startswith(but))


@pytest.mark.parametrize(
    "wanted", ["folder", "artifacts", "file", "compact", "bare.safetensors", "x.pth", "wrapped.pt", "run", "id"]
)
def test_weights_come_from_wherever_they_are(
    wanted: str, projects: dict[str, Elsewhere], digits: Prepared, here: Path
) -> None:
    project = projects["weights"]
    state = project.model.state_dict()
    places = {
        "folder": project.folder,
        "artifacts": project.folder / "artifacts",
        "file": project.folder / artifacts.MODEL,
    }
    place = str(places.get(wanted, here / wanted))
    if wanted == "compact":
        place += ".safetensors"
        compact_file.save(state, Path(place), project.card)
    elif wanted == "bare.safetensors":
        save_file({f"module.{name}": value.contiguous() for name, value in state.items()}, place)
    elif wanted == "x.pth":
        torch.save(state, place)
    elif wanted == "wrapped.pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in state.items()}, "lr": 0.1}, place)
    elif wanted in ("run", "id"):
        with track("train", experiment="epsd", name="run", tags={"kind": "pipeline"}) as tracker:
            for path in (artifacts.MODEL, artifacts.MODEL_CARD, artifacts.MASK):
                tracker.artifact(project.folder / path, folder="model")
        place = "run" if wanted == "run" else tracker.run_id
    how = params(**{"start.weights": place, "start.mask": "keep"})
    found = pruned(how, digits)
    assert same(found.model, project.model)
    assert found.mask == project.mask
    assert found.report["start_share"] == 1


@pytest.mark.filterwarnings("ignore:no weight survives", "ignore:.*lie on no path")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_mask_is_exact_after_training_on_other_classes(
    kind: str, projects: dict[str, Elsewhere], other: Prepared, here: Path
) -> None:
    """Nothing is scored; the head is new and whole, the images have other channels, a narrow network stays so."""
    project = projects[kind]
    how = params(**{"start.weights": str(project.folder), "start.mask": "keep", "prune.score": {"name": "epsd"}})
    found = pruned(how, other)
    assert "image_passes" not in found.report, "nothing was scored"
    weights = prunable(found.model)
    assert {n: p.shape for n, p in weights.items()} | {"fc.weight": 0, "conv1.weight": 0} == {
        n: p.shape for n, p in prunable(project.model).items()
    } | {"fc.weight": 0, "conv1.weight": 0}
    before = {name: parameter.detach().clone() for name, parameter in found.model.named_parameters()}
    trained(how, other, found.model, found.mask, on_epoch=lambda record: None)
    for name, keep in project.mask.keep.items():
        mine = found.mask.keep[name]
        if name == "fc.weight":
            assert mine.all() and len(mine) == 2
        elif name == "conv1.weight":
            assert torch.equal(mine, keep.expand_as(mine))
        else:
            assert torch.equal(mine, keep)
        assert not weights[name][~mine].any() and not torch.equal(weights[name], before[name])
    assert bool(card(how, other, found.mask, found.model).get("shapes")) == (kind == "channels")


@pytest.mark.filterwarnings("ignore:no weight survives", "ignore:.*lie on no path")
@pytest.mark.parametrize("structure", KINDS)
def test_a_trained_network_is_pruned_by_the_same_command(
    structure: str, projects: dict[str, Elsewhere], digits: Prepared, here: Path
) -> None:
    torch.save(projects["weights"].model.state_dict(), here / "x.pth")
    how = params(**{"start.weights": "x.pth", "prune.structure": structure, "prune.sparsity": 0.9})
    found, drawn = pruned(how, digits), pruned(params(**{"prune.structure": structure, "prune.sparsity": 0.9}), digits)
    assert found.mask.sparsity == pytest.approx(0.9, abs=1e-3) and found.mask != drawn.mask
    assert scoring_key(how) != scoring_key(params(**{"prune.structure": structure, "prune.sparsity": 0.9}))
    if structure == "weights":
        assert same(found.model, projects["weights"].model), "all weights, of which the mask removes some"
    anew = params(**{"start.weights": "x.pth", "start.mask": "keep", "prune.control": "reinitialised"})
    control = pruned(anew, digits)
    assert control.mask == projects["weights"].mask and not same(control.model, projects["weights"].model)


@pytest.mark.filterwarnings("ignore:no weight survives", "ignore:.*lie on no path")
@pytest.mark.parametrize("wanted", ["weights", "channels"])
def test_the_preset_fine_tunes_the_champion(
    wanted: str, projects: dict[str, Elsewhere], digits: Prepared, here: Path
) -> None:
    """`digits-finetune`, and the lines that its head names for channels; from a registered run to a trained network."""
    with track("train", experiment="epsd", name="digits-run", tags={"kind": "pipeline"}) as tracker:
        for path in (artifacts.MODEL, artifacts.MODEL_CARD, artifacts.MASK):
            tracker.artifact(projects["weights"].folder / path, folder="model")
    tree = presets.read("digits-finetune")
    assert tree["start"]["weights"] == "champion" and tree["prune"]["sparsity"] == 0.98
    small = {"start.weights": "digits-run", "architecture.width": 0.5, "train.epochs": 1, "train.batch_size": 16}
    narrow = {"prune.structure": "channels", "prune.sparsity": 0.0, "prune.macs": 0.25, "prune.round_to": 4}
    for key, value in {**small, "prune.batch_size": 32, **(narrow if wanted == "channels" else {})}.items():
        override(tree, key, value)
    how = parse(tree)
    found = pruned(how, digits)
    assert found.report["start_share"] == 1
    if wanted == "channels":
        assert found.report["macs"] <= 0.25
    else:
        assert found.mask.kept == found.mask.total - round(0.98 * found.mask.total)
    trained(how, digits, found.model, found.mask, on_epoch=lambda record: None)
    assert all(not p[~found.mask.keep[name]].any() for name, p in prunable(found.model).items())


def test_another_content_is_another_start(
    projects: dict[str, Elsewhere], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`epsd check --reread` has prune run again, and nothing else."""
    state = projects["weights"].model.state_dict()
    torch.save(state, here / "x.pth")
    how, asked = params(**{"start.weights": "x.pth"}), list[str]()
    artifacts.save_model(nn.Linear(2, 2), artifacts.INITIAL, {})
    changes.remember(stage.start_read(how), content_of)

    class Done:
        returncode = 0

    monkeypatch.setattr(stage.subprocess, "run", lambda command, **_: asked.append(command[-1]) or Done())
    assert stage.reread(how) == 0 and asked == []
    before = content_of("x.pth")
    torch.save({name: value + 1 for name, value in state.items()}, here / "x.pth")
    assert content_of("x.pth") != before
    assert stage.reread(how) == 0 and asked == ["prune"]
    assert content_of(str(projects["weights"].folder)).count("-") == 1, "the mask beside the weights counts too"


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("nowhere.pth", r"start\.weights: .*nowhere\.pth: no such file or folder\. Valid: a file \(\.safetensors"),
        ("./nowhere", r"start\.weights: .*nowhere: no such file or folder"),
        ("no-run", r"start\.weights: no run 'no-run'"),
        ("models:/other/1", r"start\.weights: models:/other/1: no address of a model of epsd"),
        ("params.yaml", r"start\.weights: .*params\.yaml: no weights of epsd"),
        ("code.pth", r"start\.weights: .*code\.pth: holds more than tensors, and no code of a file is run"),
        ("text.pth", r"start\.weights: .*text\.pth: "),
        ("text.safetensors", r"start\.weights: .*text\.safetensors: cannot be read"),
        ("numbers.pth", r"start\.weights: .*numbers\.pth: holds no tensors by name"),
    ],
)
def test_what_is_no_start_is_told_in_one_line(wanted: str, message: str, digits: Prepared, here: Path) -> None:
    (here / "params.yaml").write_text("a: 1")
    torch.save({"state_dict": Evil()}, here / "code.pth")
    torch.save({"a": 1}, here / "numbers.pth")
    for name in ("text.pth", "text.safetensors"):
        (here / name).write_text("no tensors here")
    with pytest.raises(EpsdError, match=message) as error:
        begun(params(**{"start.weights": wanted}), digits)
    assert "\n" not in str(error.value) and not (here / "touched").exists()


def test_what_is_not_there_is_told_before_any_work(here: Path) -> None:
    with pytest.raises(ArtifactError, match=r"start\.weights: .*x\.pth: no such file"):
        stage.check_start(params(**{"start.weights": "x.pth"}))
    stage.check_start(params())
    assert stage.start_read(params()) == {}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("start.mask", "keep", r"start: .*weights: null draws them by seed"),
        ("start.head", "both", r"start\.head: .*'auto', 'keep' or 'new'"),
        ("start.weights", 3, r"start\.weights"),
    ],
)
def test_settings_that_say_nothing_are_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        params(**{key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.freeze": ["layer9"]}, r"train\.freeze: no parameter fits 'layer9'\. Parameters: conv1\.weight, "),
        ({"train.keep": "best"}, r"train\.keep: best is told by validation, and there is none: use last"),
    ],
)
def test_what_train_would_refuse_is_told_before_anything_is_scored(
    change: dict[str, Any], message: str, digits: Prepared
) -> None:
    bare = replace(digits, sizes={**digits.sizes, "validation": 0})
    with pytest.raises(EpsdError, match=message):
        stage.check_training(params(**change), bare)
    stage.check_training(params(**{"train.freeze": ["conv1", "layer[12].*"], "train.keep": "best"}), digits)


def test_a_detector_is_built_on_a_bare_file(
    projects: dict[str, Elsewhere], digits: Prepared, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the network that params.yaml names; its zeros are the mask."""
    monkeypatch.setattr(artifacts, "DATA", digits.folder)
    torch.save(projects["weights"].model.state_dict(), here / "x.pth")
    card, model, mask = backbone(params(**{"detect.backbone": "x.pth"}))
    assert same(model, projects["weights"].model) and mask == projects["weights"].mask
    assert (card["mean"], card["class_names"]) == (digits.mean, digits.class_names)
    with pytest.raises(ArtifactError, match=r"detect\.backbone: .*y\.pth: no such file"):
        backbone(params(**{"detect.backbone": "y.pth"}))


def test_a_run_says_what_it_began_with(digits: Prepared) -> None:
    new, kept = params(**{"start.weights": "x.pth"}), params(**{"start.weights": "x.pth", "start.mask": "keep"})
    assert [method(params()), method(new), method(kept)] == ["epsd", "epsd-transferred", "transferred"]
    assert method(params(**{"start.weights": "x.pth", "prune.sparsity": 0.0})) == "dense-transferred"
    assert run_name(kept) == "transferred-cskd-kept-seed0-digits"
    assert "It began with the weights of `x.pth`. It kept the mask" in story(kept, digits)
    assert "keeps the mask of x.pth" in stage.describe(kept, "prune")


def test_a_file_of_another_network_is_refused_by_the_first_names(digits: Prepared, here: Path) -> None:
    torch.save({"encoder.weight": torch.ones(3, 3)}, here / "x.pth")
    with pytest.raises(StartError, match=r"x\.pth fits nowhere: it has encoder\.weight \(3x3\), .*network conv1"):
        begun(params(**{"start.weights": "x.pth"}), digits)
