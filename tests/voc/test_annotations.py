"""Reading devkits, and average precision against hand-computed cases and a second, independent implementation."""

import io
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import shared_file
from devkits import devkit, scene, xml
from epsd.files.images import ImageError
from epsd.project import artifacts
from epsd.project.artifacts import ArtifactError
from epsd.voc import annotations
from epsd.voc.annotations import HIT, IGNORED, MISS, NOTHING, Detections, VocError
from pictures import write

CAT, DOG = 0, 1
GOOD = {
    "train": {"000001": [("cat", (1, 1, 40, 30)), ("dog", (5, 6, 7, 9), 1)], "000002": [("dog", (2, 2, 20, 12))]},
    "val": {"000003": [("cat", (3, 3, 9, 9))]},
    "test": {"000004": [("cat", (3, 3, 9, 9)), ("cat", (10, 10, 20, 20), 0)]},
}
FOLDER = Path("VOCdevkit/VOC2007")


def sources(root: Path) -> dict[str, list[tuple[Path, str]]]:
    folder = root / FOLDER
    return {"train": [(folder, "train")], "validation": [(folder, "val")], "test": [(folder, "test")]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path, devkit(GOOD))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_reads_what_the_devkit_says(root: Path) -> None:
    index = annotations.read_index(sources(root))
    assert index.class_names == ["cat", "dog"]
    first = index.scenes["train"][0]
    assert (first.width, first.height) == (40, 30)
    assert first.boxes.tolist() == [[0, 0, 40, 30], [4, 5, 7, 9]]  # 1-based and inclusive -> corners of pixels
    assert first.labels.tolist() == [0, 1]
    assert first.difficult.tolist() == [False, True]
    assert index.counts() == {
        "train": {"pictures": 2, "objects": 3, "difficult": 1},
        "validation": {"pictures": 1, "objects": 1, "difficult": 0},
        "test": {"pictures": 1, "objects": 2, "difficult": 0},
    }


