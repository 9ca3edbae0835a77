"""What a data set hands to `prepare`: class names and, for each split that it brings, images with labels.

A data set variant (`epsd.datasets`) is called without arguments and returns a `Source`. Small sets hand over
arrays, the others the names of files inside a tree (a folder or an archive) and how these become images.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from epsd.files.archives import Tree
from epsd.files.faults import Faults, few
from epsd.files.images import is_image
from epsd.types import EpsdError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
UNPACKED = "unpacked"
"""Folder below artifacts/data for images out of an archive that cannot be searched (a .tar), and below artifacts/voc
for a devkit out of its archives."""

Unreadable = Literal["error", "skip"]
SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


class SourceError(EpsdError):
    """A data set whose layout, classes or counts cannot be used."""


class Files(NamedTuple):
    """Image files inside a tree. `digests`: of their contents (`epsd.files.digests`), where these are known."""

    tree: Tree
    names: list[str]
    digests: Sequence[str] = ()


@dataclass(frozen=True)
class Labelled:
    """One split. `images`: uint8 (N, C, H, W), or files; `labels`: (N,) int64, positions in the class names."""

    images: NDArray[np.uint8] | Files
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: NDArray[np.int64]) -> Self:
        """The images at these positions."""
        images = self.images
        chosen = (
            Files(images.tree, [images.names[i] for i in positions]) if isinstance(images, Files) else images[positions]
        )
        return replace(self, images=chosen, labels=self.labels[positions])


@dataclass(frozen=True)
class Reading:
    """How files become images.

    `size`: side of the square in pixels, None = as they are (all alike). `resize`: shorter side before the middle
    `size` is cut, None = `size`. `grayscale`: one channel. `unreadable`: whether a damaged file is an error.
    """

    size: int | None = None
    resize: int | None = None
    grayscale: bool = False
    unreadable: Unreadable = "error"


@dataclass(frozen=True)
class Source:
    """A data set as read. `splits` holds at least "train"; the others are carved from it where they are missing.

    `left_out`: what lay there and is not among the images, in plain words.
    """

    description: str
    class_names: list[str]
    splits: Mapping[Split, Labelled]
    reading: Reading = field(default_factory=Reading)
    left_out: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_class_names(self.class_names, self.description)
        if "train" not in self.splits:
            raise SourceError(f"{self.description}: has no train split.")
        for split, labelled in self.splits.items():
            check_labels(labelled.labels, self.class_names, f"{self.description}: split '{split}'")


def check_class_names(names: Sequence[str], where: str) -> None:
    """Raises SourceError for fewer than two classes, names that differ at most in case, or one that is not UTF-8.

    Bytes that are no text are fine in the name of a file, which only its folder must understand; the name of a class
    goes into tables, figures and other people's tools.
    """
    garbled = [name for name in names if any("\udc80" <= letter <= "\udcff" for letter in name)]
    if garbled:
        shown = garbled[0].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise SourceError(f"{where}: the class name '{shown}' is not UTF-8 text: rename its folder.")
    if len(names) < 2:
        raise SourceError(f"{where}: has {len(names)} class(es) ({', '.join(names)}), at least 2 are needed.")
    check_spelling(names, where)


def check_spelling(names: Sequence[str], where: str, way_out: str = "") -> None:
    """Raises SourceError for names that differ at most in case; `way_out`: what would help."""
    counts = Counter(name.casefold() for name in names)
    clash = sorted(name for name in names if counts[name.casefold()] > 1)
    if clash:
        told = f"{where}: class names clash: {', '.join(clash)} (upper and lower case count as the same)."
        raise SourceError(f"{told} {way_out}".strip())


def unread(names: Iterable[str]) -> list[str]:
    """What is left out of these files for its ending, in plain words: `["12 .heic, 1 .txt (endings not read)"]`."""
    endings = Counter(PurePosixPath(name).suffix.lower() or "without one" for name in names if not is_image(name))
    told = ", ".join(f"{count:,} {ending}" for ending, count in sorted(endings.items()))
    return [f"{told} (endings not read)"] if told else []


def check_labels(labels: NDArray[np.int64], class_names: Sequence[str], where: str) -> None:
    """Raises SourceError for labels outside the classes, or a class without an image."""
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(class_names)):
        raise SourceError(
            f"{where}: labels reach from {labels.min()} to {labels.max()}, classes are {len(class_names)}."
        )
    counts = np.bincount(labels, minlength=len(class_names))
    empty = [class_names[int(i)] for i in np.flatnonzero(counts == 0)]
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise SourceError(f"{where}: no image of {len(empty)} class(es): {shown}.")


def folder_source(tree: Tree, reading: Reading) -> Source:
    """A tree of `split/class/image` (train, val or valid or validation, test), or of `class/image`.

    A single top folder around either is skipped. Files that are no images are left out and told; a folder without any
    counts as an empty class.

    Raises SourceError naming what is empty, clashing, missing from a split, not in a class folder, or there twice.
    """
    top = _top(tree)
    found = [(name, name[len(top) :].split("/")) for name in tree.names if is_image(name)]
    if not found:
        raise SourceError(f"{tree.where}: holds no images.")
    folders = [folder[len(top) :].split("/") for folder in sorted(tree.folders) if folder.startswith(top)]
    firsts = [parts[0] for parts in folders if len(parts) == 1]
    named = {first: SPLIT_FOLDERS[first.lower()] for first in firsts if first.lower() in SPLIT_FOLDERS}
    if not named:
        return _by_class({"train": found}, firsts, tree, reading)
    _check_split_folders(tree, firsts, named)
    below = {first: [(name, parts[1:]) for name, parts in found if parts[0] == first] for first in named}
    bare = [first for first in named if named[first] != "train" and all(len(parts) < 2 for _, parts in below[first])]
    splits: dict[Split, Found] = {split: below[first] for first, split in named.items() if first not in bare}
    classes = sorted({parts[1] for parts in folders if len(parts) == 2 and parts[0] not in bare})
    left_out = [f"{len(below[first]):,} images of {first}/, which has no class folders" for first in bare]
    return _by_class(splits, classes, tree, reading, left_out)


Found = list[tuple[str, list[str]]]
"""(name in the tree, its parts from the class folder on)."""


def _top(tree: Tree) -> str:
    """The folder, with its slash, that wraps everything and is no split folder; "" where there is none."""
    firsts = {name.split("/")[0] for name in tree.names if is_image(name)}
    only = min(firsts) if len(firsts) == 1 else ""
    wraps = any(folder.startswith(f"{only}/") for folder in tree.folders)
    return f"{only}/" if wraps and only.lower() not in SPLIT_FOLDERS else ""


def _check_split_folders(tree: Tree, firsts: Sequence[str], named: Mapping[str, Split]) -> None:
    others = [first for first in firsts if first not in named]
    if others:
        way_out = f"If '{min(named)}' is a class, put all class folders into one named 'train'"
        raise SourceError(f"{tree.where}: '{others[0]}' lies beside the split folder '{min(named)}'. {way_out}.")
    if len(set(named.values())) < len(named):
        raise SourceError(f"{tree.where}: two folders for one split: {', '.join(sorted(named))}.")


def _by_class(
    splits: Mapping[Split, Found],
    class_names: Sequence[str],
    tree: Tree,
    reading: Reading,
    left_out: Sequence[str] = (),
) -> Source:
    faults = Faults(tree.where, SourceError)
    for name in (name for found in splits.values() for name, parts in found if len(parts) < 2):
        way_out = "Layouts: split/class/image, class/image, or any with a table: dataset.labels."
        faults.add(f"'{name}' lies in no class folder", way_out)
    faults.check()
    check_apart(tree, {split: [name for name, _ in found] for split, found in splits.items()})
    number = {name: i for i, name in enumerate(class_names)}
    return Source(
        description=str(tree.where),
        class_names=list(class_names),
        splits={
            split: Labelled(Files(tree, [name for name, _ in found]), as_labels(number[parts[0]] for _, parts in found))
            for split, found in splits.items()
        },
        reading=reading,
        left_out=[*left_out, *unread(tree.names)],
    )


def check_apart(tree: Tree, splits: Mapping[Split, Iterable[str]]) -> None:
    """Raises SourceError where a link shows a folder of images twice: what was learnt would be tested.

    Validation and test may be one: ImageNet's labelled images beside train serve as either.
    """
    seen: dict[str, tuple[Split, str]] = {}
    for split, names in splits.items():
        for folder in sorted({name.rpartition("/")[0] for name in names}):
            other, twin = seen.setdefault(tree.resolved(folder), (split, folder))
            if folder != twin and {split, other} != {"validation", "test"}:
                raise SourceError(
                    f"{tree.where}: '{folder}' and '{twin}' are the same folder, by a link, so its images would be "
                    "learnt and tested. Remove one of the two; a split that is missing is held out of train."
                )


def as_labels(labels: Iterable[int]) -> NDArray[np.int64]:
    """(N,) int64."""
    return np.fromiter(labels, dtype=np.int64)


def labelled(tree: Tree, names: list[str], classes: Iterable[str], number: Mapping[str, int], why: str) -> Labelled:
    """Files by the names of their classes. Raises SourceError for a class without a number: `why` says where that is
    from.
    """
    classes, faults = list(classes), Faults(tree.where, SourceError)
    for name, one in zip(names, classes, strict=True):
        if one not in number:
            faults.add(f"'{name}' is of class '{one}', which {why}")
    faults.check()
    return Labelled(Files(tree, names), as_labels(number[name] for name in classes))


def check_listed(tree: Tree, names: Iterable[str], listing: str) -> None:
    """Raises SourceError for files that `listing` names and that are not there."""
    present = set(tree.names)
    if absent := [f"'{name}'" for name in names if name not in present]:
        raise SourceError(f"{tree.where}: {listing} lists {few(absent)}, which {_are(absent)} missing.")


def _are(many: Sequence[str]) -> str:
    return "is" if len(many) == 1 else "are"


def below(tree: Tree, marker: str, top: str | None = None) -> str:
    """The folder inside `tree`, "" or ending in a slash, that holds the file `marker`; `top`: its name, None: any.

    Raises SourceError naming what is missing.
    """
    depth = marker.count("/")
    found = [name[: -len(marker)] for name in tree.names if name == marker or name.endswith(f"/{marker}")]
    fitting = [folder for folder in found if top is None or folder in ("", f"{top}/")]
    if not fitting:
        place = f"{top}/{marker}" if top else marker
        raise SourceError(f"{tree.where}: has no file '{place}'.")
    return min(fitting, key=lambda folder: (folder.count("/") + depth, folder))
