"""Images whose classes stand in a table: CSV or JSON lines, as Hugging Face's `metadata.csv` and `.jsonl`."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from epsd.files.archives import FolderTree, Tree
from epsd.files.faults import Faults, few
from epsd.files.images import is_image
from epsd.files.layouts import (
    SPLIT_FOLDERS,
    SPLITS,
    Files,
    Labelled,
    Reading,
    Source,
    SourceError,
    Split,
    as_labels,
    check_apart,
    unread,
)

METADATA = ("metadata.csv", "metadata.jsonl")
"""https://huggingface.co/docs/datasets/image_dataset: at the top or in each split's folder, with a column file_name."""

JSON_LINES = (".jsonl", ".ndjson")

Column = Literal["image", "label", "split"]
USUAL: dict[Column, tuple[str, ...]] = {
    "image": ("file_name", "filename", "image", "file", "path", "img", "image_path", "image_id", "id"),
    "label": ("label", "class", "category", "target", "class_name", "species", "breed"),
    "split": ("split", "set", "subset", "partition"),
}
"""Columns that are looked for, in this order, where none is named. A split column need not be there."""

_SEPARATORS = ",;\t"
Columns = Mapping[Column, str]


class Row(NamedTuple):
    """An image's name as the table gives it, its class, the split or "", and where it stands: table and line."""

    image: str
    label: str
    split: str
    table: str
    line: int


def metadata(tree: Tree) -> list[str]:
    """The tables of a Hugging Face image folder that have classes; [] where there are none."""
    found = [name for name in tree.names if PurePosixPath(name).name in METADATA]
    return [name for name in found if {"file_name", "label"} <= {one.lower() for one in _records(tree, name, name)[0]}]


def table_source(tree: Tree, tables: Mapping[str, tuple[Tree, str]], reading: Reading, columns: Columns) -> Source:
    """The images of `tree` that tables name, with the classes that stand there.

    tables : how messages call a table -> the tree it lies in, and its name there. columns : "image", "label", "split"
        -> the column that tells it; those that are not named are looked for (USUAL).

    The split is what its column says, else the split folder (train, val, test) that the image or the table lies in,
    else train. Images without a row are left out and told.

    Raises SourceError naming the columns that are missing, rows without their image, and images of two classes.
    """
    faults, images = Faults(tree.where, SourceError), _Images(tree)
    rows = [row for name, place in tables.items() for row in _rows(*place, name, columns)]
    labelled = [row for row in rows if row.label]
    found: dict[str, Row] = {}
    lost = 0
    for row in labelled:
        where = f"{row.table}, line {row.line}"
        name = images.find(row)
        if name is None and reading.unreadable == "skip":
            lost += 1
        elif name is None:
            faults.add(f"{where}: no image '{row.image}'", "dataset.unreadable: 'skip' leaves such rows out.")
        elif found.setdefault(name, row).label != row.label:
            faults.add(f"{where}: '{row.image}' is '{row.label}' here, and '{found[name].label}' in another row")
    splits: dict[Split, dict[str, str]] = {}
    for name in sorted(found):
        splits.setdefault(_split(name, found[name], faults), {})[name] = found[name].label
    faults.check()
    if not found:
        raise SourceError(f"{tree.where}: {few(list(tables))}: has no row with an image and a class.")
    check_apart(tree, splits)
    class_names = _sorted({row.label for row in found.values()})
    number = {name: i for i, name in enumerate(class_names)}
    without = sum(is_image(name) for name in tree.names) - len(found)
    left_out = [f"{without:,} images without a row"] if without else []
    left_out += [f"{len(rows) - len(labelled):,} rows without a class"] if len(labelled) < len(rows) else []
    left_out += [f"{lost:,} rows without their image"] if lost else []
    return Source(
        description=str(tree.where),
        class_names=class_names,
        splits={
            split: Labelled(Files(tree, list(of)), as_labels(number[label] for label in of.values()))
            for split, of in ((split, splits[split]) for split in SPLITS if split in splits)
        },
        reading=reading,
        left_out=left_out + unread(name for name in tree.names if name not in {at for _, at in tables.values()}),
    )