def test_reads_what_torchvision_reads(root: Path) -> None:
    from torchvision.datasets import VOCDetection

    index = annotations.read_index(sources(root))
    theirs = VOCDetection(str(root), year="2007", image_set="train")
    for mine, (picture, target) in zip(index.scenes["train"], theirs, strict=True):
        boxes = [
            [float(o["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax")] for o in target["annotation"]["object"]
        ]
        assert (mine.boxes + np.array([1, 1, 0, 0])).tolist() == boxes
        assert np.array_equal(annotations.read_picture(mine, 3), np.asarray(picture).transpose(2, 0, 1))


def test_index_survives_saving_and_moving(root: Path) -> None:
    index = annotations.read_index(sources(root))
    index.save(root / "voc.json")
    moved = root.parent / "elsewhere"
    shutil.move(root, moved)
    again = annotations.VocIndex.load(moved / "voc.json")
    assert (again.class_names, again.digest, again.counts()) == (index.class_names, index.digest, index.counts())
    for before, after in zip(index.scenes["train"], again.scenes["train"], strict=True):
        assert np.array_equal(before.boxes, after.boxes)
        assert np.array_equal(before.difficult, after.difficult)
        assert annotations.read_picture(after, 1).shape == (1, 30, 40)


def test_index_of_something_else_is_refused(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "voc.json", {"class_names": []})
    with pytest.raises(VocError, match=r"voc\.json: not an index"):
        annotations.VocIndex.load(tmp_path / "voc.json")
    with pytest.raises(ArtifactError, match=r"none\.json: missing"):
        annotations.VocIndex.load(tmp_path / "none.json")


def test_digest_follows_boxes_and_pictures(root: Path) -> None:
    before = annotations.read_index(sources(root)).digest
    assert annotations.read_index(sources(root)).digest == before
    (root / FOLDER / "Annotations/000002.xml").write_bytes(xml([("dog", (2, 2, 20, 13))]))
    assert annotations.read_index(sources(root)).digest != before


def test_limit_draws_by_seed_and_keeps_the_order(tmp_path: Path) -> None:
    many = {f"{n:02d}": [("cat", (1, 1, 9, 9))] for n in range(20)}
    root = write(tmp_path, devkit({"train": many, "val": GOOD["val"], "test": GOOD["test"]}))
    drawn = [
        [s.id for s in annotations.read_index(sources(root), limit=5, seed=seed).scenes["train"]] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 5
    assert drawn[0] == sorted(drawn[0])


def test_two_years_make_one_split(root: Path) -> None:
    more = {"train": {"2008_000001": [("bird", (1, 1, 9, 9))]}}
    write(root, devkit(more, prefix="VOCdevkit/VOC2012"))
    both = sources(root) | {"train": [(root / FOLDER, "train"), (root / "VOCdevkit/VOC2012", "train")]}
    index = annotations.read_index(both)
    assert [s.id for s in index.scenes["train"]] == ["000001", "000002", "2008_000001"]
    assert index.class_names == ["bird", "cat", "dog"]


def test_second_column_of_a_class_file_is_no_id(root: Path) -> None:
    (root / FOLDER / "ImageSets/Main/cat_train.txt").write_text("000001  1\n000002 -1\n")
    assert annotations.read_image_set(root / FOLDER, "cat_train") == ["000001", "000002"]


def _damage(root: Path, name: str, content: bytes | None) -> None:
    path = root / FOLDER / name
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Annotations/000002.xml", None, r"000002\.xml: no such annotation"),
        ("Annotations/000002.xml", b"<annotation><object>", r"000002\.xml: not a readable XML"),
        ("Annotations/000002.xml", xml([]), r"000002\.xml: no boxes.*'background'"),
        (
            "Annotations/000002.xml",
            xml([("dog", (5, 5, 5, 9))]),
            r"000002\.xml: the box of object 1 \(dog.*has no area",
        ),
        ("Annotations/000002.xml", xml([("dog", (9, 5, 7, 9))]), r"000002\.xml: .*has no area"),
        ("Annotations/000002.xml", xml([("dog", (5, 5, 50, 9))]), r"000002\.xml: .*outside the picture of 40x30"),
        ("Annotations/000002.xml", xml([("dog", (-5, 5, 9, 9))]), r"000002\.xml: .*outside"),
        ("Annotations/000002.xml", xml([("cow", (5, 5, 8, 9))]), r"000002\.xml: unknown class 'cow'.*cat, dog"),
        ("Annotations/000002.xml", xml([("", (5, 5, 8, 9))]), r"000002\.xml: object 1 has no name"),
        ("Annotations/000002.xml", xml([("dog", ("a", 5, 8, 9))]), r"000002\.xml: xmin in bndbox of object 1 is 'a'"),  # type: ignore[list-item]
        ("Annotations/000002.xml", xml([("dog", ("nan", 5, 8, 9))]), r"000002\.xml: xmin.*'nan'"),  # type: ignore[list-item]
        (
            "Annotations/000002.xml",
            b"<annotation><object><name>dog</name></object></annotation>",
            r"000002\.xml: object 1 has no bndbox",
        ),
        (
            "Annotations/000002.xml",
            xml([("dog", (5, 5, 8, 9))]).replace(b"<bndbox>", b"<difficult>Unspecified</difficult><bndbox>"),
            r"000002\.xml: difficult is 'Unspecified', expected 0 or 1",
        ),
        (
            "Annotations/000002.xml",
            b"<annotation><size><width>80</width><height>60</height></size></annotation>",
            r"000002\.xml: states a size of 80x60, the picture has 40x30",
        ),
        ("Annotations/000002.xml", b'<?xml version="1.0" encoding="foo-8"?><a/>', r"000002\.xml: not a readable XML"),
        ("JPEGImages/000002.jpg", None, r"000002\.jpg: no such picture"),
        ("JPEGImages/000002.jpg", b"no picture", r"000002\.jpg: not an image"),
        ("ImageSets/Main/train.txt", None, r"train\.txt: no such image set\. Found there: test, val"),
        ("ImageSets/Main/train.txt", b"\n", r"train\.txt: lists no picture"),
        ("ImageSets/Main/test.txt", b"000001\n", r"000001 \(1 in all\) is both in train and in test"),
        ("ImageSets/Main/val.txt", b"000001\n", r"000001 \(1 in all\) is both in train and in validation"),
    ],
)
def test_bad_devkit_is_named(root: Path, name: str, content: bytes | None, message: str) -> None:
    _damage(root, name, content)
    with pytest.raises((VocError, ImageError), match=message) as caught:
        annotations.read_index(sources(root), class_names=["cat", "dog"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "flag"), [("1", True), (" True ", True), ("0", False), ("false", False), ("", False)])
