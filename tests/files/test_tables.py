"""Images whose classes stand in a table, as spreadsheets, Kaggle and Hugging Face have them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epsd.datasets.image_folder import ImageFolder
from epsd.files.archives import FolderTree, open_tree
from epsd.files.layouts import Files, Source, SourceError
from epsd.files.tables import METADATA, metadata, placed, table_source
from epsd.preparing.write import prepare
from epsd.registry import ParamsError, choose
from pictures import picture, write, zipped

PICTURES = {f"photos/{number}.jpg": picture(number, 8, "JPEG") for number in range(6)}
ROWS = [f"{number}.jpg,{('cat', 'dog')[number % 2]}" for number in range(6)]


def read(root: Path, **settings: Any) -> Source:
    return ImageFolder(root=str(root), **settings)()


def said(source: Source) -> dict[str, dict[str, str]]:
    """Split -> name -> class."""
    found = {}
    for split, labelled in source.splits.items():
        assert isinstance(labelled.images, Files)
        labels = [source.class_names[label] for label in labelled.labels]
        found[str(split)] = dict(zip(labelled.images.names, labels, strict=True))
    return found


EXPECTED = {"train": {name: ("cat", "dog")[number % 2] for number, name in enumerate(PICTURES)}}


@pytest.mark.parametrize(
    "text",
    [
        "image,label\n" + "\n".join(ROWS),
        "\ufeffFileName;Class;note\r\n" + "\r\n".join(row.replace(",", " ; ") + ';"a;\nb"' for row in ROWS),
        "id\ttarget\n" + "\n".join(row.replace(",", "\t").replace(".jpg", "") for row in ROWS),
        "path,label\n" + "\n".join(f"C:\\data\\photos\\{row}".replace("C:\\data\\", "") for row in ROWS),
        "image,label\n" + "\n".join([*ROWS, ROWS[0], ",cat"]),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_tables_as_spreadsheets_write_them(tmp_path: Path, kind: str, text: str) -> None:
    files = PICTURES | {"labels.csv": text.encode()}
    root = write(tmp_path / "tree", files) if kind == "folder" else zipped(tmp_path / "tree.zip", files)
    source = read(root, labels="labels.csv")
    assert said(source) == EXPECTED and source.left_out == []
    index = prepare(source, tmp_path / "out", validation=0)
    assert index["sizes"] == {"train": 4, "validation": 0, "test": 2}


def test_a_table_beside_an_archive(tmp_path: Path) -> None:
    root = zipped(tmp_path / "photos.zip", PICTURES)
    (tmp_path / "labels.csv").write_text("image,label\n" + "\n".join(ROWS))
    tree = open_tree(root)
    assert said(table_source(tree, placed(tree, "labels.csv", FolderTree(tmp_path)), read_with(), {})) == EXPECTED
    assert said(read(root, labels=str(tmp_path / "labels.csv"))) == EXPECTED


def read_with(**settings: Any) -> Any:
    from epsd.files.layouts import Reading

    return Reading(**settings)


def test_columns_and_splits_are_named(tmp_path: Path) -> None:
    text = "photo,who,part\n" + "\n".join(f"{row},{('train', 'Test', 'valid')[n // 2]}" for n, row in enumerate(ROWS))
    root = write(tmp_path / "tree", PICTURES | {"labels.csv": text.encode()})
    with pytest.raises(
        SourceError, match=r"labels\.csv: no column that is known to tell the image\. Set dataset\.columns"
    ):
        read(root, labels="labels.csv")
    columns = {"image": "photo", "label": "who", "split": "part"}
    source = read(root, labels="labels.csv", columns=columns)
    assert {split: len(part) for split, part in source.splits.items()} == {"train": 2, "validation": 2, "test": 2}
    with pytest.raises(SourceError, match=r"no column 'whoo'\. Set dataset\.columns\.label; it has: photo, who, part"):
        read(root, labels="labels.csv", columns={**columns, "label": "whoo"})
    with pytest.raises(ParamsError, match=r"dataset\.columns"):
        choose(
            {"image_folder": ImageFolder}, {"name": "image_folder", "root": "x", "columns": {"picture": "a"}}, "dataset"
        )


def as_table(kind: str, rows: dict[str, str]) -> bytes:
    """`metadata.csv` or `metadata.jsonl`, labels of the latter as numbers."""
    if kind == METADATA[0]:
        return ("file_name,label\n" + "\n".join(f"{name},{label}" for name, label in rows.items())).encode()
    lines = ({"file_name": name, "label": int(label), "tags": ["a"], "text": None} for name, label in rows.items())
    return ("\n".join(map(json.dumps, lines)) + "\n").encode()


@pytest.mark.parametrize("kind", METADATA)
@pytest.mark.parametrize("layout", ["one", "each"])
def test_metadata_of_hugging_face(tmp_path: Path, layout: str, kind: str) -> None:
    names = {f"{split}/{number}.png": ("10", "9")[number % 2] for split in ("train", "test") for number in range(4)}
    files = {name: picture(number, 8) for number, name in enumerate(names)}
    if layout == "one":
        files[kind] = as_table(kind, names)
    else:
        for split in ("train", "test"):
            mine = {name[len(split) + 1 :]: label for name, label in names.items() if name.startswith(split)}
            files[f"{split}/{kind}"] = as_table(kind, mine)
    source = read(zipped(tmp_path / "tree.zip", files))
    assert source.class_names == ["9", "10"], "numbers by their size"
    assert {split: len(part) for split, part in source.splits.items()} == {"train": 4, "test": 4}
    assert source.left_out == []
    without = {METADATA[0]: b"file_name,caption\n", METADATA[1]: b'{"file_name": "cat/1.png", "objects": {}}'}
    other = {f"{name}/1.png": picture(1, 8) for name in ("cat", "dog")} | {kind: without[kind]}
    assert metadata(open_tree(write(tmp_path / "other", other))) == []
    assert read(tmp_path / "other").class_names == ["cat", "dog"], "one without classes is none"


@pytest.mark.parametrize("line", ["{", "[1]", "[" * 100_000])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    text = '{"image": "0.jpg", "label": "cat"}\n\n' + line
    with pytest.raises(SourceError, match=r"tree: labels\.jsonl, line 3: is no object of JSON\."):
        read(write(tmp_path / "tree", PICTURES | {"labels.jsonl": text.encode()}), labels="labels.jsonl")


def test_what_has_no_row_or_no_class_is_left_out_with_a_word(tmp_path: Path) -> None:
    text = "image,label\n" + "\n".join(ROWS[:4]) + "\n4.jpg,\n"
    files = PICTURES | {"train.csv": text.encode(), "test/9.jpg": picture(9, 8, "JPEG"), "readme.txt": b""}
    source = read(write(tmp_path / "tree", files), labels="train.csv")
    assert source.left_out == ["3 images without a row", "1 rows without a class", "1 .txt (endings not read)"]
    assert np.bincount(source.splits["train"].labels).tolist() == [2, 2]


def test_faults_are_told_at_once(tmp_path: Path) -> None:
    rows = [*ROWS, *(f"gone{number}.jpg,cat" for number in range(12)), "0.jpg,dog"]
    root = zipped(tmp_path / "tree.zip", PICTURES | {"labels.csv": ("image,label\n" + "\n".join(rows)).encode()})
    with pytest.raises(
        SourceError, match=r"tree\.zip: labels\.csv, line 8: no image 'gone0\.jpg'; .*\(12 in all\)"
    ) as told:
        read(root, labels="labels.csv")
    assert "line 20: '0.jpg' is 'dog' here, and 'cat' in another row" in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(
        SourceError, match=r"dataset\.labels: 'label\.csv': neither there nor at .* It has: labels\.csv"
    ):
        read(root, labels="label.csv")
    text = ("image,label\n" + "\n".join(rows[:-1])).encode()
    source = read(zipped(tmp_path / "b.zip", PICTURES | {"labels.csv": text}), labels="labels.csv", unreadable="skip")
    assert said(source) == EXPECTED and source.left_out == ["12 rows without their image"]
    for content in (b"", b'image,label\n"1.jpg,cat'):
        with pytest.raises(SourceError, match=r"labels\.csv: cannot be read as a table"):
            read(zipped(tmp_path / "c.zip", PICTURES | {"labels.csv": content}), labels="labels.csv")
    with pytest.raises(SourceError, match=r"f\.zip: labels\.csv: has no row with an image and a class"):
        read(zipped(tmp_path / "f.zip", PICTURES | {"labels.csv": b"image,label"}), labels="labels.csv")
    odd = b"image,label,split\n0.jpg,cat,holdout\n1.jpg,dog,train"
    with pytest.raises(SourceError, match=r"line 2: split 'holdout' is none of train, training"):
        read(zipped(tmp_path / "d.zip", PICTURES | {"labels.csv": odd}), labels="labels.csv")
