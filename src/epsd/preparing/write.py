"""From a data set as read to artifacts/data: splits carved, images verified, compact arrays or an index of files.

Writes data.json (counts, class names, shape, mean and std of train, source, digest) and, per split, labels as .npy
and either all images as one uint8 .npy (N, C, H, W) or the list of their files. The same input gives the same bytes.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsd.files.archives import open_tree, unpack
from epsd.files.digests import digest_of
from epsd.files.duplicates import Marks, duplicates, mark, marks
from epsd.files.faults import Faults, few
from epsd.files.layouts import SPLITS, UNPACKED, Files, Labelled, Reading, Source, SourceError, Split, check_labels
from epsd.files.regular import refused
from epsd.preparing.decoding import Read, decoded, image_shape, shown
from epsd.preparing.splits import carved, limited, of_classes
from epsd.preparing.tally import Tally
from epsd.project.artifacts import ArtifactError, read_json, replacing, write_json

IN_MEMORY_UP_TO = 64
"""Pixels on the longer side up to which a whole set is kept in memory (Tiny-ImageNet at 64 px: 1.2 GB)."""


def prepare(
    source: Source,
    out: Path,
    *,
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.2,
    limit: int | None = None,
    classes: Sequence[str] | None = None,
    dataset: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `source` below `out` and return data.json.

    Parameters
    ----------
    validation, test : shares of train held out, class by class, where the source brings no such split; 0: none.
    limit : images per class and split, drawn by `seed`; None: all.
    classes : the names of those that are taken; None: all.
    dataset : the choice that gave `source`, only noted: who reads the data can tell what it was made from.

    Raises
    ------
    SourceError : shares, classes or counts that leave a split without images of a class; images of several sizes;
        damaged ones, all at once, unless the source says to skip them. ArtifactError : `out` cannot be written.
    """
    source = of_classes(source, classes)
    whole = carved(source, validation, test, seed)
    splits = limited(whole, limit, seed)
    drawn = [split for split in splits if split not in source.splits]
    shape = image_shape(splits["train"], source.reading)
    in_memory = max(shape[1:]) <= IN_MEMORY_UP_TO
    writer = Writer(out, source, shape, in_memory)
    for split, labelled in splits.items():
        writer.write(split, labelled)
    writer.check()
    if over := sum(len(whole[split]) - len(labelled) for split, labelled in splits.items()):
        writer.left_out.append(f"{over:,} by data.limit")
    settings: dict[str, Any] = {
        "dataset": dataset,
        "seed": seed,
        "validation": validation,
        "test": test,
        "limit": limit,
    }
    settings["classes"] = classes if classes is None else list(classes)
    return writer.finish({**settings, "carved": drawn})


