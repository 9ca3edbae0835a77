"""From a data set as read to artifacts/data: splits carved, images verified, compact arrays or an index of files.

Writes data.json (counts, class names, shape, mean and std of train, source, digest) and, per split, labels as .npy
and either all images as one uint8 .npy (N, C, H, W) or the list of their files. The same input gives the same bytes.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsd.compute.seeds import mix
from epsd.files.archives import ArchiveError, open_tree, unpack
from epsd.files.digests import digest, digest_of
from epsd.files.duplicates import Marks, duplicates, mark, marks
from epsd.files.images import ImageError, decode, fit, pixels
from epsd.files.layouts import (
    SPLITS,
    UNPACKED,
    Files,
    Labelled,
    Reading,
    Source,
    SourceError,
    Split,
    Unreadable,
    check_labels,
)
from epsd.project.artifacts import ArtifactError, replacing, write_json
from epsd.project.runtime import watched

IN_MEMORY_UP_TO = 64
"""Pixels on the longer side up to which a whole set is kept in memory (Tiny-ImageNet at 64 px: 1.2 GB)."""

_AHEAD = 256
"""Images read before the first of them must be decoded: bounds the memory."""

_LEVELS = 256
_COUNTED_AT_ONCE = 1 << 20
"""Pixels of a channel that are counted in one go: numpy makes eight bytes of each."""

_WORTH_A_BAR = 2000


@dataclass
class Tally:
    """Count per channel and grey level (C, 256) of the training images: mean and std come out exact in any order."""

    histogram: NDArray[np.int64] | None = None

    def add(self, images: NDArray[np.uint8]) -> None:
        """`images`: (N, C, H, W). Takes a few MB beside them, however many they are."""
        count, channels, height, width = images.shape
        if self.histogram is None:
            self.histogram = np.zeros((channels, _LEVELS), dtype=np.int64)
        step = max(1, _COUNTED_AT_ONCE // (height * width))
        for start in range(0, count, step):
            for channel in range(channels):
                part = images[start : start + step, channel].ravel()
                self.histogram[channel] += np.bincount(part, minlength=_LEVELS)

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Per channel, of pixels in [0, 1]. A channel without contrast gets std 1."""
        if self.histogram is None:
            raise SourceError("no training image to take mean and std from.")
        share = self.histogram / self.histogram.sum(axis=1, keepdims=True)
        levels = np.arange(_LEVELS) / (_LEVELS - 1)
        mean = share @ levels
        std = np.sqrt(np.maximum(share @ levels**2 - mean**2, 0))
        return [round(float(m), 8) for m in mean], [round(float(s), 8) if s > 1e-6 else 1.0 for s in std]


