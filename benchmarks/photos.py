"""A detector on a few photographs with boxes, nothing set by hand: what `auto` chose, how long it took, what it finds.

    python benchmarks/photos.py --root voc2007-sample.zip --pictures 100 --write photos.md

Runs the five stages of the pipeline in a folder of its own, with the preset's parameters, on the first pictures of the
devkit's image set `train` and all of `test`. `--images`: for the backbone, instead of the preset's data set.
"""

import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from epsd.detection.score import detect, score_detections
from epsd.files.archives import open_tree, unpack
from epsd.pipeline.load import network_at
from epsd.project import artifacts, presets
from epsd.project.params import override
from epsd.project.runtime import versions
from epsd.voc.scenes import VocIndex
from page import of_preset, options, show

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("prepare", "prune", "train", "detect")


class Took(NamedTuple):
    """What a stage took: seconds, and bytes of the largest stage so far."""

    seconds: float
    bytes: int


def devkit(root: Path, target: Path, pictures: int) -> tuple[str, str]:
    """Unpack the devkit at `root` and list its first pictures. Their image set, and that of the test pictures."""
    tree = open_tree(root)
    unpack(tree, tree.names, target)
    (listed,) = target.rglob("ImageSets/Main/train.txt")
    first = listed.read_text(encoding="utf-8").splitlines()[:pictures]
    listed.with_name("first.txt").write_text("\n".join(first) + "\n", encoding="utf-8")
    return "first", "test"


def parameters(asked: Any, root: Path, sets: tuple[str, str]) -> dict[str, Any]:
    """The preset on these pictures."""
    tree = presets.read(asked.preset)
    tree["voc"] = {"name": "devkit", "root": str(root), "train": [sets[0]], "validation": [], "test": [sets[1]]}
    tree["voc"]["empty"] = "background"
    if asked.images:
        tree["dataset"] = {"name": "image_folder", "root": str(asked.images.resolve())}
    for change in asked.set:
        key, _, value = change.partition("=")
        override(tree, key, YAML(typ="safe", pure=True).load(value))
    return tree


def run(folder: Path, stage: str) -> Took:
    """One stage in `folder`; its words go to stderr."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "stages" / f"{stage}.py")]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=sys.stderr)
    return Took(time.monotonic() - started, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def by_heart(folder: Path) -> float:
    """mAP@0.5 of the detector in `folder` on the pictures that it was trained on."""
    detector, card = network_at(folder / artifacts.DETECT)
    index = VocIndex.load(folder / artifacts.VOC_INDEX)
    found = detect(detector, index.scenes["train"], channels=card["image_shape"][0])
    return score_detections(found, index.scenes["train"], index.class_names).summary["map50"]


def losses(folder: Path) -> tuple[float, float, int]:
    """Loss in the first and in the last epoch, and how many there were."""
    with (folder / artifacts.DETECT_HISTORY).open(encoding="utf-8", newline="") as file:
        rows = [float(row["loss"]) for row in csv.DictReader(file)]
    return rows[0], rows[-1], len(rows)


def page(asked: Any, folder: Path, took: dict[str, Took]) -> Iterator[str]:
    """The tables."""
    first, last, epochs = losses(folder)
    found, made = artifacts.read_json(folder / artifacts.DETECT_METRICS), versions()
    yield f"# {asked.pictures} photographs with boxes, `{asked.preset}`, no setting of the detector by hand"
    yield ""
    changed = "".join(f" --set {change}" for change in asked.set)
    images = f" --images {asked.images.name}" if asked.images else ""
    yield (
        f"`python benchmarks/photos.py --root {asked.root.name} --pictures {asked.pictures} --preset {asked.preset}"
        f"{images}{changed}`. {made['cpu']}, {made['threads']} threads, torch {made['torch']}."
    )
    yield ""
    card = artifacts.read_json(folder / artifacts.DETECTOR_CARD)["detector"]
    asked_of = presets.read(asked.preset)["detect"]["detector"]
    chosen = ", ".join(f"`{name}: {card[name]}`" for name, value in asked_of.items() if value == "auto")
    yield f"Chosen by `auto`: {chosen}."
    yield ""
    yield "| stage | seconds | most memory so far |"
    yield "|---|---|---|"
    yield from (f"| {stage} | {one.seconds:,.0f} | {one.bytes / 1e9:.2f} GB |" for stage, one in took.items())
    yield ""
    yield (
        f"Loss {first:.2f} in the first of {epochs} epochs, {last:.2f} in the last. mAP@0.5 {by_heart(folder):.4f} on "
        f"the training pictures, {found['map50']:.4f} on test (2007 rule {found['map50_11point']:.4f}), COCO mAP "
        f"{found['map']:.4f}; training the detector took {found['seconds']:,.0f} s."
    )
    yield ""
    yield "| class | test pictures | objects | AP@0.5 | recall |"
    yield "|---|---|---|---|---|"
    with (folder / artifacts.DETECT_PER_CLASS).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        figures = (f"{float(row[name] or 'nan'):.3f}" for name in ("ap", "recall"))
        yield f"| {row['class']} | {row['pictures']} | {row['objects']} | {' | '.join(figures)} |"


def main() -> None:
    """Run and show."""
    parser = options(__doc__)
    of_preset(parser, "digits")
    parser.add_argument(
        "--root", type=Path, required=True, help="devkit, folder or archive, with the sets train and test"
    )
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (asked.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        sets = devkit(asked.root, folder / "devkit", asked.pictures)
        with (folder / "params.yaml").open("w", encoding="utf-8") as file:
            YAML(typ="safe", pure=True).dump(parameters(asked, folder / "devkit", sets), file)
        took = {stage: run(folder, stage) for stage in STAGES}
        show(page(asked, folder, took), asked.write)


if __name__ == "__main__":
    main()