def test_what_is_flagged_difficult(tmp_path: Path, text: str, flag: bool) -> None:
    path = tmp_path / "a.xml"
    path.write_bytes(
        xml([("dog", (5, 5, 8, 9))]).replace(b"<bndbox>", f"<difficult>{text}</difficult><bndbox>".encode())
    )
    assert annotations.read_annotation(path).difficult.tolist() == [flag]


def test_a_test_split_needs_an_object_that_counts(root: Path) -> None:
    for path in (root / FOLDER / "Annotations").glob("*.xml"):
        content = path.read_bytes().replace(b"<difficult>0</difficult>", b"")
        path.write_bytes(content.replace(b"<bndbox>", b"<difficult>1</difficult><bndbox>"))
    with pytest.raises(VocError, match=r"voc\.test: holds no object that counts"):
        annotations.read_index(sources(root))


def test_truncated_picture_is_named(root: Path) -> None:
    path = root / FOLDER / "JPEGImages/000002.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ImageError, match=r"000002\.jpg: cannot be read as an image"):
        annotations.read_index(sources(root))


def test_empty_picture_can_stay_as_background(root: Path) -> None:
    _damage(root, "Annotations/000002.xml", xml([]))
    index = annotations.read_index(sources(root), empty="background")
    assert index.scenes["train"][1].boxes.shape == (0, 4)


def test_bad_boxes_can_be_dropped_and_are_counted(root: Path) -> None:
    bad = [("dog", (5, 5, 5, 9)), ("cat", (2, 3, 8, 9)), ("dog", (5, 5, 500, 9))]
    _damage(root, "Annotations/000002.xml", xml(bad))
    index = annotations.read_index(sources(root), bad_boxes="drop")
    assert index.dropped == 2
    assert index.scenes["train"][1].boxes.tolist() == [[1, 2, 8, 9]]
    assert index.scenes["train"][1].labels.tolist() == [CAT]


def test_boxes_counted_from_zero_are_clipped(root: Path) -> None:
    _damage(root, "Annotations/000002.xml", xml([("dog", (0, 0, 40, 30))]))
    assert annotations.read_index(sources(root)).scenes["train"][1].boxes.tolist() == [[0, 0, 40, 30]]


def test_repeated_class_name_and_missing_splits(root: Path) -> None:
    with pytest.raises(VocError, match="'cat' is there twice"):
        annotations.read_index(sources(root), class_names=["cat", "dog", "cat"])
    with pytest.raises(VocError, match=r"voc\.test: names no image set"):
        annotations.read_index({**sources(root), "test": []})


def test_exif_turns_the_picture_only_where_the_boxes_mean_it(root: Path) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[annotations.EXIF_ORIENTATION] = 6
    Image.new("RGB", (40, 30), "red").save(stream, "JPEG", exif=exif)
    _damage(root, "JPEGImages/000002.jpg", stream.getvalue())
    stored = annotations.read_index(sources(root)).scenes["train"][1]
    assert (stored.width, stored.height) == (40, 30)
    assert annotations.read_picture(stored, 3).shape == (3, 30, 40)
    _damage(root, "Annotations/000002.xml", xml([("dog", (2, 2, 20, 40))], size=(30, 40)))
    turned = annotations.read_index(sources(root)).scenes["train"][1]
    assert (turned.width, turned.height) == (30, 40)
    assert annotations.read_picture(turned, 3).shape == (3, 40, 30)


def test_grey_and_colour(root: Path) -> None:
    one = annotations.read_index(sources(root)).scenes["train"][0]
    assert annotations.read_picture(one, 1).shape == (1, 30, 40)
    assert annotations.read_picture(one, 3).dtype == np.uint8


# --- average precision: by hand ---------------------------------------------------------------------------------------


def found(*some: tuple[int, float, tuple[float, float, float, float]]) -> Detections:
    """(label, score, box)."""
    boxes = np.array([box for _, _, box in some], dtype=np.float64).reshape(-1, 4)
    return Detections(boxes, np.array([s for _, s, _ in some], float), np.array([n for n, _, _ in some], np.int64))


BOX, FAR = (10.0, 10.0, 30.0, 30.0), (60.0, 60.0, 80.0, 80.0)


