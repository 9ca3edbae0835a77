"""The splits of a data set: held out where the source brings none, cut to so many images of each class."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from epsd.compute.seeds import mix
from epsd.files.layouts import SPLITS, Labelled, Source, SourceError, Split
from epsd.registry import not_known


def of_classes(source: Source, names: Sequence[str] | None) -> Source:
    """The images of these classes, which keep the order of the source. None: all. SourceError for an unknown one."""
    if names is None:
        return source
    if odd := [name for name in names if name not in source.class_names]:
        raise SourceError(f"data.classes: {not_known(odd[0], source.class_names)}")
    chosen = [name for name in source.class_names if name in names]
    number = np.array([chosen.index(name) if name in chosen else -1 for name in source.class_names])
    splits = {}
    for split, labelled in source.splits.items():
        mine = labelled.take(np.flatnonzero(number[labelled.labels] >= 0))
        splits[split] = replace(mine, labels=number[mine.labels])
    return replace(source, class_names=chosen, splits=splits)


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
