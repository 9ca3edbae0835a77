"""Prepare: read, verify and split images and scenes, pack them. Writes artifacts/data/ and artifacts/voc/, and a
page of each into artifacts/prepare/."""

import epsd.project.own_code  # noqa: F401, I001 (first, before torch: whose code runs, how threads wait)

from collections.abc import Sequence
from typing import Any

import numpy as np

from epsd.datasets import DATASETS, DEVKITS
from epsd.figures import contact_sheet
from epsd.figures import style as figures
from epsd.pipeline import changes
from epsd.pipeline.stage import check_start, images_read, run_stage
from epsd.preparing.write import prepare, sample, summary, written_arrays
from epsd.project import artifacts
from epsd.project.params import Params
from epsd.project.runtime import note
from epsd.registry import choose
from epsd.voc.annotations import read_index, read_picture
from epsd.voc.scenes import Scene, VocIndex


def main(params: Params, _machine: object) -> str:
    """Read the chosen data set and devkit; carve the splits that the data set does not bring."""
    check_start(params)
    dataset, devkit = choose(DATASETS, params.dataset, "dataset"), choose(DEVKITS, params.voc, "voc")
    shares = params.data.model_dump(include={"validation", "test", "limit", "classes"})
    index = prepare(dataset(), artifacts.DATA, seed=params.seed, dataset=params.dataset, **shares)
    images = written_arrays(artifacts.DATA, index)
    source = devkit(artifacts.VOC, seed=params.seed, images=images, class_names=index["class_names"])
    validation, test = params.data.validation, params.data.test
    if source is None:
        scenes = VocIndex.nothing()
    else:
        scenes = read_index(source, seed=params.seed, validation=validation, test=test, **devkit.reading)
    scenes.save(artifacts.VOC_INDEX)
    changes.remember(images_read(params))
    for told in (*index["duplicates"], *scenes.notes):
        if "of test also in" in told:
            note(f"prepare: {told}: what was learnt is tested again.")
    draw_images(params.data_title, index)
    artifacts.SCENES_FIGURE.unlink(missing_ok=True)
    if source is not None:
        draw_scenes(params.scenes_title, scenes)
    pictures = ", ".join(f"{count['pictures']} {split}" for split, count in scenes.counts().items())
    detection = f"detection: {pictures} scenes of {len(scenes.class_names)} classes"
    return "; ".join([summary(index), *([] if source is None else [detection]), *scenes.notes])


def draw_images(title: str, index: dict[str, Any]) -> None:
    """Some training images of each class, and how many there are in each split."""
    names, counts = index["class_names"], index["per_class"]
    labels = np.load(artifacts.DATA / "train_labels.npy", allow_pickle=False)
    chosen = contact_sheet.per_class(labels, len(names))
    images = iter(sample(artifacts.DATA, index, [position for row in chosen for position in row]))
    rows = [[image for _, image in zip(row, images, strict=False)] for row in chosen]
    by_split = {split: [some.get(name, 0) for name in names] for split, some in counts.items()}
    _, height, width = index["image_shape"]
    told = [f"{title}: images of {width}x{height} px", *index["duplicates"]]
    figures.save(contact_sheet.images(rows, names, by_split, told), artifacts.IMAGES_FIGURE)


def draw_scenes(title: str, index: VocIndex) -> None:
    """Some training pictures with their boxes, objects of each class, sides of boxes, sizes of pictures."""
    names, train = index.class_names, index.scenes["train"]
    every = [scene for some in index.scenes.values() for scene in some]
    some = [
        contact_sheet.Boxed(read_picture(scene, 3), scene.boxes, scene.labels)
        for scene in of_every_class(train, contact_sheet.BOXED)
    ]
    counts = {
        split: np.bincount([label for scene in these for label in scene.labels], minlength=len(names)).tolist()
        for split, these in index.scenes.items()
    }
    boxes = np.concatenate([scene.boxes for scene in train])
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))
    sizes = np.array([(scene.width, scene.height) for scene in every], dtype=np.float64)
    page = contact_sheet.scenes(some, names, counts, sides, sizes, [f"{title}: pictures with boxes", *index.notes])
    figures.save(page, artifacts.SCENES_FIGURE)


def of_every_class(scenes: Sequence[Scene], count: int) -> list[Scene]:
    """So many of them, those first that show a class which none before does; in their order."""
    seen: set[int] = set()
    new, rest = list[int](), list[int]()
    for number, scene in enumerate(scenes):
        fresh = set(scene.labels.tolist()) - seen
        (new if fresh else rest).append(number)
        seen |= fresh
    return [scenes[number] for number in sorted((new + rest)[:count])]


if __name__ == "__main__":
    run_stage("prepare", main)
