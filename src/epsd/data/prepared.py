"""One prepared data set, and batches of it: from memory (on the device) or streamed from files, behind one interface.

Images of up to `epsd.preparing.write.IN_MEMORY_UP_TO` pixels are uint8 tensors on the device; pad-crop, flip,
normalisation, second views and same-class partners are made there for a whole batch at once. Larger images
stream from their files (`epsd.data.streaming`). Either way the batches of epoch n depend on (seed, n) alone: not on
the global random state, the device, or the number of workers.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from epsd.compute.devices import Machine
from epsd.data.in_memory import MemoryBatches, Pixels
from epsd.data.streaming import Augmentation, Pictures, StreamedBatches
from epsd.files.archives import open_tree
from epsd.files.digests import check
from epsd.files.layouts import UNPACKED, Files, Reading, Split, check_labels
from epsd.project.artifacts import ArtifactError, Described, Digest, read_json, valid
from epsd.types import Batches, EpsdError


class _Index(Described):
    """What of data.json is read back; the rest is for people. `digests`: of the files beside it, by name."""

    storage: Literal["memory", "files"]
    root: str | None
    reading: Reading
    sizes: dict[Split, Annotated[int, Field(ge=0)]]
    digest: str
    digests: dict[str, Digest]
    settings: dict[str, Any]


class _Listed(BaseModel):
    """The images of a split, and the digests of their files."""

    files: list[str]
    digests: list[Digest]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote, opened. `sizes`: images per split (0 where a split is not there).

    `machine`: where its batches lie, and how many processes decode where images are streamed.
    """

    folder: Path
    class_names: list[str]
    image_shape: tuple[int, int, int]
    mean: list[float]
    std: list[float]
    sizes: dict[str, int]
    digest: str
    index: dict[str, Any]
    machine: Machine = field(default=Machine(), compare=False)
    _cache: dict[tuple[str, str, int], Pixels] = field(default_factory=dict, repr=False, compare=False)
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path, machine: Machine = Machine()) -> "Prepared":
        """Open `folder/data.json`. Raises ArtifactError or DamagedFile: missing, or not what `prepare` writes."""
        path = Path(folder) / "data.json"
        index = read_json(path)
        known = valid(index, _Index, path)
        told = known.model_dump(include={"class_names", "image_shape", "mean", "std", "sizes", "digest"})
        return cls(folder=Path(folder), index=index, machine=machine, **told)

    def on(self, machine: Machine) -> Self:
        """The same images, with batches for `machine`."""
        return replace(self, machine=machine)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def labels(self, split: Split) -> NDArray[np.int64]:
        """(N,) int64."""
        return self._array(split, "labels")

    def images(self, split: Split) -> NDArray[np.uint8]:
        """(N, C, H, W) uint8, not normalised. Raises EpsdError where the images are streamed from files."""
        if self.index["storage"] != "memory":
            raise EpsdError(f"{self.folder}: its images are read from files, not held as one array.")
        return self._array(split, "images")

    def batches(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
    ) -> Batches:
        """Batches of a split on the machine's device, normalised by the training split's mean and std.

        Raises TooFewImages when `drop_last` leaves no batch; EpsdError for a split that is not there.
        """
        if not self.sizes.get(split):
            raise EpsdError(f"{self.folder}: has no {split} split; set data.{split} above 0 and prepare again.")
        common: dict[str, Any] = {
            "num_classes": self.num_classes,
            "mean": self.mean,
            "std": self.std,
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "drop_last": drop_last,
        }
        labels = torch.from_numpy(self.labels(split))
        if self.index["storage"] == "memory":
            pixels = self._on_device(split, augmentation.crop_padding if augmentation else 0)
            return MemoryBatches(pixels, labels, flip=bool(augmentation and augmentation.flip), **common)
        images = Pictures(self._files(split), Reading(**self.index["reading"]), self.image_shape)
        return StreamedBatches(images, labels, augmentation=augmentation, machine=self.machine, **common)

    def _on_device(self, split: Split, padding: int) -> Pixels:
        """Kept, so that several `batches` of a split share one copy."""
        device = self.machine.device
        key = split, str(device), padding
        if key not in self._cache:
            self._cache[key] = Pixels.of(torch.from_numpy(self.images(split)).to(device), padding)
        return self._cache[key]

    def _files(self, split: Split) -> Files:
        root = self.index["root"]
        folder = self.folder / UNPACKED if root is None else Path(root)
        path = self.folder / f"{split}_files.json"
        listed = valid(read_json(path), _Listed, path)
        if not len(listed.files) == len(listed.digests) == self.sizes[split]:
            raise ArtifactError(f"{path}: lists {len(listed.files)} files, data.json says {self.sizes[split]}.")
        return Files(open_tree(folder), listed.files, listed.digests)

    def _array(self, split: Split, kind: str) -> NDArray[Any]:
        path = self.folder / f"{split}_{kind}.npy"
        if path.name not in self._checked:
            check(path, self.index["digests"].get(path.name, "unknown"))
            self._checked.add(path.name)
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ArtifactError(f"{path}: cannot be read ({error}). Run prepare again.") from None
        shape, dtype = ((), np.int64) if kind == "labels" else (self.image_shape, np.uint8)
        wanted = (self.sizes[split], *shape)
        if array.shape != wanted or array.dtype != dtype:
            raise ArtifactError(f"{path}: holds {array.shape} {array.dtype}, data.json says {wanted} {dtype.__name__}.")
        if kind == "labels":
            check_labels(array, self.class_names, str(path))
        return array
