"""Batches of images that live on the device: cropped, mirrored and normalised there, many at once."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epsd.data.sampling import Sampled, generator, partner_positions
from epsd.types import Batch, BatchNeeds


class Draws(NamedTuple):
    """Random numbers of an epoch on the device: where each crop begins (M,), (M,), and which are mirrored (M,)."""

    top: Tensor
    left: Tensor
    mirrored: Tensor


class Pixels(NamedTuple):
    """Images held on a device: `padded` (N, H + 2p, W + 2p, C) uint8 with `padding` p black pixels around.

    Channels come last, so that a pixel's lie together for the gather.
    """

    padded: Tensor
    padding: int

    @classmethod
    def of(cls, images: Tensor, padding: int = 0) -> "Pixels":
        """From (N, C, H, W) uint8."""
        count, channels, height, width = images.shape
        result = images.new_zeros(count, height + 2 * padding, width + 2 * padding, channels)
        result[:, padding : padding + height, padding : padding + width] = images.permute(0, 2, 3, 1)
        return cls(result, padding)


class MemoryBatches(Sampled):
    """Batches of a split that lives on the device. `drawing`: as of `Sampled`.

    `flip`: mirror half of the images; crops move by up to `pixels.padding`. With neither, a second view equals the
    first.
    """

    def __init__(self, pixels: Pixels, labels: Tensor, *, flip: bool = False, **drawing: Any) -> None:
        super().__init__(labels, pixels.padded.device, **drawing)
        self._pixels, self._flip = pixels, flip

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        """The batches of epoch `number`; `partner` is filled as `needs` asks, `indices` always."""
        order = self._sampler.order(number)
        draws = self._draws(len(order), number, "image")
        second = partner_positions(needs, order, number, self._same_class)
        second_draws = self._draws(len(order), number, "partner")
        chosen, partners = order.to(self._device), None if second is None else second.to(self._device)
        for part in self._sampler.parts(len(order)):
            indices = chosen[part]
            partner = None if partners is None else self._look(partners[part], second_draws, part)
            yield Batch(self._look(indices, draws, part), self._labels[indices], indices, partner)

    def _draws(self, size: int, number: int, purpose: str) -> Draws:
        random = generator(self._sampler.seed, "augment", purpose, number)
        top, left = torch.randint(0, 2 * self._pixels.padding + 1, (2, size), generator=random).to(self._device)
        mirrored = torch.rand(size, generator=random) < (0.5 if self._flip else 0.0)
        return Draws(top, left, mirrored.to(self._device))

    def _look(self, positions: Tensor, draws: Draws, part: slice) -> Tensor:
        """(B, C, H, W) float32, normalised: one gather that crops and mirrors, then scale and shift."""
        padded, padding = self._pixels
        _, padded_height, padded_width, channels = padded.shape
        down = torch.arange(padded_height - 2 * padding, device=self._device)
        across = torch.arange(padded_width - 2 * padding, device=self._device)
        columns = torch.where(draws.mirrored[part, None], across.flip(0), across) + draws.left[part, None]
        lines = (positions[:, None] * padded_height + draws.top[part, None] + down) * padded_width
        flat = lines[:, :, None] + columns[:, None, :]
        picked = padded.view(-1, channels).index_select(0, flat.view(-1)).view(*flat.shape, channels)
        return self._normalise(picked.permute(0, 3, 1, 2))