def prepare(
    source: Source,
    out: Path,
    *,
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.2,
    limit: int | None = None,
    dataset: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `source` below `out` and return data.json.

    Parameters
    ----------
    validation, test : shares of train held out, class by class, where the source brings no such split; 0: none.
    limit : images per class and split, drawn by `seed`; None: all.
    dataset : the choice that gave `source`, only noted: who reads the data can tell what it was made from.

    Raises
    ------
    SourceError : shares, classes or counts that leave a split without images of a class; images of several sizes.
    ImageError : a damaged image, unless the source says to skip it. ArtifactError : `out` cannot be written.
    """
    whole = carved(source, validation, test, seed)
    splits = limited(whole, limit, seed)
    drawn = [split for split in splits if split not in source.splits]
    shape = _image_shape(splits["train"], source.reading)
    in_memory = max(shape[1:]) <= IN_MEMORY_UP_TO
    writer = Writer(out, source, shape, in_memory)
    for split, labelled in splits.items():
        writer.write(split, labelled)
    if over := sum(len(whole[split]) - len(labelled) for split, labelled in splits.items()):
        writer.left_out.append(f"{over:,} by data.limit")
    settings = {"dataset": dataset, "seed": seed, "validation": validation, "test": test, "limit": limit}
    return writer.finish({**settings, "carved": drawn})


def carved(source: Source, validation: float, test: float, seed: int) -> dict[Split, Labelled]:
    """The source's splits, with validation and test held out of train where they are missing."""
    splits = dict(source.splits)
    shares: list[tuple[Split, float]] = [("test", test), ("validation", validation)]
    wanted = {split: share for split, share in shares if split not in splits and share > 0}
    if "test" not in splits and not test:
        raise SourceError(f"{source.description}: brings no test split, so data.test must be above 0.")
    if sum(wanted.values()) >= 1:
        raise SourceError(
            f"data.validation and data.test leave nothing of train ({' + '.join(map(str, wanted.values()))})."
        )
    train = splits["train"]
    parts = _held_out(train.labels, source.class_names, wanted, seed)
    for split, positions in parts.items():
        splits[split] = train.take(positions)
    return {split: splits[split] for split in SPLITS if split in splits}


def _held_out(
    labels: NDArray[np.int64], class_names: list[str], shares: Mapping[Split, float], seed: int
) -> dict[Split, NDArray[np.int64]]:
    parts: dict[Split, list[NDArray[np.int64]]] = {split: [] for split in ("train", *shares)}
    for number, name in enumerate(class_names):
        mine = np.flatnonzero(labels == number)
        mixed = mine[np.random.default_rng(mix(seed, "split", number)).permutation(len(mine))]
        for split, share in shares.items():
            count = max(1, round(share * len(mine)))
            parts[split].append(mixed[:count])
            mixed = mixed[count:]
        if not len(mixed):
            asked = " and ".join(f"data.{split} {share:g}" for split, share in shares.items())
            raise SourceError(f"class '{name}' has {len(mine)} image(s) in train: too few to hold out {asked}.")
        parts["train"].append(mixed)
    return {split: np.sort(np.concatenate(positions)) for split, positions in parts.items()}


def limited(splits: Mapping[Split, Labelled], limit: int | None, seed: int) -> dict[Split, Labelled]:
    """At most `limit` images of each class in each split, drawn by `seed`, in their old order."""
    if limit is None:
        return dict(splits)
    result: dict[Split, Labelled] = {}
    for split, labelled in splits.items():
        order = np.random.default_rng(mix(seed, "limit", split)).permutation(len(labelled))
        by_class = order[np.argsort(labelled.labels[order], kind="stable")]
        counts = np.bincount(labelled.labels)
        rank = np.arange(len(labelled)) - np.repeat(counts.cumsum() - counts, counts)
        result[split] = labelled.take(np.sort(by_class[rank < limit]))
    return result


def _image_shape(train: Labelled, reading: Reading) -> tuple[int, int, int]:
    if isinstance(train.images, np.ndarray):
        _, channels, height, width = train.images.shape
        return channels, height, width
    if reading.size is not None:
        return 1 if reading.grayscale else 3, reading.size, reading.size
    for read in decoded(train.images, reading):
        if read.image is not None:
            channels, height, width = read.image.shape
            return channels, height, width
    raise SourceError(f"{train.images.tree.where}: no training image can be read.")


@dataclass(frozen=True)
class Read:
    """One file: place in the split, name, SHA-256 and CRC-32, and its pixels (C, H, W); None: unreadable."""

    position: int
    name: str
    digest: bytes
    crc: str
    image: NDArray[np.uint8] | None


def decoded(files: Files, reading: Reading) -> Iterator[Read]:
    """Every file as evaluation will see it, decoded by threads, in the order in which the tree gives them.

    Raises ImageError at the first damaged one and ArchiveError at the first that cannot be read, unless
    `reading.unreadable` is "skip".
    """
    place = {name: i for i, name in enumerate(files.names)}

    def read(name: str, content: bytes | None) -> Read:
        image, where = None, f"{files.tree.where}: {name}"
        if content is None:
            return Read(place[name], name, b"", "", None)
        try:
            image = pixels(fit(decode(content, where, grayscale=reading.grayscale), reading.size, reading.resize))
        except ImageError:
            if reading.unreadable == "error":
                raise
        return Read(place[name], name, hashlib.sha256(content).digest(), digest([content]), image)

    with ThreadPoolExecutor() as pool:
        waiting: list[Future[Read]] = []
        for name, content in _contents(files, reading.unreadable):
            waiting.append(pool.submit(read, name, content))
            if len(waiting) >= _AHEAD:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _contents(files: Files, unreadable: Unreadable) -> Iterator[tuple[str, bytes | None]]:
    """Name and bytes of every file, None for one that cannot be read and is to be skipped."""
    if unreadable == "error":
        yield from files.tree.read_many(files.names)
        return
    for name in files.names:
        try:
            content = files.tree.read(name)
        except ArchiveError:  # a link to nothing, somebody else's file, a damaged entry of a zip
            yield name, None
        else:
            yield name, content


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

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256(repr(self.source.class_names).encode())
        self.left_out += self.source.left_out
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "data.json").unlink(missing_ok=True)
            shutil.rmtree(self.out / UNPACKED, ignore_errors=True)
        except OSError as error:
            raise ArtifactError(f"{self.out}: cannot be written ({error.strerror or error}).") from None

    def write(self, split: Split, labelled: Labelled) -> None:
        """Verify and write one split."""
        if isinstance(labelled.images, np.ndarray):
            images, kept = labelled.images, np.ones(len(labelled), dtype=bool)
            self.marks[split], self.names[split] = marks(map(_bytes, images)), range(len(images))
        elif self.in_memory:
            images, kept = self._load(split, labelled.images)
        else:
            images, kept = None, self._verify(split, labelled.images)
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
        for read in _shown(decoded(files, self.source.reading), len(files.names), split):
            if read.image is None:
                self.skipped[split].append(read.name)
            elif read.image.shape != self.shape:
                found, usual = ("x".join(map(str, shape[:0:-1])) for shape in (read.image.shape, self.shape))
                where = f"{files.tree.where}: {read.name}"
                raise SourceError(
                    f"{where} is {found} pixels, others are {usual}: set dataset.size to bring all to one."
                )
            else:
                found_marks[read.position] = mark(read.digest)
                yield read
        self.skipped[split].sort()
        sound = np.flatnonzero(found_marks)
        self.marks[split], self.names[split] = found_marks[sound], [files.names[at] for at in sound]

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
        return [f"{len(lost):,} unreadable ({lost[0]}{', ...' if len(lost) > 1 else ''})"] if lost else []


def _bytes(image: NDArray[np.uint8]) -> bytes:
    return image.tobytes()


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


def _shown(reads: Iterable[Read], total: int, split: str) -> Iterable[Read]:
    """With a progress bar where it takes a while and somebody may be looking."""
    if not watched() or total < _WORTH_A_BAR:
        return reads
    from rich.console import Console
    from rich.progress import track

    return track(reads, description=f"reading {split}", total=total, console=Console(stderr=True), transient=True)


def summary(index: Mapping[str, Any]) -> str:
    """One line for the user: counts per split, classes, shape, what was left out, what is there twice."""
    sizes = ", ".join(f"{size} {split}" for split, size in index["sizes"].items())
    shape = "x".join(map(str, index["image_shape"]))
    left_out = [f"left out: {', '.join(index['left_out'])}"] if index["left_out"] else []
    return "; ".join([f"{sizes} images of {index['num_classes']} classes, {shape}", *left_out, *index["duplicates"]])
