"""Which images make up which batch of which epoch: a pure function of (seed, epoch)."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from epsd.compute.seeds import mix
from epsd.types import BatchNeeds, EpsdError

Share = Callable[[int], slice]
"""Length of a global batch -> the positions in it that this process draws (`epsd.compute.distributed.share`)."""


def whole(count: int) -> slice:
    """All of a batch: one process alone."""
    return slice(0, count)


class TooFewImages(EpsdError):
    """Fewer images than one batch, where short batches are dropped."""


@contextmanager
def naming(key: str) -> Iterator[None]:
    """TooFewImages out of the block begins with `key`, the parameter that says how large a batch is."""
    try:
        yield
    except TooFewImages as error:
        raise TooFewImages(f"{key}: {error}") from None


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `mix(*parts)`."""
    return torch.Generator().manual_seed(mix(*parts))


@dataclass(frozen=True)
class Sampler:
    """Order and batches of a split of `size` images.

    Random numbers are drawn on the CPU for a whole epoch at once: the same on every device, and no waiting for it.

    `share`: which part of every batch is drawn here, where several processes share the work.

    Raises TooFewImages when `drop_last` would leave no batch, or the split is empty.
    """

    size: int
    batch_size: int
    seed: int
    shuffle: bool
    drop_last: bool
    share: Share = whole

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise TooFewImages(f"batch size {self.batch_size}: must be at least 1.")
        if len(self) == 0:
            raise TooFewImages(
                f"too few images for a batch: the split has {self.size}, the batch size is {self.batch_size}. "
                "Lower the batch size, raise data.limit, or bring more images."
            )

    def __len__(self) -> int:
        whole, rest = divmod(self.size, self.batch_size)
        return whole if self.drop_last or not rest else whole + 1

    def order(self, epoch: int) -> Tensor:
        """(M,) positions in the split in the order of the epoch; M = N, or less where the short batch is dropped."""
        if not self.shuffle:
            return torch.arange(self.size)[: len(self) * self.batch_size]
        return torch.randperm(self.size, generator=generator(self.seed, "order", epoch))[: len(self) * self.batch_size]

    def parts(self, drawn: int) -> list[slice]:
        """Of `drawn` positions in order, those of each batch that are drawn here; no empty ones."""
        starts = range(0, drawn, self.batch_size)
        shares = [(start, self.share(min(self.batch_size, drawn - start))) for start in starts]
        return [slice(start + mine.start, start + mine.stop) for start, mine in shares if mine.stop > mine.start]

    def lengths(self) -> set[int]:
        """How long its batches are: all of one length, or one of them short."""
        short = 0 if self.drop_last else self.size % self.batch_size
        return {min(self.batch_size, self.size), *([short] if short else [])}

    def shared(self, share: Share) -> "Sampler":
        """The same batches, of which `share` is drawn."""
        return replace(self, share=share)


class SameClass:
    """For each image another of its class, uniformly drawn, possibly itself. `labels`: (N,) int64 on the CPU.

    As the loader of CS-KD's authors pairs images (Yun et al., CVPR 2020).
    """

    def __init__(self, labels: Tensor, seed: int) -> None:
        self._labels, self._seed = labels, seed
        self._counts = torch.bincount(labels)
        self._starts = self._counts.cumsum(0) - self._counts
        self._by_class = torch.argsort(labels, stable=True)

    def partners(self, order: Tensor, epoch: int) -> Tensor:
        """(M,) positions in the split, one for each of the positions in `order` (M,)."""
        labels = self._labels[order]
        draw = torch.rand(len(order), generator=generator(self._seed, "partner", epoch), dtype=torch.float64)
        return self._by_class[self._starts[labels] + (draw * self._counts[labels]).long()]


def cut(order: Tensor, sizes: int | list[int]) -> tuple[Tensor, ...]:
    """`order` in parts of `sizes`; of one size, the last part may be short."""
    parts: tuple[Tensor, ...] = order.split(sizes)  # type: ignore[no-untyped-call]
    return parts


def partner_positions(needs: BatchNeeds, order: Tensor, epoch: int, same_class: SameClass) -> Tensor | None:
    """(M,) which image stands second beside each of `order` (M,): the same for a second view; None: nobody asked."""
    if needs.partner == "same_class":
        return same_class.partners(order, epoch)
    return order if needs.partner == "view" else None


class Normalise:
    """(B, C, H, W) uint8 -> float32, (x / 255 - mean) / std as one multiplication and one addition."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device) -> None:
        means, stds = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
        self.scale = (1 / (255 * stds)).float().to(device)
        self.shift = (-means / stds).float().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """A new tensor, contiguous, on the device of `images`."""
        floats = images.to(torch.float32, memory_format=torch.contiguous_format)
        return floats.mul_(self.scale).add_(self.shift)


class Sampled:
    """Batches of a split by a `Sampler`, whose images subclasses make. `labels`: of all its images, (N,).

    Parameters
    ----------
    labels : (N,) int64.  device : of the batches.  mean, std : per channel, of pixels in [0, 1].
    batch_size, seed, shuffle, drop_last : as of `Sampler`.
    """

    def __init__(
        self,
        labels: Tensor,
        device: torch.device,
        *,
        num_classes: int,
        mean: list[float],
        std: list[float],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
    ) -> None:
        self.size, self.num_classes, self.labels = len(labels), num_classes, labels
        self._sampler = Sampler(len(labels), batch_size, seed, shuffle, drop_last)
        self._same_class = SameClass(labels.cpu(), seed)
        self._labels, self._device = labels.to(device), device
        self._normalise = Normalise(mean, std, device)

    def __len__(self) -> int:
        return len(self._sampler)

    def lengths(self) -> set[int]:
        """How many images its batches hold."""
        return self._sampler.lengths()

    def shard(self, share: Share) -> Self:
        """The same batches, of each of which only the positions `share` are made."""
        twin = copy.copy(self)
        twin._sampler = self._sampler.shared(share)
        return twin
