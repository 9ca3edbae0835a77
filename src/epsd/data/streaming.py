"""Large images: decoded and augmented by worker processes as they are needed, the same in any number of them.

Every sample's random numbers come from (seed, epoch, purpose, position), never from the worker that happens to
draw it.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from epsd.compute.devices import Machine
from epsd.compute.random_state import keeping_random_state
from epsd.compute.seeds import mix
from epsd.data.sampling import Sampled, partner_positions
from epsd.files.digests import digest
from epsd.files.images import ImageError, decode, decode_planes, fit, pixels
from epsd.files.layouts import Files, Reading
from epsd.types import Batch, BatchNeeds, EpsdError

_CPU = torch.device("cpu")
_SCALE, _RATIO = [0.08, 1.0], [3 / 4, 4 / 3]
"""Share of the area and aspect (width / height) of a random resized crop: the ImageNet recipe."""


class Augmentation(NamedTuple):
    """Of training images. Kept in memory: `crop_padding` black pixels on each side, then a random crop of the
    original size. Streamed: a random resized crop (8 to 100 % of the area, aspect 3/4 to 4/3, the ImageNet recipe)
    whatever `crop_padding` says. `flip`: mirror half of them left to right.
    """

    crop_padding: int = 0
    flip: bool = False


class _Crop(NamedTuple):
    """A part of a picture of `width` x `height` pixels."""

    width: int
    height: int
    top: int
    left: int
    down: int
    across: int
    mirrored: bool

    @classmethod
    def drawn(cls, width: int, height: int, flip: bool) -> "_Crop":
        """A random one."""
        from torchvision.transforms import RandomResizedCrop

        blank = torch.empty((1, height, width), device="meta")
        top, left, down, across = RandomResizedCrop.get_params(blank, _SCALE, _RATIO)
        return cls(width, height, top, left, down, across, flip and bool(torch.rand(1) < 0.5))

    def enough(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        """Width and height of the picture at which the crop has no fewer pixels than an image of `shape`."""
        return math.ceil(self.width * shape[2] / self.across), math.ceil(self.height * shape[1] / self.down)

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in the picture decoded at `width` x `height`."""
        x, y = width / self.width, height / self.height
        ends = self.left * x, self.top * y, (self.left + self.across) * x, (self.top + self.down) * y
        left, top, right, bottom = map(round, ends)
        return left, top, right, bottom


class Pictures:
    """Image files as uint8 tensors (C, H, W). Travels to worker processes; each opens the files for itself."""

    def __init__(self, files: Files, reading: Reading, image_shape: tuple[int, int, int]) -> None:
        self.tree, self.reading, self.image_shape = files.tree, reading, image_shape
        # one block of bytes, not a million strings: workers would copy these by counting references to them
        encoded = [name.encode("utf-8", "surrogateescape") for name in files.names]  # not every name is text
        self._names, self._ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])
        self._digests = np.array([int(one, 16) for one in files.digests], dtype=np.int64)

    def __getitem__(self, position: int) -> Tensor:
        """Resized and cut as for evaluation."""
        picture = decode(*self._content(position), grayscale=self.reading.grayscale)
        return torch.from_numpy(pixels(fit(picture, self.reading.size, self.reading.resize)))

    def augmented(self, position: int, flip: bool) -> Tensor:
        """A random resized crop, perhaps mirrored. Draws from torch's global generator.

        A JPEG with many more pixels than the crop will have is decoded at a fraction of its size. Resized by torch,
        whose kernel for bytes takes a third of Pillow's time and differs by at most one level.
        """
        crop: list[_Crop] = []

        def least(width: int, height: int) -> tuple[int, int]:
            crop.append(_Crop.drawn(width, height, flip))
            return crop[0].enough(self.image_shape)

        picture = decode_planes(*self._content(position), grayscale=self.reading.grayscale, least=least)
        _, height, width = picture.shape
        drawn = crop[0] if crop else _Crop.drawn(width, height, flip)
        left, top, right, bottom = drawn.box(width, height)
        part = picture[None, :, top:bottom, left:right]
        resized = F.interpolate(part, self.image_shape[1:], mode="bilinear", antialias=True)[0].contiguous()
        return resized.flip(-1) if drawn.mirrored else resized

    def _content(self, position: int) -> tuple[bytes, str]:
        """The bytes of a file, and what to call it. Raises ImageError where it is not the one that was prepared."""
        name = self._names[self._ends[position] : self._ends[position + 1]].decode("utf-8", "surrogateescape")
        content, where = self.tree.read(name), f"{self.tree.where}: {name}"
        if len(self._digests) and int(digest([content]), 16) != self._digests[position]:
            raise ImageError(f"{where}: changed or damaged since prepare read it. Run prepare again.")
        return content, where


