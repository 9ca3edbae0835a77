"""What a network takes and says: image files in, class names and probabilities out. Starts without torch."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from epsd.files.images import ImageError, decode, fit, is_image, pixels
from epsd.files.regular import read_bytes
from epsd.types import EpsdError

Ask = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Images (B, C, H, W), values 0 to 1 or 0 to 255 -> probabilities (B, K)."""

BATCH = 64
"""Images in one forward pass of `answers`."""


class ServingError(EpsdError):
    """A model that cannot be asked, or nothing to ask it."""


@dataclass(frozen=True)
class Intake:
    """What a network takes, and what its outputs mean.

    `image_shape`: (C, H, W). `mean`, `std`: per channel, of pixels in [0, 1]. `size`, `resize`: how image files were
    brought to that shape (`epsd.files.layouts.Reading`); None where they had it from the start. `dataset`: what people
    call that which it was trained on.
    """

    class_names: list[str]
    image_shape: tuple[int, int, int]
    mean: list[float]
    std: list[float]
    size: int | None = None
    resize: int | None = None
    dataset: str = ""

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Self:
        """From the card that lies beside a network's weights. Raises ServingError for what is no such card."""
        try:
            channels, height, width = card["image_shape"]
            reading = card.get("reading") or {}
            return cls(
                class_names=list(card["class_names"]),
                image_shape=(channels, height, width),
                mean=list(card["mean"]),
                std=list(card["std"]),
                size=reading.get("size"),
                resize=reading.get("resize"),
                dataset=str(card.get("dataset", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ServingError(
                f"the model's card lacks what is needed to ask it ({error!r}). Train it again."
            ) from None

    def read(self, path: Path) -> NDArray[np.uint8]:
        """An image file as (C, H, W), exactly as evaluation sees it. Raises ImageError: missing, damaged, no image."""
        try:
            content = read_bytes(path)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror or error}.") from None
        channels, height, width = self.image_shape
        picture = decode(content, str(path), grayscale=channels == 1)
        if self.size is None and picture.size == (width, height):
            return pixels(picture)
        if height == width:
            return pixels(fit(picture, height, self.resize))
        from PIL import Image, ImageOps

        return pixels(ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR))


class Answer(NamedTuple):
    """What a model says of one image: (class name, probability in [0, 1]), most probable first."""

    image: str
    predictions: list[tuple[str, float]]

    def line(self) -> str:
        """For a person."""
        shown = self.image.encode("utf-8", "backslashreplace").decode()  # a file's name need not be text
        return f"{shown}: " + ", ".join(f"{name} {share:.1%}" for name, share in self.predictions)

    def as_json(self) -> str:
        """For a program."""
        named = [{"class": name, "probability": share} for name, share in self.predictions]
        return json.dumps({"image": self.image, "predictions": named})


def find_images(places: Sequence[str]) -> list[Path]:
    """Files as they are, folders as all images in them. Raises ServingError for what is not there or empty."""
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise ServingError(f"{place}: no such image or folder.")
        inside = [path for path in sorted(place.rglob("*")) if path.is_file() and is_image(path.name)]
        if place.is_dir() and not inside:
            raise ServingError(f"{place}: no image in this folder.")
        found += inside if place.is_dir() else [place]
    return found


def answers(ask: Ask, intake: Intake, paths: Sequence[Path], top: int) -> Iterator[Answer]:
    """The `top` most probable classes of each image.

    Raises ImageError, after the answers to all others, where files cannot be read; it names some of them.
    """
    broken: list[ImageError] = []
    for start in range(0, len(paths), BATCH):
        images: dict[Path, NDArray[np.uint8]] = {}
        for path in paths[start : start + BATCH]:
            try:
                images[path] = intake.read(path)
            except ImageError as error:
                broken.append(error)
        if images:
            yield from _answered(ask, intake, images, top)
    if broken:
        raise unreadable(broken, len(paths))


_NAMED = 3
"""Files that cannot be read that are named."""


def unreadable(broken: Sequence[ImageError], images: int) -> ImageError:
    """One error for all of so many images that cannot be read; it names some of them."""
    count = f"{len(broken)} of {images} images cannot be read: " if images > 1 else ""
    more = " ..." if len(broken) > _NAMED else ""
    return ImageError(count + " ".join(map(str, broken[:_NAMED])) + more)


def _answered(ask: Ask, intake: Intake, images: Mapping[Path, NDArray[np.uint8]], top: int) -> Iterator[Answer]:
    # as 0 to 1, which every image is: of 0 to 255, one that is nearly black would be taken for one of 0 to 1
    found = ask(np.stack(list(images.values())).astype(np.float32) / np.float32(255))
    best = np.argsort(-found, axis=1, kind="stable")[:, :top]
    for path, shares, places in zip(images, found.tolist(), best.tolist(), strict=True):
        names = [intake.class_names[place] for place in places]
        yield Answer(str(path), list(zip(names, (shares[place] for place in places), strict=True)))
