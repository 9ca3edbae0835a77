"""Mean and standard deviation of the training images, exact in any order."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epsd.files.layouts import SourceError

_LEVELS = 256

_COUNTED_AT_ONCE = 1 << 20
"""Pixels of a channel that are counted in one go: numpy makes eight bytes of each."""


@dataclass
class Tally:
    """Count per channel and grey level (C, 256) of the training images: mean and std come out exact in any order."""

    histogram: NDArray[np.int64] | None = None

    def add(self, images: NDArray[np.uint8]) -> None:
        """`images`: (N, C, H, W). Takes a few MB beside them, however many they are."""
        count, channels, height, width = images.shape
        if self.histogram is None:
            self.histogram = np.zeros((channels, _LEVELS), dtype=np.int64)
        step = max(1, _COUNTED_AT_ONCE // (height * width))
        for start in range(0, count, step):
            for channel in range(channels):
                part = images[start : start + step, channel].ravel()
                self.histogram[channel] += np.bincount(part, minlength=_LEVELS)

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Per channel, of pixels in [0, 1]. A channel without contrast gets std 1."""
        if self.histogram is None:
            raise SourceError("no training image to take mean and std from.")
        share = self.histogram / self.histogram.sum(axis=1, keepdims=True)
        levels = np.arange(_LEVELS) / (_LEVELS - 1)
        mean = share @ levels
        std = np.sqrt(np.maximum(share @ levels**2 - mean**2, 0))
        return [round(float(m), 8) for m in mean], [round(float(s), 8) if s > 1e-6 else 1.0 for s in std]
