"""Scenes as a detector takes them: pictures and targets in batches."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from epsd.detectors import Picture
from epsd.voc.annotations import read_picture
from epsd.voc.scenes import Floats, Scene

IN_MEMORY_UP_TO = 512 * 2**20
"""Bytes of decoded pictures that are kept; a larger set is decoded anew in each epoch."""

Target = dict[str, Tensor]

Sample = tuple[Tensor, Target]
"""A picture (C, H, W) in [0, 1], and its `boxes` (n, 4) and `labels` (n,) counted from 1, as torchvision wants them."""


class Pictures(Dataset[Sample]):
    """Scenes as a detector learns them: difficult objects left out. Decoded once where all fit in memory and `again`
    says that each is asked for more than once.

    `flip` (N,) bool: which scenes of this epoch are mirrored left to right; None: none.  `bytes`: of all that is kept.
    `largest`: bytes of the largest one as a detector takes it.
    """

    def __init__(self, scenes: Sequence[Scene], channels: int, *, again: bool = True) -> None:
        self.scenes, self.channels = scenes, channels
        self.flip: Tensor | None = None
        sizes = [scene.width * scene.height * channels for scene in scenes]
        self.kept: dict[int, Tensor] | None = {} if again and sum(sizes) <= IN_MEMORY_UP_TO else None
        self.bytes = 0 if self.kept is None else sum(sizes)
        self.largest = 4 * max(sizes, default=0)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        scene, image = self.scenes[index], self._pixels(index).float().div(255)
        wanted = ~scene.difficult
        boxes = torch.from_numpy(scene.boxes[wanted].astype(np.float32))
        labels = torch.from_numpy(scene.labels[wanted] + 1)
        if self.flip is not None and self.flip[index]:
            image = image.flip(2)
            boxes = torch.stack([scene.width - boxes[:, 2], boxes[:, 1], scene.width - boxes[:, 0], boxes[:, 3]], 1)
        return image, {"boxes": boxes, "labels": labels}

    def _pixels(self, index: int) -> Tensor:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        pixels = torch.from_numpy(read_picture(self.scenes[index], self.channels))
        if self.kept is not None:
            self.kept[index] = pixels
        return pixels


def typical_size(scenes: Sequence[Scene]) -> tuple[int, int]:
    """Median height and width of the pictures, in pixels."""
    return int(np.median([s.height for s in scenes])), int(np.median([s.width for s in scenes]))


def box_shares(scenes: Sequence[Scene]) -> Floats:
    """Widths and heights (n, 2) of the boxes that are learnt, as shares of the shorter side of their picture."""
    some = [s.boxes[~s.difficult] / min(s.width, s.height) for s in scenes]
    every: Floats = np.concatenate([np.zeros((0, 4)), *some])
    return np.asarray(every[:, 2:] - every[:, :2])


def picture_of(scenes: Sequence[Scene], mean: list[float], std: list[float]) -> Picture:
    """What a detector is told of the training scenes; `mean`, `std`: what the backbone takes."""
    boxes = box_shares(scenes)
    return Picture(*typical_size(scenes), mean, std, boxes if len(boxes) else None)


def in_batches(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches, the last one perhaps short."""
    return [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def training_batches(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches, the last one short; a picture that would be alone in it joins the batch before.

    Alone, it would leave batch normalisation a single value where a map is down to one cell.
    """
    batches = in_batches(order, batch_size)
    if batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
        alone = batches.pop()
        batches[-1] += alone
    return batches


def loaded(pictures: Pictures, batches: list[list[int]], workers: int) -> Iterator[list[Sample]]:
    """The samples of each batch; by so many processes where the pictures are not kept in memory."""
    workers = 0 if pictures.kept is not None else workers
    return iter(DataLoader(pictures, batch_sampler=batches, num_workers=workers, collate_fn=list))


def moved_to(samples: Sequence[Sample], device: torch.device) -> tuple[list[Tensor], list[Target]]:
    """Pictures and targets on `device`."""
    targets = [{key: value.to(device) for key, value in target.items()} for _, target in samples]
    return [image.to(device) for image, _ in samples], targets
