"""The detector's loop and its scores: it learns, repeats itself, keeps the mask, and says what went wrong."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devkits import scene
from epsd.architectures.resnet import ResNet
from epsd.compute.shortage import OutOfMemory
from epsd.datasets.digit_scenes import DigitScenes
from epsd.detection import drawing, foreseen
from epsd.detection.average_precision import Detections
from epsd.detection.backbone import DetectionError, follow, sparsity
from epsd.detection.fit import fit_detector, lr_at
from epsd.detection.pictures import Pictures, training_batches
from epsd.detection.score import coco_map, detect, score_detections
from epsd.detectors import Picture
from epsd.detectors.faster_rcnn import FasterRcnn
from epsd.detectors.ssd import Ssd
from epsd.masks import Mask, prunable
from epsd.project.progress import Progress
from epsd.project.recipes import DetectorRecipe
from epsd.training import checkpoints
from epsd.voc.annotations import read_index
from epsd.voc.scenes import Scene

SMALL = FasterRcnn(channels=16, head_width=16, proposals=20, roi_samples=16, anchor_samples=16)
recipe_of = functools.partial(DetectorRecipe, precision="fp32")
RECIPE = recipe_of(epochs=2, batch_size=4, lr=0.05, momentum=0.9, weight_decay=0.01, clip_norm=10.0, warmup_steps=2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Scene]]:
    """A dozen scenes of 48 px with large digits."""
    kit = DigitScenes(train=12, validation=2, test=6, canvas=48, objects=2, smallest=20, largest=28)
    return read_index(kit(tmp_path_factory.mktemp("voc"), seed=0), **kit.reading).scenes


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(depth=20, width=0.25)(10, (1, 8, 8))


def masked() -> tuple[nn.Module, Mask]:
    model = backbone()
    mask = Mask.from_scores({name: p.detach().abs() for name, p in prunable(model).items()}, 0.9)
    mask.apply_(model)
    return model, mask


def detector_of(model: nn.Module, variant: FasterRcnn = SMALL) -> nn.Module:
    torch.manual_seed(1)
    return variant(model, ["layer1", "layer2", "layer3"], Picture(48, 48, [0.2], [0.3]), 10)


# --- the mask ---------------------------------------------------------------------------------------------------------


def test_mask_follows_the_backbone() -> None:
    model, mask = masked()
    detector = detector_of(model)
    moved = follow(mask, model, detector)
    weights = dict(detector.named_parameters())
    assert {f"backbone.body.{name}" for name in mask.keep} - set(moved.keep) == {"backbone.body.fc.weight"}
    assert all(torch.equal(keep, weights[name] != 0) for name, keep in moved.keep.items())
    assert sparsity(detector, moved) == pytest.approx(moved.sparsity)


def test_mask_of_another_network_does_not_follow() -> None:
    _, mask = masked()
    with pytest.raises(DetectionError, match="none of the classifier's masked weights"):
        follow(mask, backbone(), detector_of(backbone()))


def test_removed_weights_stay_exactly_zero_and_the_others_learn(scenes: dict[str, list[Scene]]) -> None:
    """Under momentum and weight decay; the detector's own layers are dense."""
    model, mask = masked()
    detector = detector_of(model)
    moved = follow(mask, model, detector)
    before = {name: p.detach().clone() for name, p in detector.named_parameters()}
    fit_detector(detector, scenes["train"], RECIPE, channels=1, mask=moved)
    weights = dict(detector.named_parameters())
    for name, keep in moved.keep.items():
        assert not weights[name][~keep].any()
        assert not torch.equal(weights[name][keep], before[name][keep])
    assert sparsity(detector, moved) == pytest.approx(moved.sparsity, abs=1e-4)
    assert all(float(p.detach().abs().min()) > 0 for n, p in weights.items() if n == "roi_heads.box_head.fc6.weight")


