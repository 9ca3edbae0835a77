"""Splits that a detection data set does not bring, held out of its training pictures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from epsd.compute.seeds import mix
from epsd.files.layouts import Split
from epsd.voc.entries import Entry
from epsd.voc.scenes import VocError


def held_out(
    splits: Mapping[Split, Sequence[Entry]], validation: float, test: float, seed: int, where: Path
) -> dict[Split, list[Entry]]:
    """The splits, with validation and test held out of train where they are missing.

    validation, test : shares of train, [0, 1); validation 0: none.

    Raises VocError: shares that leave no test or no training picture.
    """
    found = {split: list(entries) for split, entries in splits.items()}
    shares: list[tuple[Split, float]] = [("test", test), ("validation", validation)]
    wanted = {split: share for split, share in shares if split not in splits and share > 0}
    if "test" not in splits and not test:
        raise VocError(f"{where}: brings no test pictures, so data.test must be above 0.")
    train = found.get("train", [])
    order = _mixed(train, seed) if wanted else []
    for split, share in wanted.items():
        count = max(1, round(share * len(train)))
        if count >= len(order):
            asked = " and ".join(f"data.{split} {share:g}" for split, share in wanted.items())
            raise VocError(f"{where}: {len(train)} training picture(s) are too few to hold out {asked}.")
        chosen = ((np.arange(count) + 0.5) * len(order) / count).astype(int).tolist()
        taken = {order[place] for place in chosen}
        order = [position for position in order if position not in taken]
        found[split] = [train[position] for position in sorted(taken)]
    if wanted:
        found["train"] = [train[position] for position in sorted(order)]
    return found


def _mixed(entries: Sequence[Entry], seed: int) -> list[int]:
    """Positions by the rarest class that a picture shows, mixed within each: every so-manieth of them has nearly its
    share of each class.
    """
    shown = [sorted(set(entry.annotation.names)) if entry.annotation else [] for entry in entries]
    counts = Counter(name for names in shown for name in names)
    rarest = [min(names, key=counts.__getitem__, default="") for names in shown]
    chance = np.random.default_rng(mix(seed, "scenes")).permutation(len(entries)).tolist()
    return sorted(
        range(len(entries)), key=lambda position: (counts[rarest[position]], rarest[position], chance[position])
    )