def test_overlap_is_the_devkits_with_its_plus_one() -> None:
    random = np.random.default_rng(0)
    low = random.integers(1, 50, (40, 2))
    inclusive = np.hstack([low, low + random.integers(0, 30, (40, 2))]).astype(float)
    ours = annotations.overlaps(inclusive[:20] - [1, 1, 0, 0], inclusive[20:] - [1, 1, 0, 0])
    for row, (a, b, c, d) in enumerate(inclusive[:20]):
        for column, (e, f, g, h) in enumerate(inclusive[20:]):
            width, height = min(c, g) - max(a, e) + 1, min(d, h) - max(b, f) + 1
            shared = width * height if width > 0 and height > 0 else 0
            union = (c - a + 1) * (d - b + 1) + (g - e + 1) * (h - f + 1) - shared
            assert ours[row, column] == pytest.approx(shared / union, abs=1e-15)


def test_an_overlap_of_exactly_one_half_counts() -> None:
    verdicts = annotations.judge(found((CAT, 0.9, (0, 0, 10, 5))), scene((CAT, (0, 0, 10, 10))), CAT)
    assert verdicts.kinds.tolist() == [HIT]
    assert annotations.judge(found((CAT, 0.9, (0, 0, 10, 4.99))), scene((CAT, (0, 0, 10, 10))), CAT).kinds.tolist() == [
        MISS
    ]


def test_second_detection_of_an_object_is_a_miss() -> None:
    verdicts = annotations.judge(found((CAT, 0.9, BOX), (CAT, 0.8, BOX)), scene((CAT, BOX), (CAT, FAR)), CAT)
    assert verdicts.kinds.tolist() == [HIT, MISS]
    assert verdicts.objects.tolist() == [0, NOTHING]


def test_a_detection_goes_to_its_best_object_only() -> None:
    """The second box overlaps both objects by more than a half, but mostly the one that is taken."""
    objects = scene((CAT, (0, 0, 20, 10)), (CAT, (0, 4, 20, 14)))
    verdicts = annotations.judge(found((CAT, 0.9, (0, 0, 20, 10)), (CAT, 0.8, (0, 1, 20, 11))), objects, CAT)
    assert verdicts.kinds.tolist() == [HIT, MISS]


def test_difficult_objects_are_ignored_however_often_they_are_found() -> None:
    verdicts = annotations.judge(found((CAT, 0.9, BOX), (CAT, 0.8, BOX)), scene((CAT, BOX, True)), CAT)
    assert verdicts.kinds.tolist() == [IGNORED, IGNORED]
    one = annotations.curve([found((CAT, 0.9, BOX), (CAT, 0.8, FAR))], [scene((CAT, BOX, True), (CAT, FAR))], CAT)
    assert (one.objects, one.precision.tolist(), one.recall.tolist()) == (1, [1.0], [1.0])


def test_other_classes_do_not_count() -> None:
    verdicts = annotations.judge(found((DOG, 0.9, BOX), (CAT, 0.8, BOX)), scene((CAT, BOX), (DOG, FAR)), DOG)
    assert verdicts.kinds.tolist() == [MISS]


def test_average_precision_by_hand() -> None:
    """Hit, miss, hit over two pictures with four objects: precision 1, 1/2, 2/3 at recall 1/4, 1/4, 1/2."""
    scenes = [scene((CAT, BOX), (CAT, FAR)), scene((CAT, BOX), (CAT, FAR))]
    detections = [found((CAT, 0.5, FAR), (CAT, 0.9, BOX)), found((CAT, 0.7, (0, 0, 5, 5)))]
    one = annotations.curve(detections, scenes, CAT)
    assert one.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert one.recall.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    assert annotations.ap_area(one) == pytest.approx(1 / 4 * 1 + 1 / 4 * 2 / 3)
    assert annotations.ap_11point(one) == pytest.approx(
        (3 * 1 + 3 * 2 / 3) / 11
    )  # recall 0, 0.1, 0.2; then 0.3, 0.4, 0.5


def test_nothing_found_and_nothing_to_find() -> None:
    missed = annotations.curve([found()], [scene((CAT, BOX))], CAT)
    assert (annotations.ap_area(missed), annotations.ap_11point(missed)) == (0.0, 0.0)
    nothing = annotations.curve([found((CAT, 0.9, BOX))], [scene((DOG, BOX))], CAT)
    assert math.isnan(annotations.ap_area(nothing))
    assert math.isnan(annotations.ap_11point(nothing))


def test_perfect_is_one() -> None:
    one = annotations.curve([found((CAT, 0.9, BOX), (CAT, 0.3, FAR))], [scene((CAT, BOX), (CAT, FAR))], CAT)
    assert (annotations.ap_area(one), annotations.ap_11point(one)) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize(("hits", "points"), [(3, 3), (6, 7), (7, 8)])
