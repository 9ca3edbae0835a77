"""From pixels to class probabilities in one module: what is exported, served over HTTP and asked by `epsd predict`.

The network is fed what evaluation feeds it: images brought to its size, (x / 255 - mean) / std, in full precision.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from epsd.data.streaming import Normalise
from epsd.files.images import ImageError, decode, fit, is_image, pixels
from epsd.files.regular import read_bytes
from epsd.types import EpsdError

BATCH = 64
"""Images in one forward pass of `answers`."""

EXAMPLE_UP_TO = 64
"""Pixels on the longer side of an input example: it is stored as text, and any size is accepted."""


class ServingError(EpsdError):
    """A model that cannot be asked, or nothing to ask it."""


@dataclass(frozen=True)
class Intake:
    """What a network takes, and what its outputs mean.

    `image_shape`: (C, H, W). `mean`, `std`: per channel, of pixels in [0, 1]. `size`, `resize`: how image files were
    brought to that shape (`epsd.files.layouts.Reading`); None where they had it from the start.
    """

    class_names: list[str]
    image_shape: tuple[int, int, int]
    mean: list[float]
    std: list[float]
    size: int | None = None
    resize: int | None = None

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


class Servable(nn.Module):
    """`network` with its preprocessing in front and a softmax behind it, in evaluation mode.

    Input: images (B, C, H, W), any number and any size, values 0 to 255 (an image in which no value exceeds 1 is taken
    as 0 to 1). Those of the network's own size are taken as they are; of others the shorter side is resized as
    evaluation does it and the middle is cut. Output: probabilities (B, K).
    """

    def __init__(self, network: nn.Module, intake: Intake) -> None:
        super().__init__()
        self.network = network
        self.height, self.width = intake.image_shape[1:]
        longer = max(self.height, self.width)
        self.resize = max(intake.resize or longer, longer)
        normalise = Normalise(intake.mean, intake.std, torch.device("cpu"))
        self.scale, self.shift = nn.Buffer(normalise.scale), nn.Buffer(normalise.shift)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float32 -> (B, K)."""
        floats = self._fitted(_levels(images)).to(torch.float32).mul(self.scale).add(self.shift)
        logits: Tensor = self.network(floats)
        return logits.softmax(dim=1)

    def _fitted(self, images: Tensor) -> Tensor:
        """(B, C, h, w) uint8 -> (B, C, H, W), in whole-number arithmetic on sizes that the export keeps open."""
        height, width = images.shape[2:]
        ready = (height == self.height) & (width == self.width)
        side = torch.sym_ite(ready, min(self.height, self.width), self.resize)
        shorter = torch.sym_min(height, width)
        tall = torch.sym_max(self.height, (2 * height * side + shorter) // (2 * shorter))
        wide = torch.sym_max(self.width, (2 * width * side + shorter) // (2 * shorter))
        size: list[Any] = [tall, wide]
        large = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        rows = torch.arange(self.height, device=images.device) + (tall - self.height) // 2
        columns = torch.arange(self.width, device=images.device) + (wide - self.width) // 2
        return large.index_select(2, rows).index_select(3, columns)


def _levels(images: Tensor) -> Tensor:
    """Pixel values as the 256 levels of image files, uint8."""
    full = torch.where(images.amax(dim=(1, 2, 3), keepdim=True) <= 1, 255.0, 1.0)
    return (images * full).round().clamp(0, 255).to(torch.uint8)


def example(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(B, C, H, W) images as a client sends them, large ones made smaller: the input example of a model."""
    longer = max(images.shape[2:])
    pictures = torch.from_numpy(images.astype(np.float32))
    if longer > EXAMPLE_UP_TO:
        height, width = (max(2, round(side * EXAMPLE_UP_TO / longer)) for side in images.shape[2:])
        pictures = F.interpolate(pictures, size=(height, width), mode="bilinear", antialias=True).round()
    small: NDArray[np.float32] = pictures.numpy()
    return small


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


def answers(model: nn.Module, intake: Intake, paths: Sequence[Path], top: int) -> Iterator[Answer]:
    """The `top` most probable classes of each image. `model`: a `Servable`, or one loaded back from an export.

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
            yield from _answered(model, intake, images, top)
    if broken:
        count = f"{len(broken)} of {len(paths)} images cannot be read: " if len(paths) > 1 else ""
        more = " ..." if len(broken) > _NAMED else ""
        raise ImageError(count + " ".join(map(str, broken[:_NAMED])) + more)


_NAMED = 3
"""Files that cannot be read that are named."""


def _answered(model: nn.Module, intake: Intake, images: Mapping[Path, NDArray[np.uint8]], top: int) -> Iterator[Answer]:
    # as 0 to 1, which every image is: of 0 to 255, one that is nearly black would be taken for one of 0 to 1
    given = torch.from_numpy(np.stack(list(images.values()))).float().div(255)
    with torch.no_grad():
        best = model(given).topk(min(top, len(intake.class_names)), dim=1)
    for path, shares, places in zip(images, best.values.tolist(), best.indices.tolist(), strict=True):
        names = [intake.class_names[place] for place in places]
        yield Answer(str(path), list(zip(names, shares, strict=True)))