@dataclass
class Writer:
    """Writes the splits of one data set below `out`, then data.json; an old one is removed first."""

    out: Path
    source: Source
    shape: tuple[int, int, int]
    in_memory: bool
    tally: Tally = field(default_factory=Tally)
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    per_class: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    marks: dict[str, Marks] = field(default_factory=dict)
    names: dict[str, Sequence[object]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    root: str | None = None
    faults: Faults | None = None

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256(repr(self.source.class_names).encode())
        self.left_out += self.source.left_out
        with refused(ArtifactError, self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "data.json").unlink(missing_ok=True)
            shutil.rmtree(self.out / UNPACKED, ignore_errors=True)

    def write(self, split: Split, labelled: Labelled) -> None:
        """Verify and write one split."""
        if isinstance(labelled.images, np.ndarray):
            images, kept = labelled.images, np.ones(len(labelled), dtype=bool)
            self.marks[split], self.names[split] = marks(image.tobytes() for image in images), range(len(images))
        elif self.in_memory:
            images, kept = self._load(split, labelled.images)
        else:
            images, kept = None, self._verify(split, labelled.images)
        if self.faults:
            return
        labels = labelled.labels[kept]
        names = self.source.class_names
        check_labels(labels, names, f"{self.source.description}: split '{split}' without its unreadable images")
        if images is not None:
            images = np.ascontiguousarray(images if kept.all() else images[kept])
            self._save(split, "images", images)
            self._hash.update(images.reshape(-1).data)
            if split == "train":
                self.tally.add(images)
        self._save(split, "labels", labels)
        self._hash.update(split.encode() + labels.tobytes())
        self.sizes[split] = len(labels)
        self.per_class[split] = dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))

    def _read(self, split: Split, files: Files) -> Iterator[Read]:
        """Decoded, counted, of the right shape; those to skip are recorded and left out."""
        self.skipped[split] = []
        found_marks = np.zeros(len(files.names), dtype=np.uint64)
        for read in shown(decoded(files, self.source.reading), len(files.names), split):
            if read.image is None:
                self.skipped[split].append(read.name)
                if self.source.reading.unreadable == "error":
                    self._fault(files, read.fault, "dataset.unreadable: 'skip' leaves such images out.")
            elif read.image.shape != self.shape:
                found, usual = ("x".join(map(str, shape[:0:-1])) for shape in (read.image.shape, self.shape))
                fault = f"{read.name} is {found} pixels, others are {usual}"
                self._fault(files, fault, "Set dataset.size to bring all to one.")
            else:
                found_marks[read.position] = mark(read.digest)
                yield read
        self.skipped[split].sort()
        sound = np.flatnonzero(found_marks)
        self.marks[split], self.names[split] = found_marks[sound], [files.names[at] for at in sound]

    def _fault(self, files: Files, fault: str, way_out: str) -> None:
        self.faults = self.faults or Faults(files.tree.where, SourceError)
        self.faults.add(fault, way_out)

    def check(self) -> None:
        """Raises SourceError naming the files of all splits with which something is wrong."""
        if self.faults:
            self.faults.check()

    def _load(self, split: Split, files: Files) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        images = np.empty((len(files.names), *self.shape), dtype=np.uint8)
        kept = np.zeros(len(images), dtype=bool)
        for read in self._read(split, files):
            assert read.image is not None  # _read leaves the unreadable out
            images[read.position], kept[read.position] = read.image, True
        return images, kept

    def _verify(self, split: Split, files: Files) -> NDArray[np.bool_]:
        """Read every image once; keep the list of files, and the files too where they would not last."""
        if files.tree.lasting:
            self.root = str(files.tree.where)
        else:
            unpack(files.tree, files.names, self.out / UNPACKED)
            files = Files(open_tree(self.out / UNPACKED), files.names)
        reads = [(b"", "")] * len(files.names)
        for read in self._read(split, files):
            reads[read.position] = read.digest, read.crc
            if split == "train" and read.image is not None:
                self.tally.add(read.image[None])
        kept = [(name, *read) for name, read in zip(files.names, reads, strict=True) if read[0]]
        for name, sha, _ in kept:
            self._hash.update(name.encode("utf-8", "surrogateescape") + sha)  # a name may be bytes that are no text
        listed = {"files": [name for name, *_ in kept], "digests": [crc for *_, crc in kept]}
        write_json(path := self.out / f"{split}_files.json", listed)
        self.digests[path.name] = digest_of(path)
        return np.array([bool(sha) for sha, _ in reads])

    def _save(self, split: Split, kind: str, array: NDArray[Any]) -> None:
        name = f"{split}_{kind}.npy"
        with replacing(self.out / name) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        self.digests[name] = digest_of(self.out / name)

    def finish(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Remove what an earlier run left, write data.json, return it."""
        mean, std = self.tally.mean_std()
        index = {
            "source": self.source.description,
            "storage": "memory" if self.in_memory else "files",
            "root": self.root,
            "reading": asdict(self.source.reading),
            "image_shape": list(self.shape),
            "num_classes": len(self.source.class_names),
            "class_names": self.source.class_names,
            "sizes": self.sizes,
            "per_class": self.per_class,
            "mean": mean,
            "std": std,
            "skipped": self.skipped,
            "left_out": self.left_out + self._unreadable(),
            "duplicates": duplicates(self.marks, self.names),
            "settings": settings,
            "digest": self._hash.hexdigest(),
            "digests": self.digests,
        }
        for stale in [*self.out.glob("*.npy"), *self.out.glob("*_files.json")]:
            if stale.name not in self.digests:
                stale.unlink()
        write_json(self.out / "data.json", index)
        return index

    def _unreadable(self) -> list[str]:
        lost = list(chain(*self.skipped.values()))
        return [f"{len(lost):,} unreadable ({few(lost)})"] if lost else []


def written_arrays(
    out: Path, index: Mapping[str, Any]
) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]] | None:
    """Split -> images (N, C, H, W), labels (N,) as `prepare` wrote them, of those that are there; None if streamed."""
    if index["storage"] != "memory":
        return None
    kinds = ("images", "labels")
    return {
        split: tuple(np.load(out / f"{split}_{kind}.npy", mmap_mode="r", allow_pickle=False) for kind in kinds)
        for split, size in index["sizes"].items()
        if size
    }


def sample(out: Path, index: Mapping[str, Any], positions: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Some training images as `prepare` wrote them, each (C, H, W), in that order."""
    if index["storage"] == "memory":
        images = np.load(out / "train_images.npy", mmap_mode="r", allow_pickle=False)
        return [np.asarray(images[position]) for position in positions]
    listed = read_json(out / "train_files.json")["files"]
    names = [listed[position] for position in positions]
    files = Files(open_tree(out / UNPACKED if index["root"] is None else Path(index["root"])), names)
    found = {read.name: read.image for read in decoded(files, Reading(**index["reading"]))}
    return [image for name in names if (image := found[name]) is not None]


def summary(index: Mapping[str, Any]) -> str:
    """One line for the user: counts per split, classes, shape, what was left out, what is there twice."""
    sizes = ", ".join(f"{size} {split}" for split, size in index["sizes"].items())
    shape = "x".join(map(str, index["image_shape"]))
    left_out = [f"left out: {', '.join(index['left_out'])}"] if index["left_out"] else []
    return "; ".join([f"{sizes} images of {index['num_classes']} classes, {shape}", *left_out, *index["duplicates"]])