def test_eleven_points_are_matlabs(hits: int, points: int) -> None:
    """Recall of exactly 0.3 misses MATLAB's third step, which is 3 * 0.1; 0.6 and 0.7 reach theirs."""
    one = annotations.Curve(np.arange(1, hits + 1) / 10, np.ones(hits), 10)
    assert annotations.ap_11point(one) == pytest.approx(points / 11)


# --- average precision: against a second implementation ---------------------------------------------------------------


def _reference(detections: list[Detections], scenes: list[annotations.Scene], label: int) -> tuple[float, float]:
    """The devkit's VOCevaldet and VOCap, written again from their description, slowly, in its own pixel numbers."""
    ranked = [
        (float(score), picture, [box[0] + 1, box[1] + 1, box[2], box[3]])
        for picture, one in enumerate(detections)
        for box, score, kind in zip(one.boxes, one.scores, one.labels, strict=True)
        if kind == label
    ]
    ranked.sort(key=lambda item: -item[0])
    truth = {
        (picture, number): [box[0] + 1, box[1] + 1, box[2], box[3]]
        for picture, one in enumerate(scenes)
        for number, (box, kind) in enumerate(zip(one.boxes, one.labels, strict=True))
        if kind == label
    }
    hard = {key for key in truth if scenes[key[0]].difficult[key[1]]}
    positives, right, wrong, used = len(truth) - len(hard), 0, 0, set()
    points = []
    for _, picture, box in ranked:
        best, chosen = -math.inf, None
        for key, other in truth.items():
            if key[0] != picture:
                continue
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if width > 0 and height > 0:
                shared = width * height
                area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
                area += (other[2] - other[0] + 1) * (other[3] - other[1] + 1)
                if shared / (area - shared) > best:
                    best, chosen = shared / (area - shared), key
        if best >= 0.5 and chosen in hard:
            continue
        if best >= 0.5 and chosen not in used:
            used.add(chosen)
            right += 1
        else:
            wrong += 1
        points.append((right / positives, right / (right + wrong)))
    area, recall = 0.0, 0.0
    for here, _ in points:
        if here > recall:
            area += (here - recall) * max(p for r, p in points if r >= here)
            recall = here
    steps = [0, 0.1, 0.2, 3 * 0.1, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    eleven = sum(max([p for r, p in points if r >= step], default=0.0) for step in steps) / 11
    return area, eleven


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_a_second_implementation(seed: int) -> None:
    random = np.random.default_rng(seed)
    scenes, detections = [], []
    for _ in range(6):
        low = random.integers(0, 40, (5, 2))
        boxes = np.hstack([low, low + random.integers(4, 30, (5, 2))]).astype(float)
        labels = random.integers(0, 2, 5)
        hard = random.random(5) < 0.3
        scenes.append(scene(*zip(labels.tolist(), map(tuple, boxes.tolist()), hard.tolist(), strict=True)))
        guesses = np.repeat(boxes, 3, 0) + random.normal(0, 2.5, (15, 4))
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        detections.append(Detections(guesses, random.random(15), random.integers(0, 2, 15)))
    for label in (CAT, DOG):
        one = annotations.curve(detections, scenes, label)
        assert (annotations.ap_area(one), annotations.ap_11point(one)) == pytest.approx(
            _reference(detections, scenes, label), abs=1e-12
        )


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_pictures_of_voc_2007(tmp_path: Path) -> None:
    from epsd.datasets.devkit import Devkit

    devkit = Devkit(
        root=str(shared_file("datasets", "voc2007-sample.zip")),
        train=["VOC2007/train"],
        validation=["VOC2007/val"],
        limit=20,
    )
    sets = devkit(tmp_path, seed=0)
    index = annotations.read_index(sets, seed=0, **devkit.reading)
    assert len(index.class_names) == 20
    assert index.class_names[:3] == ["aeroplane", "bicycle", "bird"]
    assert {split: count["pictures"] for split, count in index.counts().items()} == {
        "train": 20,
        "validation": 20,
        "test": 20,
    }
    everything = annotations.read_image_set(*sets["test"][0])
    assert len(everything) == 300
    perfect = [Detections(s.boxes, np.ones(len(s.labels)), s.labels) for s in index.scenes["test"]]
    scores = [annotations.ap_area(annotations.curve(perfect, index.scenes["test"], label)) for label in range(20)]
    there = [score for score in scores if not math.isnan(score)]
    assert len(there) > 10
    assert there == pytest.approx([1.0] * len(there), abs=1e-12)
