"""From pixels to class probabilities in one module: what is exported and served over HTTP.

The network is fed what evaluation feeds it: images brought to its size, (x / 255 - mean) / std, in full precision.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from epsd.data.sampling import Normalise
from epsd.evaluation.intake import Ask, Intake

EXAMPLE_UP_TO = 64
"""Pixels on the longer side of an input example: it is stored as text, and any size is accepted."""


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
        """(B, C, H, W) float32 -> (B, K). RuntimeError, also of the export of torch, where a pixel is no number."""
        torch.ops.aten._assert_async.msg(images.isfinite().all(), "a pixel is NaN or infinite")
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


def asking(module: nn.Module) -> Ask:
    """A `Servable`, or one loaded back from an export, as it is asked: arrays in, arrays out."""

    def ask(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            probabilities: NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
        return probabilities

    return ask


def levels(images: Tensor, intake: Intake) -> NDArray[np.uint8]:
    """Normalised images (B, C, H, W) as the pixels, 0 to 255, that they were."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (intake.mean, intake.std))
    pixels: NDArray[np.uint8] = ((images.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels


def example(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(B, C, H, W) images as a client sends them, large ones made smaller: the input example of a model."""
    longer = max(images.shape[2:])
    pictures = torch.from_numpy(images.astype(np.float32))
    if longer > EXAMPLE_UP_TO:
        height, width = (max(2, round(side * EXAMPLE_UP_TO / longer)) for side in images.shape[2:])
        pictures = F.interpolate(pictures, size=(height, width), mode="bilinear", antialias=True).round()
    small: NDArray[np.float32] = pictures.numpy()
    return small