class _Images:
    """The images of a tree, by their names and by parts of these."""

    def __init__(self, tree: Tree) -> None:
        self._names = {name for name in tree.names if is_image(name)}
        self._last: dict[str, list[str]] = {}
        for name in sorted(self._names):
            path = PurePosixPath(name)
            for key in {path.name, path.stem}:
                self._last.setdefault(key, []).append(name)

    def find(self, row: Row) -> str | None:
        """Beside its table, or anywhere by the path, name or stem that the row gives; None: nowhere, or in several."""
        path = PurePosixPath(row.image.replace("\\", "/").removeprefix("./"))
        beside = f"{PurePosixPath(row.table).parent / path}"
        if beside in self._names:
            return beside
        same = self._last.get(path.name, [])
        fits = [
            name
            for name in same
            if f"/{name}".endswith(f"/{path}") or f"/{name}".rpartition(".")[0].endswith(f"/{path}")
        ]
        fits = fits or same
        if len(fits) > 1 and row.split:
            fits = [name for name in fits if _folder(name) == SPLIT_FOLDERS.get(row.split.lower())]
        return fits[0] if len(fits) == 1 else None


def _folder(name: str) -> Split | None:
    """The split that one of a file's folders is named after."""
    folders = PurePosixPath(name.lower()).parent.parts
    return next((SPLIT_FOLDERS[part] for part in folders if part in SPLIT_FOLDERS), None)


def _split(name: str, row: Row, faults: Faults) -> Split:
    if row.split and row.split.lower() not in SPLIT_FOLDERS:
        faults.add(f"{row.table}, line {row.line}: split '{row.split}' is none of {', '.join(SPLIT_FOLDERS)}")
    return SPLIT_FOLDERS.get(row.split.lower()) or _folder(name) or _folder(row.table) or "train"


def _rows(tree: Tree, name: str, told: str, columns: Columns) -> list[Row]:
    header, records = _records(tree, name, told)
    image, label, split = (_column(header, key, columns, f"{tree.where}: {told}") for key in USUAL)
    lines = ((record, number) for number, record in records.items() if record.get(image))
    return [
        Row(record[image], record.get(label, ""), record.get(split, "") if split else "", told, number)
        for record, number in lines
    ]


def _column(header: Sequence[str], key: Column, columns: Columns, where: str) -> str:
    """The column that tells the image, the label, or the split; "": there is none of the split."""
    wanted = (columns[key],) if key in columns else USUAL[key]
    usual = {name.casefold(): name for name in reversed(header)}
    found = next((usual[name.casefold()] for name in wanted if name.casefold() in usual), "")
    if not found and (key in columns or key != "split"):
        given = f"no column '{columns[key]}'" if key in columns else f"no column that is known to tell the {key}"
        raise SourceError(f"{where}: {given}. Set dataset.columns.{key}; it has: {few(header)}.")
    return found


def _records(tree: Tree, name: str, told: str) -> tuple[list[str], dict[int, dict[str, str]]]:
    """The header of a table, and by line its rows by column, stripped. Commas, semicolons or tabs separate; or each
    line is an object of JSON.
    """
    text = tree.text(name)
    if name.lower().endswith(JSON_LINES):
        objects = _objects(text, f"{tree.where}: {told}")
        return list(dict.fromkeys(key for one in objects.values() for key in one)), objects
    first = text.partition("\n")[0]
    separator = max(_SEPARATORS, key=first.count)
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    except (csv.Error, ValueError) as error:
        reason = error if isinstance(error, csv.Error) else "it is empty"
        raise SourceError(f"{tree.where}: {told}: cannot be read as a table ({reason}).") from None
    header = [one.strip() for one in header]
    return header, {line: dict(zip(header, map(str.strip, row), strict=False)) for line, row in enumerate(rows, 2)}


def _objects(text: str, where: str) -> dict[int, dict[str, str]]:
    """By line the words and numbers of its object; what is nested is passed over."""
    found: dict[int, dict[str, str]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except (ValueError, RecursionError):
            one = None
        if not isinstance(one, dict):
            raise SourceError(f"{where}, line {number}: is no object of JSON.")
        found[number] = {key: str(value).strip() for key, value in one.items() if isinstance(value, str | int | float)}
    return found


def _sorted(names: Iterable[str]) -> list[str]:
    """Numbers by their size, then words."""
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def placed(tree: Tree, name: str, beside: FolderTree) -> dict[str, tuple[Tree, str]]:
    """The table of that name for `table_source`: in the tree, wherever it alone is called so, or else in `beside`.

    Raises SourceError: it is nowhere, or in several places.
    """
    fits = [one for one in tree.names if one == name or one.endswith(f"/{name}")]
    fits = [name] if name in fits else fits
    if not fits and (beside.root / name).is_file():
        return {name: (beside, name)}
    if len(fits) != 1:
        tables = [one for one in tree.names if one.lower().endswith((".csv", ".tsv", ".txt", *JSON_LINES))]
        there = f"several are called so: {few(fits)}" if fits else f"neither there nor at {beside.root / name}"
        raise SourceError(f"{tree.where}: dataset.labels: '{name}': {there}. It has: {few(tables) or '(no table)'}.")
    return {fits[0]: (tree, fits[0])}
