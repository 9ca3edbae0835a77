"""Prepare: read, verify and split images and scenes, pack them. Writes artifacts/data/ and artifacts/voc/."""

from epsd.datasets import DATASETS, DEVKITS
from epsd.pipeline import changes
from epsd.pipeline.stage import check_start, images_read, run_stage
from epsd.preparing.write import prepare, summary, written_arrays
from epsd.project import artifacts
from epsd.project.params import Params
from epsd.registry import choose
from epsd.voc.annotations import read_index
from epsd.voc.scenes import VocIndex


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
    pictures = ", ".join(f"{count['pictures']} {split}" for split, count in scenes.counts().items())
    detection = f"detection: {pictures} scenes of {len(scenes.class_names)} classes"
    return "; ".join([summary(index), *([] if source is None else [detection]), *scenes.notes])


if __name__ == "__main__":
    run_stage("prepare", main)