@contextmanager
def drawing_from(*parts: int | str) -> Iterator[None]:
    """Seed the global generators (torch's CPU one, numpy, random) by `parts` inside the block, restore them after."""
    with keeping_random_state(_CPU):
        _seed(*parts)
        yield


def _seed(*parts: int | str) -> None:
    seed = mix(*parts)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class Request(NamedTuple):
    """One batch to draw: positions in the split, and of the second images where these are wanted."""

    epoch: int
    positions: list[int]
    partners: list[int] | None


class Drawn(NamedTuple):
    """What a worker hands back: the collated samples, and the collated second ones."""

    samples: Any
    partners: Any = None


class Requests(Dataset[Drawn | EpsdError]):
    """Answers a `Request` with a `Drawn`: `draw` makes one sample, `collate` a batch of them.

    A user's mistake (a damaged image) is handed back as a value: raised in a worker it would lose its one clear line.
    """

    def __init__(self, draw: Callable[[int], Any], collate: Callable[[list[Any]], Any], seed: int) -> None:
        self._draw, self._collate, self._seed = draw, collate, seed

    def __getitem__(self, request: Request) -> Drawn | EpsdError:
        epoch, positions, partners = request
        try:
            samples = self._batch("image", epoch, positions, positions)
            return Drawn(samples, None if partners is None else self._batch("partner", epoch, positions, partners))
        except EpsdError as error:
            return error

    def _batch(self, purpose: str, epoch: int, anchors: list[int], positions: list[int]) -> Any:
        with keeping_random_state(_CPU):
            pairs = zip(anchors, positions, strict=True)
            samples = [self._sample(purpose, epoch, anchor, position) for anchor, position in pairs]
            _seed(self._seed, purpose, epoch, anchors[0], "collate")
            return self._collate(samples)

    def _sample(self, purpose: str, epoch: int, anchor: int, position: int) -> Any:
        _seed(self._seed, purpose, epoch, anchor)
        return self._draw(position)


def draw_batches(requests: Requests, asked: list[Request], **loader: Any) -> Iterator[Drawn]:
    """The answers in order; `loader`: what DataLoader takes (num_workers, pin_memory, ...)."""
    # its own generator: a DataLoader without one takes a number from the global random state
    answers: DataLoader[Any] = DataLoader(
        requests, batch_size=None, sampler=asked, collate_fn=_as_is, generator=torch.Generator(), **loader
    )
    for answer in answers:
        if isinstance(answer, EpsdError):
            raise answer
        yield answer


def as_requests(epoch: int, batches: Sequence[Tensor], partners: Sequence[Tensor] | None) -> list[Request]:
    """One request per batch of positions."""
    seconds = [None] * len(batches) if partners is None else [part.tolist() for part in partners]
    return [Request(epoch, part.tolist(), second) for part, second in zip(batches, seconds, strict=True)]


def _as_is(answer: Any) -> Any:
    return answer


class StreamedBatches(Sampled):
    """Batches of a split that is read from files. `drawing`: as of `Sampled`.

    `augmentation` None: resized and cut as for evaluation. `machine`: its workers decode, where it has any.
    """

    def __init__(
        self,
        pictures: Pictures,
        labels: Tensor,
        *,
        augmentation: Augmentation | None = None,
        machine: Machine = Machine(),
        **drawing: Any,
    ) -> None:
        super().__init__(labels, machine.device, **drawing)
        self._workers = machine.workers
        draw = partial(pictures.augmented, flip=augmentation.flip) if augmentation else pictures.__getitem__
        self._requests = Requests(draw, torch.stack, self._sampler.seed)

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        """The batches of epoch `number`; `partner` is filled as `needs` asks, `indices` always."""
        order = self._sampler.order(number)
        second = partner_positions(needs, order, number, self._same_class)
        parts = self._sampler.parts(len(order))
        batches = [order[part] for part in parts]
        asked = as_requests(number, batches, None if second is None else [second[part] for part in parts])
        pinned = self._device.type == "cuda"
        answers = draw_batches(self._requests, asked, num_workers=self._workers, pin_memory=pinned)
        for indices, drawn in zip(batches, answers, strict=True):
            partner = None if drawn.partners is None else self._ready(drawn.partners)
            moved = indices.to(self._device)
            yield Batch(self._ready(drawn.samples), self._labels[moved], moved, partner)

    def _ready(self, images: Tensor) -> Tensor:
        return self._normalise(images.to(self._device, non_blocking=True))
