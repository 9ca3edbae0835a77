"""From the bytes of an image file to uint8 pixels: every mode to RGB or grey, EXIF rotation applied, damage named."""

import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from epsd.types import EpsdError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi")
SUFFIXES = (*_JPEG, ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
_SHORTAGES = ("allocate memory", "bad_alloc", os.strerror(errno.ENOMEM))
"""What the decoders say when memory is short, where they raise no MemoryError."""
_SIXTEEN_TO_EIGHT = 257  # 65535 / 255
EXIF_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)
"""The EXIF tag, and its values for pictures that are stored turned by a right angle."""

_CUT_LATER = 4
"""Times the pixels that stay, up to which a picture is resized as a whole and cut then, as the literature does it. Told
to resize a part, Pillow takes the part's corners in single precision: 3 % of a photograph's values come out one apart.
"""


class ImageError(EpsdError):
    """An image file that is truncated, corrupt, or no image."""


class Shortage(EpsdError):
    """Too little memory, or too many open files, to read a file, which may well be sound: no reason to skip it."""


def is_image(name: str) -> bool:
    """Whether the name ends like an image file that is read here."""
    return name.lower().endswith(SUFFIXES)


Least = Callable[[int, int], tuple[int, int]]
"""Width and height of a picture -> a width and height that are enough of it."""


def decode(
    content: bytes, name: str, *, grayscale: bool = False, upright: bool = True, least: Least | None = None
) -> "Image":
    """The picture as it is meant to be seen, in mode RGB, or L with `grayscale`.

    Grey, palette, CMYK, 1-bit and 16-bit images are converted (16-bit scaled to 8), the EXIF orientation is
    applied, transparent parts become white. Of an animation, the first frame. `upright` False: the pixels as they are
    stored, for boxes that were drawn on them so. `least`: a JPEG is decoded at a half, quarter or eighth of its size
    where that is no smaller, in as much less time; it is not asked about other files.

    Raises ImageError naming `name` when the content is truncated, corrupt, or no image; Shortage.
    """
    from PIL import Image

    with named(name), Image.open(io.BytesIO(content)) as picture:
        _reduce(picture, least, upright)
        return _loaded(picture, "L" if grayscale else "RGB", upright)


def decode_planes(content: bytes, name: str, *, grayscale: bool = False, least: Least | None = None) -> "Tensor":
    """The same pixels as of `decode`, as (C, H, W) uint8, C = 1 or 3. Raises ImageError likewise.

    A JPEG in the mode that is asked for goes through torchvision, whose bytes come out as a tensor: decoding and
    handing on take three quarters of the time that they take by way of a Pillow image (benchmarks/results/data-cpu.md).
    """
    import torch
    from PIL import Image

    mode = "L" if grayscale else "RGB"
    with named(name), Image.open(io.BytesIO(content)) as picture:
        whole = not _reduce(picture, least, upright=True)
        if whole and picture.format == "JPEG" and picture.mode == mode and orientation(picture) == 1:
            from torchvision.io import decode_jpeg

            decoded: Tensor = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            return decoded
        array = np.array(_loaded(picture, mode, upright=True), dtype=np.uint8)
    planes = torch.from_numpy(array)
    return planes[None] if planes.ndim == 2 else planes.permute(2, 0, 1)


def _reduce(picture: "Image", least: Least | None, upright: bool) -> bool:
    """Have a JPEG decoded at the fraction of its size that is enough; whether it is less than the whole."""
    if least is None or picture.format not in ("JPEG", "MPO"):
        return False
    turned = upright and orientation(picture) in _ON_ITS_SIDE
    size = picture.size
    enough = least(*(size[::-1] if turned else size))
    picture.draft(None, enough[::-1] if turned else enough)
    return picture.size != size


def orientation(picture: "Image") -> int:
    """How the stored pixels are to be turned, by EXIF; 1: not at all."""
    return int(picture.getexif().get(EXIF_ORIENTATION, 1))


def _loaded(picture: "Image", mode: str, upright: bool) -> "Image":
    from PIL import ImageOps

    picture.load()
    if upright:
        ImageOps.exif_transpose(picture, in_place=True)
    return _to_mode(picture, mode)


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Pillow's many errors as an ImageError that names the file; a Shortage where the file is not to blame."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image, or one that is damaged at its start.") from None
    except Exception as error:  # Pillow's readers raise nearly any type on damaged input
        if isinstance(error, MemoryError) or any(words in str(error) for words in _SHORTAGES):
            raise Shortage(f"{name}: there is too little memory to decode it.") from None
        raise ImageError(f"{name}: cannot be read as an image ({' '.join(str(error).split())}).") from None


def _to_mode(picture: "Image", mode: str) -> "Image":
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        picture = _eight_bit(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        picture = Image.alpha_composite(white, seen)
    return picture if picture.mode == mode else picture.convert(mode)


def _eight_bit(picture: "Image") -> "Image":
    """16-bit or floating grey to 8 bits; values that already fit 8 bits stay (Pillow would clip the others)."""
    from PIL import Image

    values = np.asarray(picture).astype(np.float64)
    if picture.mode.startswith("I;16") or values.max() > 255:
        values = values / _SIXTEEN_TO_EIGHT
    elif picture.mode == "F" and values.max() <= 1:
        values = values * 255
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def fit(picture: "Image", size: int | None, resize: int | None = None) -> "Image":
    """Resize the shorter side to `resize` pixels (None: to `size`), then cut the middle `size` x `size`.

    `size` None leaves the picture as it is. Bilinear with antialiasing, which is the evaluation transform of the
    ImageNet literature (256, then 224). Of a picture that is mostly cut away (a strip of 20,000 x 4, which would be
    gigabytes) only what stays is resized: the same pixels but for rounding.
    """
    from PIL import Image

    if size is None:
        return picture
    width, height = picture.size
    factor = max(resize or size, size) / min(width, height)
    across, down = max(size, round(width * factor)), max(size, round(height * factor))
    left, top = (across - size) // 2, (down - size) // 2
    if across * down > _CUT_LATER * size**2:
        x, y = width / across, height / down
        box = left * x, top * y, min((left + size) * x, width), min((top + size) * y, height)
        return picture.resize((size, size), Image.Resampling.BILINEAR, box)
    if factor != 1:
        picture = picture.resize((across, down), Image.Resampling.BILINEAR)
    if picture.size == (size, size):
        return picture
    return picture.crop((left, top, left + size, top + size))


def pixels(picture: "Image") -> NDArray[np.uint8]:
    """(C, H, W) uint8, C = 1 or 3."""
    array = np.array(picture, dtype=np.uint8)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
