"""Tiny networks and data that many tests share."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from epsd.masks import Mask, prunable
from epsd.training.record import Record
from epsd.types import Batch, BatchNeeds


def mlp(inputs: int = 12, classes: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two linear layers, smooth, without batch statistics: exact against finite differences."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, classes)).to(dtype)


def convnet(classes: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A convolution with BatchNorm and a classifier, for 1x4x4 images."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    ).to(dtype)


class ToyBatches:
    """A split of `size` random images with a label each, separable by class; epoch n always gives the same batches."""

    def __init__(
        self,
        size: int = 48,
        batch_size: int = 12,
        num_classes: int = 3,
        shape: tuple[int, int, int] = (1, 4, 4),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.size, self.num_classes, self.batch_size = size, num_classes, batch_size
        self.labels = torch.arange(size) % num_classes
        centres = torch.randn(num_classes, *shape, generator=generator, dtype=dtype)
        self.images = centres[self.labels] + 0.7 * torch.randn(size, *shape, generator=generator, dtype=dtype)

    def __len__(self) -> int:
        return self.size // self.batch_size

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(self.size, generator=generator)
        noise = 0.1 * torch.randn(self.images.shape, generator=generator, dtype=self.images.dtype)
        same = torch.stack([torch.arange(self.size)[self.labels == label].roll(1)[0] for label in self.labels])
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            indices = order[start : start + self.batch_size]
            partner: Tensor | None = None
            if needs.partner == "view":
                partner = self.images[indices] + noise[indices]
            elif needs.partner == "same_class":
                partner = self.images[same[indices]]
            yield Batch(self.images[indices], self.labels[indices], indices, partner)


def half(model: nn.Module, sparsity: float = 0.7) -> Mask:
    return Mask.from_scores({name: p.detach().abs() for name, p in prunable(model).items()}, sparsity)


class Killed(BaseException):
    """Stands for SIGKILL at the end of an epoch."""


def stop_after(epoch: int) -> Callable[[Record], None]:
    def on_epoch(record: Record) -> None:
        if record["epoch"] == epoch:
            raise Killed

    return on_epoch


def timeless(history: list[Record]) -> list[Record]:
    """What does not depend on how fast the machine is."""
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in history]


CLOCKS = {"time/epoch", "cost/seconds"}


def net_with_dropout() -> nn.Module:
    model = convnet()
    model.insert(6, nn.Dropout(0.3))
    return model
