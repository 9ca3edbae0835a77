"""Small image trees and archives that the tests of data sets build."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: int | tuple[int, int] = 12, form: str = "PNG", mode: str = "RGB") -> bytes:
    """An image file of random pixels; `size`: side, or (width, height)."""
    width, height = (size, size) if isinstance(size, int) else size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).convert(mode).save(stream, form)
    return stream.getvalue()


def changed(files: dict[str, bytes], change: dict[str, bytes | None], top: str = "") -> dict[str, bytes]:
    """The same files but for some below `top`, which have another content or (None) are not there."""
    every = {**files, **{f"{top}{name}": content for name, content in change.items()}}
    return {name: content for name, content in every.items() if content is not None}


def write(root: Path, files: dict[str, bytes]) -> Path:
    """The files below `root`."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    """The files as a zip archive, under exactly these names."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: dict[str, bytes]) -> Path:
    """The files as a tar archive, compressed as the name says, under exactly these names."""
    kind = {".gz": "gz", ".tgz": "gz", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix, "")
    with tarfile.open(path, f"w:{kind}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def classes(count: int = 6, size: int = 12, splits: tuple[str, ...] = (), form: str = "PNG") -> dict[str, bytes]:
    """`count` images each of cat and dog, below every one of `splits` where there are any."""
    folders = [f"{split}/" for split in splits] or [""]
    return {
        f"{folder}{name}/{i}.{form.lower()}": picture(hash_of(folder, name, i), size, form)
        for folder in folders
        for name in ("cat", "dog")
        for i in range(count)
    }


def hash_of(*parts: object) -> int:
    """A small number that differs with the parts."""
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(repr(parts)))
