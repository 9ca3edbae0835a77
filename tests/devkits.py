"""Small devkits in Pascal VOC's layout that the tests of detection build."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from epsd.voc.scenes import Scene
from pictures import hash_of, picture

Box = tuple[float, float, float, float]
Thing = tuple[str, Box] | tuple[str, Box, int]


def xml(things: Sequence[Thing], size: tuple[int, int] | None = (40, 30)) -> bytes:
    """One annotation, as the official files spell it; boxes from 1 and inclusive."""
    text = "<annotation><folder>VOC2007</folder>"
    if size is not None:
        text += f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    for name, (xmin, ymin, xmax, ymax), *difficult in things:
        text += f"<object><name>{name}</name><pose>Left</pose><truncated>1</truncated>"
        text += f"<difficult>{difficult[0]}</difficult>" if difficult else ""
        text += f"<bndbox><xmax>{xmax}</xmax><xmin>{xmin}</xmin><ymax>{ymax}</ymax><ymin>{ymin}</ymin></bndbox>"
        text += (
            "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>1</xmax><ymax>1</ymax></bndbox></part>"
        )
        text += "</object>"
    return (text + "</annotation>").encode()


def devkit(
    sets: Mapping[str, Mapping[str, Sequence[Thing]]],
    size: tuple[int, int] = (40, 30),
    prefix: str = "VOCdevkit/VOC2007",
) -> dict[str, bytes]:
    """Files of a devkit: image set -> picture id -> objects. Pictures are random pixels of `size` (width, height)."""
    files: dict[str, bytes] = {}
    for name, content in sets.items():
        files[f"{prefix}/ImageSets/Main/{name}.txt"] = "".join(f"{i}\n" for i in content).encode()
        for number, (identifier, things) in enumerate(content.items()):
            files[f"{prefix}/Annotations/{identifier}.xml"] = xml(things, size)
            files[f"{prefix}/JPEGImages/{identifier}.jpg"] = picture(number, size, "JPEG")
    return files


def scene(
    *things: tuple[int, Box] | tuple[int, Box, bool], name: str = "x", size: tuple[int, int] = (100, 100)
) -> Scene:
    """A scene without a file: (label, corners of pixels, difficult)."""
    boxes = np.array([thing[1] for thing in things], dtype=np.float64).reshape(-1, 4)
    labels = np.array([thing[0] for thing in things], dtype=np.int64)
    difficult = np.array([len(thing) > 2 and bool(thing[2]) for thing in things], dtype=np.bool_)
    return Scene(name, Path(f"{name}.jpg"), *size, boxes, labels, difficult)


Sets = Mapping[str, Mapping[str, Sequence[Thing]]]
CLASSES = ("cat", "dog")


def numbers(box: Box) -> tuple[float, float, float, float]:
    """Left, top, width and height in corners of pixels, of a box that counts from 1 and includes both ends."""
    xmin, ymin, xmax, ymax = box
    return xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1


def instances(
    content: Mapping[str, Sequence[Thing]], size: tuple[int, int] = (40, 30), folder: str = ""
) -> dict[str, Any]:
    """The JSON of one split in COCO's format; difficult objects are crowds. `folder`: before the names of pictures."""
    images, rows = [], []
    for number, (identifier, things) in enumerate(content.items()):
        images.append({"id": number, "file_name": f"{folder}{identifier}.jpg", "width": size[0], "height": size[1]})
        for name, box, *difficult in things:
            kind, crowd = 10 * CLASSES.index(name) + 1, int(bool(difficult and difficult[0]))
            rows.append(
                {"id": len(rows), "image_id": number, "category_id": kind, "bbox": numbers(box), "iscrowd": crowd}
            )
    categories = [{"id": 10 * number + 1, "name": name} for number, name in enumerate(CLASSES)]
    return {"images": images, "annotations": rows, "categories": categories}


def coco(sets: Sets, size: tuple[int, int] = (40, 30)) -> dict[str, bytes]:
    """As Roboflow writes it: in each split's folder pictures and `_annotations.coco.json`."""
    files: dict[str, bytes] = {}
    for split, content in sets.items():
        files[f"{split}/_annotations.coco.json"] = json.dumps(instances(content, size)).encode()
        files |= {f"{split}/{name}.jpg": picture(hash_of(name), size, "JPEG") for name in content}
    return files


def lines(things: Sequence[Thing], size: tuple[int, int] = (40, 30)) -> bytes:
    """A text file of YOLO."""
    text = ""
    for name, box, *_ in things:
        left, top, width, height = numbers(box)
        middle = f"{(left + width / 2) / size[0]:.9f} {(top + height / 2) / size[1]:.9f}"
        text += f"{CLASSES.index(name)} {middle} {width / size[0]:.9f} {height / size[1]:.9f}\n"
    return text.encode()


def yolo(sets: Sets, size: tuple[int, int] = (40, 30)) -> dict[str, bytes]:
    """As Roboflow writes it: data.yaml, and in each split's folder `images` and `labels`."""
    keys = {"valid": "val"}
    text = "".join(f"{keys.get(split, split)}: ../{split}/images\n" for split in sets)
    files = {"data.yaml": f"{text}\nnc: {len(CLASSES)}\nnames: {list(CLASSES)}\n".encode()}
    for split, content in sets.items():
        for name, things in content.items():
            files[f"{split}/images/{name}.jpg"] = picture(hash_of(name), size, "JPEG")
            files[f"{split}/labels/{name}.txt"] = lines(things, size)
    return files


def flat(sets: Sets, size: tuple[int, int] = (40, 30)) -> dict[str, bytes]:
    """As Roboflow writes VOC: in each split's folder pictures and XML files."""
    files: dict[str, bytes] = {}
    for split, content in sets.items():
        for name, things in content.items():
            files[f"{split}/{name}.jpg"] = picture(hash_of(name), size, "JPEG")
            files[f"{split}/{name}.xml"] = xml(things, size)
    return files


WRITERS = {"devkit": flat, "coco": coco, "yolo": yolo}
"""Name of a variant of `voc` -> what writes files that it reads."""
