"""Another split of the same images into train and validation, for a trial that is repeated. The test split stays.

Preparing again under another seed would deal the test images anew too: what a search has learnt from would then be
judged on test images that it had validated on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsd.compute.seeds import mix
from epsd.data.prepared import Prepared
from epsd.files.layouts import Files, Split

POOL: tuple[Split, ...] = ("train", "validation")
"""What is dealt anew."""


@dataclass(frozen=True)
class Resplit(Prepared):
    """A prepared data set whose train and validation splits are other parts of their union.

    `parts`: split -> positions (N,) in train followed by validation. Nothing is written, and no file of images is
    copied: what is held in memory is gathered when it is used, what is streamed is a list of names.
    """

    parts: Mapping[Split, NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)

    def _array(self, split: Split, kind: str) -> NDArray[Any]:
        if split not in self.parts:
            return super()._array(split, kind)
        pool = [super(Resplit, self)._array(part, kind) for part in POOL]
        chosen: NDArray[Any] = np.concatenate(pool)[self.parts[split]]
        return chosen

    def _files(self, split: Split) -> Files:
        if split not in self.parts:
            return super()._files(split)
        files = [super(Resplit, self)._files(part) for part in POOL]
        names, digests = (list(chain(*columns)) for columns in zip(*(part[1:] for part in files), strict=True))
        chosen = self.parts[split]
        return Files(files[0].tree, [names[at] for at in chosen], [digests[at] for at in chosen])


def resplit(data: Prepared, seed: int) -> Prepared:
    """`data` with as many validation images of each class as before, drawn by `seed` from train and validation.

    A validation split that the data set brought with it is not ours to mix: `data` itself is returned. Mean and
    standard deviation of the pixels stay those of the prepared training split.
    """
    if "validation" not in data.index["settings"].get("carved", []):
        return data
    labels = {split: data.labels(split) for split in POOL}
    pool = np.concatenate(list(labels.values()))
    parts: dict[Split, list[NDArray[np.int64]]] = {split: [] for split in POOL}
    for number in range(data.num_classes):
        mine = np.flatnonzero(pool == number)
        mixed = mine[np.random.default_rng(mix(seed, "resplit", number)).permutation(len(mine))]
        held_out = int((labels["validation"] == number).sum())
        parts["validation"].append(mixed[:held_out])
        parts["train"].append(mixed[held_out:])
    known = {entry.name: getattr(data, entry.name) for entry in fields(Prepared) if entry.name != "_cache"}
    known["digest"] = f"{data.digest}:{seed}"
    return Resplit(**known, parts={split: np.sort(np.concatenate(found)) for split, found in parts.items()})
