"""Which classes a detector learns: those that are named, spellings merged, the others left out and counted."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from epsd.files.faults import few
from epsd.files.layouts import Split, check_spelling
from epsd.registry import not_known
from epsd.voc.entries import BoxSource, Entry
from epsd.voc.scenes import VocError

Splits = Mapping[Split, Sequence[Entry]]
_MERGE = "voc.classes: {name: [spelling, ...]} merges spellings."


@dataclass(frozen=True)
class Naming:
    """`names` in the order of the labels. `chosen`: whether they were asked for, so that others are left out.

    `spelled`: spelling -> the name that it means. `idle`: names of the data set, or asked for, of no training object.
    """

    names: list[str]
    chosen: bool
    spelled: Mapping[str, str]
    idle: list[str]

    @classmethod
    def of(
        cls, every: Splits, source: BoxSource, class_names: Sequence[str] | None, classes: Mapping[str, Sequence[str]]
    ) -> Self:
        """The names of these splits, of which some were held out of the source's train.

        Raises VocError: no class; a name or spelling that nothing has and that is nearly one that something has.
        SourceError: names that differ in case only.
        """
        spelled = _spelled(classes)
        everything = Counter(_told(every, every, {}))
        for spelling, name in spelled.items():
            _check_near(
                "voc.classes", spelling, everything, [other for other in everything if spelled.get(other) == name]
            )
        train = Counter(
            _told(every, [split for split in every if split == "train" or split not in source.splits], spelled)
        )
        every_name = {spelled.get(name, name) for name in everything}
        for name in class_names or ():
            _check_near("voc.class_names", name, every_name, class_names or ())
        own = dict.fromkeys(spelled.get(name, name) for name in source.order)
        names = list(class_names or [*filter(train.__contains__, own), *sorted(train.keys() - own.keys())])
        if not names or not any(map(train.__contains__, names)):
            lacking = (
                f"voc.class_names: {not_known(names[0], sorted(train))}" if names else "no annotation names a class."
            )
            raise VocError(f"{source.tree.where}: {lacking}")
        alike = {name.casefold() for name in names}
        near = [name for name in every_name if name.casefold() in alike and name not in names]
        check_spelling([*names, *near], "voc.class_names" if class_names else str(source.tree.where), _MERGE)
        idle = [name for name in (class_names or own) if name not in train]
        return cls(names, class_names is not None, spelled, idle)

    def label(self, spelling: str) -> int | None:
        """Position of the class; -1: one to leave out; None: an unknown one."""
        name = self.spelled.get(spelling, spelling)
        return self.names.index(name) if name in self.names else -1 if self.chosen else None

    def way_out(self, spelling: str) -> str:
        """What to do about an unknown class."""
        near = difflib.get_close_matches(spelling, self.names, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        known = f"Known from the training annotations: {', '.join(self.names)}."
        return f"{hint}{known} voc.class_names: [...] learns these and leaves the others out; {_MERGE}"

    def notes(self, listed: Splits) -> list[str]:
        """What was left out of these splits, in plain words."""
        others = Counter(name for name in _told(listed, listed, self.spelled) if self.chosen and name not in self.names)
        told = few([f"{count:,} {name}" for name, count in others.most_common()])
        notes = [f"objects of other classes than voc.class_names left out: {told}"] if others else []
        without = "without a training object" + ("" if self.chosen else ", so left out")
        return notes + ([f"classes {without}: {few(self.idle)}"] if self.idle else [])


def _told(splits: Splits, which: Iterable[Split], spelled: Mapping[str, str]) -> list[str]:
    """The class of every object of these splits."""
    entries = (entry for split in which for entry in splits[split] if entry.annotation)
    return [
        spelled.get(name, name) for entry in entries for name in (entry.annotation.names if entry.annotation else ())
    ]


def _spelled(classes: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Spelling -> name. Raises VocError for a spelling of two names."""
    found: dict[str, str] = {}
    for name, spellings in classes.items():
        for spelling in spellings:
            if found.setdefault(spelling, name) != name:
                raise VocError(f"voc.classes: '{spelling}' is a spelling of both '{found[spelling]}' and '{name}'.")
    return found


def _check_near(key: str, name: str, there: Iterable[str], others: Iterable[str]) -> None:
    """Raises VocError for a name that nothing has, where it is nearly one that something has and nothing asks for."""
    unclaimed = set(there) - set(others)
    if name not in there and difflib.get_close_matches(name, unclaimed, n=1):
        raise VocError(f"{key}: {not_known(name, sorted(there))}")