def test_weights_that_came_back_are_removed_before_the_first_step(scenes: dict[str, list[Scene]]) -> None:
    model, mask = masked()
    detector = detector_of(model)
    moved = follow(mask, model, detector)
    with torch.no_grad():
        for name in moved.keep:
            detector.get_parameter(name).add_(1.0)
    fit_detector(detector, scenes["train"][:1], recipe_of(epochs=1, batch_size=1, lr=1e-9), channels=1, mask=moved)
    assert sparsity(detector, moved) == pytest.approx(moved.sparsity, abs=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------


def test_learns_scenes_by_heart(scenes: dict[str, list[Scene]]) -> None:
    roomy = FasterRcnn(channels=32, head_width=64, proposals=30, roi_samples=16, anchor_samples=32)
    detector = detector_of(backbone(), roomy)
    few = scenes["train"][:4]
    recipe = recipe_of(epochs=80, batch_size=4, lr=0.05, clip_norm=10.0, warmup_steps=5)
    history = fit_detector(detector, few, recipe, channels=1)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    names = [str(digit) for digit in range(10)]
    before = score_detections(detect(detector_of(backbone()), few, channels=1), few, names).summary["map50"]
    after = score_detections(detect(detector, few, channels=1), few, names).summary["map50"]
    assert before < 0.2
    assert after > 0.8


def test_same_seed_same_weights_and_history(scenes: dict[str, list[Scene]]) -> None:
    def run(seed: int) -> tuple[list[Tensor], list[float]]:
        detector = detector_of(backbone())
        torch.manual_seed(seed + 100)  # the caller's random state must not matter
        history = fit_detector(detector, scenes["train"], RECIPE, channels=1, seed=seed)
        return list(detector.parameters()), [row["loss"] for row in history]

    (first, losses), (second, again), (third, _) = run(0), run(0), run(1)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def test_the_callers_random_state_is_left_alone(scenes: dict[str, list[Scene]]) -> None:
    before = torch.random.get_rng_state()
    fit_detector(detector_of(backbone()), scenes["train"][:2], recipe_of(epochs=1, batch_size=2, lr=0.01), channels=1)
    torch.manual_seed(1)  # detector_of draws from the global state: compare from the same point
    detector = detector_of(backbone())
    before = torch.random.get_rng_state()
    fit_detector(detector, scenes["train"][:2], recipe_of(epochs=1, batch_size=2, lr=0.01), channels=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_lone_last_picture_joins_the_batch_before() -> None:
    assert training_batches(range(9), 4) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert training_batches(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert training_batches(range(3), 1) == [[0], [1], [2]]
    assert training_batches(range(1), 4) == [[0]]


def ladder(scenes: list[Scene], batch_size: int) -> list[dict[str, float]]:
    """SSD whose last map is down to one cell."""
    torch.manual_seed(0)
    model = ResNet(depth=20, width=0.25)(10, (1, 8, 8))
    detector = Ssd(channels=8, extra_levels=4)(model, ["layer1", "layer2", "layer3"], Picture(48, 48, [0.2], [0.3]), 10)
    return fit_detector(detector, scenes, RECIPE.model_copy(update={"batch_size": batch_size, "epochs": 1}), channels=1)


def test_maps_of_one_cell_need_two_pictures(scenes: dict[str, list[Scene]]) -> None:
    assert len(ladder(scenes["train"][:5], 4)) == 1
    with pytest.raises(DetectionError, match=r"detect\.batch_size: .* a single value of a map of one cell"):
        ladder(scenes["train"][:2], 1)


def test_history_has_every_figure(scenes: dict[str, list[Scene]]) -> None:
    seen: list[dict[str, float]] = []
    history = fit_detector(detector_of(backbone()), scenes["train"], RECIPE, channels=1, on_epoch=seen.append)
    assert seen == history
    assert [row["epoch"] for row in history] == [1, 2]
    terms = ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]
    for row in history:
        assert row["loss"] == pytest.approx(sum(row[term] for term in terms), rel=1e-4)
        assert row["gradient_norm"] > 0
        assert row["seconds"] > 0


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    recipe = recipe_of(epochs=1, batch_size=1, lr=1.0, warmup_steps=4)
    factors = [lr_at(recipe, step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.25, rel=1e-3)
    assert max(factors) == max(factors[3:6]) <= 1
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert lr_at(recipe_of(epochs=1, batch_size=1, lr=1.0), 0, 10) == 1


class Broken(nn.Module):
    """A detector whose loss stops being a number at a given step."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.weight, self.left = nn.Parameter(torch.ones(1)), good

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.left -= 1
        return {"loss_fine": self.weight.sum(), "loss_odd": self.weight.sum() * (math.nan if self.left < 0 else 1)}


def test_a_loss_that_is_no_number_stops_and_says_where(scenes: dict[str, list[Scene]]) -> None:
    broken = Broken(good=5)  # one step is tried before the first
    with pytest.raises(DetectionError, match=r"epoch 2, step 2 \(loss nan, loss_odd nan\).*detect\.lr") as caught:
        fit_detector(broken, scenes["train"], recipe_of(epochs=3, batch_size=4, lr=0.1), channels=1)
    assert "\n" not in str(caught.value)
    assert torch.isfinite(broken.weight).all()


def test_no_picture_to_train_on() -> None:
    with pytest.raises(DetectionError, match="no training picture"):
        fit_detector(detector_of(backbone()), [], RECIPE, channels=1)


@pytest.mark.parametrize("flip", [False, True])
def test_a_training_that_stops_inside_an_epoch_goes_on_to_the_same_bits(
    scenes: dict[str, list[Scene]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: bool
) -> None:
    """As a long one does, which saves every few minutes."""
    recipe, path = RECIPE.model_copy(update={"flip": flip}), tmp_path / "c.safetensors"
    whole = detector_of(backbone())
    history = fit_detector(whole, scenes["train"], recipe, channels=1)
    monkeypatch.setattr("epsd.detection.fit.SAVE_EVERY", 0.0)
    done: list[int] = []

    def step(self: Progress, count: int = 1) -> None:
        done.append(count)
        if len(done) == 5:  # of six steps; the fifth is the second of the second epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "step", step)
        with pytest.raises(KeyboardInterrupt):
            fit_detector(detector_of(backbone()), scenes["train"], recipe, channels=1, checkpoint=path, mark="m")
    state = checkpoints.load(path, "m")
    assert state is not None and len(state["history"]) == 1 and state["part"]["steps"] == 2
    again = detector_of(backbone())
    resumed = fit_detector(again, scenes["train"], recipe, channels=1, checkpoint=path, mark="m")
    assert [row | {"seconds": 0} for row in resumed] == [row | {"seconds": 0} for row in history]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_much_time_and_memory_is_told_before_the_first_step(
    scenes: dict[str, list[Scene]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing else. What was tried leaves no trace."""
    with monkeypatch.context() as patched:
        patched.setattr(foreseen, "check", lambda *args, **settings: foreseen.Need(0, math.inf, math.inf))
        plain = fit_detector(detector_of(backbone()), scenes["train"], RECIPE, channels=1)
    fit_detector(detector_of(backbone()), scenes["train"][:2], RECIPE, channels=1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(foreseen, "LONG", 0.0)
    told = fit_detector(detector_of(backbone()), scenes["train"], RECIPE, channels=1)
    line = capsys.readouterr().err
    assert re.fullmatch(
        r"detect: foreseen: [\d.]+ s for a step, \d+ s in all( \(without the others, which .*\))?; "
        r"a step on 4 pictures needs about [\d.]+ GB, the whole stage up to [\d.]+ GB, .* free\.\n",
        line,
    )
    assert [row["loss"] for row in plain] == [row["loss"] for row in told]
    monkeypatch.setattr("epsd.compute.shortage.free", lambda device: 1000)
    with pytest.raises(
        OutOfMemory, match=r"detect: out of memory: a step on 4 pictures needs about .*detect\.batch_size"
    ):
        fit_detector(detector_of(backbone()), scenes["train"], RECIPE, channels=1)


def test_what_is_foreseen_is_what_a_step_takes() -> None:
    """Bytes per picture of a layer whose need is known: what it gives, and what it was given."""

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {"loss": torch.stack([(image * self.weight).pow(2).mean() for image in images]).sum()}

    samples = [(torch.rand(1, 100, 100), {"boxes": torch.zeros(0, 4)})] * 2
    found = foreseen.tried(Known(), samples, torch.device("cpu"), None)
    assert found.bytes == pytest.approx(
        2 * 4 * 100 * 100, rel=0.51
    )  # the product; the picture itself, which is one here
    assert [foreseen.duration(seconds) for seconds in (4, 600, 9000)] == ["4 s", "10 minutes", "2.5 hours"]


def test_few_pictures_are_gone_over_more_often() -> None:
    """`auto`: 400 steps, and 8 epochs at least."""
    auto = recipe_of(batch_size=8, lr=0.1)
    assert [auto.passes(pictures) for pictures in (0, 8, 100, 400, 401, 5000)] == [400, 400, 31, 8, 8, 8]
    assert recipe_of(epochs=3, batch_size=8, lr=0.1).passes(100) == 3


def test_half_precision_trains(scenes: dict[str, list[Scene]]) -> None:
    history = fit_detector(
        detector_of(backbone()),
        scenes["train"][:4],
        recipe_of(epochs=1, batch_size=4, lr=0.01, precision="bf16"),
        channels=1,
    )
    assert math.isfinite(history[0]["loss"])


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_difficult_objects_are_not_learnt(scenes: dict[str, list[Scene]]) -> None:
    one = next(s for s in scenes["train"] if len(s.labels) == 2)
    hard = dataclasses.replace(one, difficult=np.array([True, False]))
    _, target = Pictures([hard], 1)[0]
    assert target["boxes"].tolist() == [one.boxes[1].tolist()]
    assert target["labels"].tolist() == [one.labels[1] + 1]


def test_a_mirrored_box_still_holds_its_digit(scenes: dict[str, list[Scene]]) -> None:
    plain, mirrored = Pictures(scenes["train"], 1), Pictures(scenes["train"], 1)
    mirrored.flip = torch.ones(len(mirrored), dtype=torch.bool)
    (image, target), (other, turned) = plain[0], mirrored[0]
    for box, box2 in zip(target["boxes"].int().tolist(), turned["boxes"].int().tolist(), strict=True):
        inside = image[:, box[1] : box[3], box[0] : box[2]]
        assert torch.equal(inside.flip(2), other[:, box2[1] : box2[3], box2[0] : box2[2]])


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_pictures_train_as_kept_ones(
    scenes: dict[str, list[Scene]], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    recipe = recipe_of(epochs=1, batch_size=4, lr=0.01, flip=True)
    kept = fit_detector(detector_of(backbone()), scenes["train"], recipe, channels=1)
    monkeypatch.setattr("epsd.detection.pictures.IN_MEMORY_UP_TO", 0)
    streamed = fit_detector(detector_of(backbone()), scenes["train"], recipe, channels=1, workers=workers)
    assert kept[0]["loss"] == streamed[0]["loss"]


def test_detect_leaves_the_detector_as_it_was(scenes: dict[str, list[Scene]]) -> None:
    detector = detector_of(backbone()).train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    found = detect(detector, scenes["test"], channels=1, batch_size=4)
    assert detector.training
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert len(found) == len(scenes["test"])
    for one in found:
        assert (np.diff(one.scores) <= 0).all()
        assert set(one.labels.tolist()) <= set(range(10))


# --- scores -----------------------------------------------------------------------------------------------------------

BOX, FAR = (10.0, 10.0, 30.0, 30.0), (60.0, 60.0, 80.0, 80.0)
NAMES = ["cat", "dog", "cow"]


def found(*some: tuple[int, float, tuple[float, float, float, float]]) -> Detections:
    boxes = np.array([box for _, _, box in some], dtype=np.float64).reshape(-1, 4)
    return Detections(boxes, np.array([s for _, s, _ in some], float), np.array([n for n, _, _ in some], np.int64))


def test_perfect_detections() -> None:
    scenes = [scene((0, BOX), (1, FAR)), scene((0, FAR))]
    report = score_detections([found((0, 0.9, BOX), (1, 0.8, FAR)), found((0, 0.7, FAR))], scenes, NAMES)
    assert report.summary == pytest.approx({"map50": 1, "map50_11point": 1, "map": 1, "map75": 1})
    assert [row["objects"] for row in report.classes] == [2, 1, 0]
    assert report.classes[0] | {"ap": 1.0} == {
        "class": "cat", "pictures": 2, "objects": 2, "difficult": 0, "ap": 1.0, "ap_11point": pytest.approx(1),
        "recall": 1.0,
    }  # fmt: skip
    assert math.isnan(report.classes[2]["ap"])


def test_mean_goes_over_classes_that_are_there() -> None:
    report = score_detections([found((0, 0.9, BOX))], [scene((0, BOX), (1, FAR))], NAMES)
    assert report.summary["map50"] == pytest.approx(0.5)
    assert report.summary["map"] == pytest.approx(0.5)


def test_loose_boxes_count_for_voc_and_less_for_coco() -> None:
    """An overlap of 0.6: right at 0.5, 0.55 and (just) 0.6; wrong at the other seven of COCO's ten thresholds."""
    loose = found((0, 0.9, (10, 10, 30, 22.05)))
    report = score_detections([loose], [scene((0, BOX))], NAMES)
    assert report.summary == pytest.approx({"map50": 1, "map50_11point": 1, "map": 0.3, "map75": 0}, abs=1e-6)


def test_coco_passes_over_difficult_objects_too() -> None:
    scenes = [scene((0, BOX, True), (0, FAR))]
    report = score_detections([found((0, 0.9, BOX), (0, 0.8, FAR))], scenes, NAMES)
    assert report.summary == pytest.approx({"map50": 1, "map50_11point": 1, "map": 1, "map75": 1})
    assert report.classes[0]["difficult"] == 1


def test_nothing_found() -> None:
    assert score_detections([found()], [scene((0, BOX))], NAMES).summary["map"] == 0
    with pytest.raises(DetectionError, match="no object that counts"):
        score_detections([found((0, 0.9, BOX))], [scene((0, BOX, True))], NAMES)


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_marks_tell_right_wrong_missed_and_difficult_apart() -> None:
    objects = scene((0, BOX), (1, FAR), (2, (0, 40, 9, 60), True))
    some = drawing.marks(found((0, 0.9, BOX), (0, 0.8, (40, 5, 60, 25)), (1, 0.3, FAR)), objects, NAMES)
    assert [(mark.text, mark.style) for mark in some] == [
        ("cat 0.90", drawing.RIGHT),
        ("cat 0.80", drawing.WRONG),
        ("dog", drawing.MISSED),  # found, but with too low a score to be shown
        ("cow", drawing.PASSED),
    ]
    assert drawing.mistakes(some) == 2
    assert len({style.line for style in drawing.STYLES}) == len({style.colour for style in drawing.STYLES}) == 4


def test_pictures_are_spread_and_the_worst_are_among_them() -> None:
    scenes = [scene((0, BOX)) for _ in range(9)]
    detections = [found((0, 0.9, BOX)) for _ in range(9)]
    detections[5] = found((1, 0.9, BOX), (1, 0.8, FAR))
    assert drawing.choose_pictures(detections, scenes, NAMES, 3) == [0, 8, 5]
    assert drawing.choose_pictures(detections, scenes, NAMES, 0) == []
    assert sorted(drawing.choose_pictures(detections, scenes, NAMES, 50)) == list(range(9))


@pytest.mark.parametrize("channels", [1, 3])
def test_gallery_is_drawn(scenes: dict[str, list[Scene]], tmp_path: Path, channels: int) -> None:
    from PIL import Image

    from epsd.figures import style as figures

    names = [str(digit) for digit in range(10)]
    perfect = [Detections(s.boxes, np.ones(len(s.labels)), s.labels) for s in scenes["test"]]
    figure = drawing.gallery(scenes["test"][:4], perfect[:4], names, channels)
    figures.save(figure, tmp_path / "some.png")
    green = (np.asarray(Image.open(tmp_path / "some.png").convert("RGB")) == (0, 0x9E, 0x73)).all(2)
    assert green.sum() > 100
    blank = drawing.gallery(scenes["test"][:4], [found()] * 4, names, channels)
    figures.save(blank, tmp_path / "blank.png")
    drawn = (np.asarray(Image.open(tmp_path / "blank.png").convert("RGB")) == (0, 0x9E, 0x73)).all(2)
    assert drawn.sum() < green.sum() / 4  # the legend's sample only


@pytest.mark.parametrize(("size", "inches"), [((48, 48), 3.6), ((800, 400), 8.0), ((4000, 3000), 10.0)])
def test_a_larger_picture_is_drawn_larger_and_nothing_of_it_is_cut(
    tmp_path: Path, size: tuple[int, int], inches: float
) -> None:
    """Neither legend nor words, in a crowd of objects with long names."""
    from PIL import Image

    Image.new("RGB", size).save(path := tmp_path / "p.png")
    random = np.random.default_rng(0)
    corners = random.uniform(0, 0.9, (25, 2)) * size
    crowd = scene(
        *((int(n % 3), (x, y, x + size[0] / 12, y + size[1] / 12)) for n, (x, y) in enumerate(corners)), size=size
    )
    crowd = dataclasses.replace(crowd, image=path)
    some = Detections(crowd.boxes, np.full(25, 0.9), (crowd.labels + np.arange(25) // 9) % 3)
    figure = drawing.gallery([crowd], [some], ["cat" * 20, "日本", "cow"], 3)
    assert figure.get_figwidth() == pytest.approx(inches)
    from epsd.figures import style as figures

    figures.save(figure, tmp_path / "drawn.png")
    (axes,), (legend,) = figure.axes, figure.legends
    whole = figure.bbox
    for part in (legend, *axes.texts):
        box = part.get_window_extent()
        assert whole.x0 - 1 <= box.x0 and box.x1 <= whole.x1 + 1 and whole.y0 - 1 <= box.y0 and box.y1 <= whole.y1 + 1
    assert len(axes.texts) >= 25


def test_coco_figures_are_those_of_torchmetrics(tmp_path: Path) -> None:
    from torchmetrics.detection import MeanAveragePrecision

    random = np.random.default_rng(0)
    scenes, found = [], []
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    for number in range(12):
        corners = random.uniform(0, 60, (4, 2))
        boxes = np.concatenate([corners, corners + random.uniform(5, 40, (4, 2))], axis=1)
        labels, difficult = random.integers(0, 3, 4), random.random(4) < 0.3
        scenes.append(Scene(str(number), tmp_path, 100, 100, boxes, labels, difficult))
        near = np.concatenate([boxes + random.normal(0, 2, boxes.shape), boxes[:2] + 15])
        found.append(Detections(near, random.random(6), np.concatenate([labels, random.integers(0, 4, 2)])))
        metric.update(
            [_tensors(found[-1].boxes, found[-1].labels) | {"scores": torch.from_numpy(found[-1].scores).float()}],
            [_tensors(boxes, labels) | {"iscrowd": torch.from_numpy(difficult.astype(np.int64))}],
        )
    theirs = metric.compute()
    ours = coco_map(found, scenes)
    assert 0.1 < ours["map"] < 0.9
    assert ours == pytest.approx({"map": float(theirs["map"]), "map75": float(theirs["map_75"])}, abs=1e-6)


def _tensors(boxes: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    return {"boxes": torch.from_numpy(boxes).float(), "labels": torch.from_numpy(labels)}


def test_coco_figures_of_no_detection_at_all(scenes: dict[str, list[Scene]]) -> None:
    nothing = Detections(np.empty((0, 4)), np.empty(0), np.empty(0, dtype=np.int64))
    assert coco_map([nothing] * len(scenes["test"]), scenes["test"]) == {"map": 0.0, "map75": 0.0}
