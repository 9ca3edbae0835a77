"""Small devkits in Pascal VOC's layout that the tests of detection build."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from epsd.voc.scenes import Scene
from pictures import picture

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
