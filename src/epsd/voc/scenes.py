"""Annotated pictures, and the index of them in artifacts/voc."""

import dataclasses
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from epsd.project import artifacts
from epsd.types import EpsdError

Floats = npt.NDArray[np.float64]

SPLITS = ("train", "validation", "test")


class VocError(EpsdError):
    """A devkit file that is missing, damaged or inconsistent; the message names it."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """One annotated picture of `width` x `height` pixels, n objects.

    `boxes` (n, 4) float64, left, top, right, bottom as corners of pixels; `labels` (n,) int64, positions in the class
    names; `difficult` (n,) bool: objects that neither training nor the official scores count. `upright`: the boxes
    refer to the picture as its EXIF orientation shows it, not to the pixels as stored. `digest`: of the picture's file
    (`epsd.files.digests`); "": not known.
    """

    id: str
    image: Path
    width: int
    height: int
    boxes: Floats
    labels: npt.NDArray[np.int64]
    difficult: npt.NDArray[np.bool_]
    upright: bool = False
    digest: str = ""

    def to_json(self, base: Path) -> dict[str, Any]:
        """Plain values; the image path relative to `base` where it lies below it."""
        below = self.image.is_relative_to(base)
        return {
            "id": self.id,
            "image": str(self.image.relative_to(base) if below else self.image),
            "size": [self.width, self.height],
            "boxes": self.boxes.tolist(),
            "labels": self.labels.tolist(),
            "difficult": self.difficult.tolist(),
            "upright": self.upright,
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], base: Path) -> Self:
        """What `to_json` gave. Raises KeyError, TypeError, ValueError or IndexError for anything else."""
        scene = cls(
            id=content["id"],
            image=base / content["image"],
            width=content["size"][0],
            height=content["size"][1],
            boxes=np.asarray(content["boxes"], dtype=np.float64).reshape(-1, 4),
            labels=np.asarray([operator.index(label) for label in content["labels"]], dtype=np.int64),
            difficult=np.asarray(content["difficult"], dtype=np.bool_),
            upright=content["upright"],
            digest=content["digest"],
        )
        scene.check()
        return scene

    def check(self) -> None:
        """Raises ValueError where boxes do not lie inside the picture, or do not go with labels and flags."""
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        inside = (low >= 0).all() and (low < high).all() and (high <= [self.width, self.height]).all()
        if not (inside and len(self.boxes) == len(self.labels) == len(self.difficult)):
            raise ValueError(f"scene '{self.id}' has boxes outside its picture, or without label or flag")
        if not (isinstance(self.id, str) and isinstance(self.digest, str)):
            raise TypeError(f"scene '{self.id}' has an id or digest that is no text")


@dataclasses.dataclass(frozen=True)
class VocIndex:
    """What artifacts/voc/voc.json holds: class names, and the scenes of "train", "validation" and "test".

    `digest`: SHA-256 over pictures and boxes. `dropped`: boxes left out because they were degenerate, by request.
    `notes`: what else was left out and what is there twice, in plain words.
    """

    class_names: list[str]
    scenes: dict[str, list[Scene]]
    digest: str
    dropped: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def nothing(cls) -> Self:
        """No classes and no pictures: nothing is to be detected."""
        return cls([], {split: [] for split in SPLITS}, "")

    def save(self, path: Path) -> None:
        """Write the index. Pictures below its folder are named relative to it, so that the folder can be moved."""
        base = path.parent.resolve()
        artifacts.write_json(
            path,
            {
                "class_names": self.class_names,
                "counts": self.counts(),
                "digest": self.digest,
                "dropped": self.dropped,
                "notes": self.notes,
                "scenes": {split: [scene.to_json(base) for scene in scenes] for split, scenes in self.scenes.items()},
            },
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises ArtifactError, DamagedFile (see `read_json`) or VocError naming the file."""
        content, base = artifacts.read_json(path), path.parent.resolve()
        try:
            scenes = {s: [Scene.from_json(scene, base) for scene in some] for s, some in content["scenes"].items()}
            known = cls(content["class_names"], scenes, content["digest"], content["dropped"])
            known.check()
            return known
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise VocError(f"{path}: not an index of this project ({error!r}).") from None

    def check(self) -> None:
        """Raises KeyError for a split that is missing, ValueError for a label outside the classes."""
        numbers = range(len(self.class_names))
        for split in SPLITS:
            for scene in self.scenes[split]:
                if not set(scene.labels.tolist()) <= set(numbers):
                    raise ValueError(f"scene '{scene.id}' has a label outside the {len(numbers)} classes")

    def counts(self) -> dict[str, dict[str, int]]:
        """Per split: pictures, objects, of them difficult."""
        return {
            split: {
                "pictures": len(scenes),
                "objects": sum(len(scene.labels) for scene in scenes),
                "difficult": sum(int(scene.difficult.sum()) for scene in scenes),
            }
            for split, scenes in self.scenes.items()
        }
