"""The handwritten digits that come with scikit-learn: 1,797 real grey images of 8x8 pixels, no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(its test set). It brings no splits; `prepare` carves them.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from epsd.files.layouts import Labelled, Source
from epsd.registry import variant

_NATIVE = 8
_LEVELS = 16  # grey values run from 0 to 16


@variant
class Digits:
    """`size`: side in pixels, 8 as they are (others are scaled by `resampling`)."""

    size: Annotated[int, Field(ge=4, le=64)] = _NATIVE
    resampling: Literal["bilinear", "nearest"] = "bilinear"

    def __call__(self) -> Source:
        """Images (1797, 1, size, size) uint8, all in "train"."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.rint(bunch.images * (255 / _LEVELS)).astype(np.uint8)[:, None]
        return Source(
            description="scikit-learn load_digits",
            class_names=[str(name) for name in bunch.target_names],
            splits={"train": Labelled(self._scaled(images), bunch.target.astype(np.int64))},
        )

    def _scaled(self, images: np.ndarray) -> np.ndarray:
        if self.size == _NATIVE:
            return images
        from PIL import Image

        how = Image.Resampling[self.resampling.upper()]
        shape = (self.size, self.size)
        return np.stack([np.asarray(Image.fromarray(image[0]).resize(shape, how))[None] for image in images])
