"""A compact file for a pruned network: only its nonzero weights, loaded back to the very same bits.

One safetensors file. Each floating-point tensor is stored in the smallest of three ways:

- dense: as it is (biases, norm layers, layers that pruning left full);
- bitmap: one bit per entry, eight to a byte, and the values of the entries that are not zero;
- gaps: one byte per kept entry, the number of zeros before it (255 = skip 255 entries and read on), and the values.
  Smaller than the bitmap below a density of about 12 %.

"Zero" means all bits zero: a negative zero is kept as a value, so that nothing at all changes on the way. Metadata
(JSON, in the header) hold each tensor's shape and way of storage, and the card of the model. No pickled code. The same
network and card give the same bytes, which carry a digest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from epsd.files import digests
from epsd.project.artifacts import replacing

KIND = "compact model"
SKIP = 255
ENTRY = 128  # bytes that a second part costs in the header
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sizes(NamedTuple):
    """Bytes on disk, and what the same tensors take densely (values only, without a header)."""

    file: int
    dense: int

    @property
    def ratio(self) -> float:
        """Dense bytes / bytes of the file."""
        return self.dense / max(self.file, 1)


def _nonzero(tensor: Tensor) -> Tensor:
    """(N,) bool: which entries have any bit set."""
    return tensor.flatten().view(BITS[tensor.element_size()]) != 0


def _to_gaps(keep: Tensor) -> Tensor:
    """(N,) bool -> uint8 codes. A kept entry is the count of removed ones since the last, in base 255 (see module)."""
    positions = np.flatnonzero(keep.numpy())
    gaps = np.diff(positions, prepend=-1) - 1
    skips, rest = np.divmod(gaps, SKIP)
    codes = np.full(int((skips + 1).sum()), SKIP, dtype=np.uint8)
    codes[np.cumsum(skips + 1) - 1] = rest
    return torch.from_numpy(codes)


def _from_gaps(codes: Tensor, size: int) -> Tensor:
    """The inverse of `_to_gaps`: (size,) bool."""
    numbers = codes.numpy().astype(np.int64)
    steps = np.where(numbers == SKIP, SKIP, numbers + 1)
    positions = np.cumsum(steps)[numbers != SKIP] - 1
    keep = np.zeros(size, dtype=bool)
    keep[positions] = True
    return torch.from_numpy(keep)


def _to_bitmap(keep: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(keep.numpy()))


def _from_bitmap(codes: Tensor, size: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(codes.numpy(), count=size).astype(bool))


ENCODERS = {"bitmap": _to_bitmap, "gaps": _to_gaps}
DECODERS = {"bitmap": _from_bitmap, "gaps": _from_gaps}


def _encode(tensor: Tensor) -> tuple[str, dict[str, Tensor]]:
    """The smallest way to store `tensor`, and its parts by suffix."""
    dense = {"": tensor}
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return "dense", dense
    keep = _nonzero(tensor)
    values = tensor.flatten()[keep]
    ways = {name: encode(keep) for name, encode in ENCODERS.items()}
    name, codes = min(ways.items(), key=lambda way: way[1].numel())
    if codes.numel() + values.numel() * tensor.element_size() + ENTRY >= tensor.numel() * tensor.element_size():
        return "dense", dense
    return name, {":codes": codes, ":values": values}


def save(state: Mapping[str, Tensor], path: str | Path, card: Mapping[str, Any] | None = None) -> Sizes:
    """Write the state dict of a network to `path`. `card`: how to rebuild it (as `artifacts.save_model`).

    Returns the sizes. Raises ArtifactError where the file cannot be written.
    """
    parts: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    dense = 0
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().clone().contiguous()
        dense += tensor.numel() * tensor.element_size()
        way, stored = _encode(tensor)
        index[name] = {"way": way, "shape": list(tensor.shape)}
        parts.update({name + suffix: part for suffix, part in stored.items()})
    with replacing(Path(path)) as temporary:
        digests.save_tensors(temporary, KIND, parts, {"tensors": index, "card": card or {}})
    return Sizes(Path(path).stat().st_size, dense)


def _decode(name: str, entry: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    """One tensor as it was. Raises ValueError and others where parts and shape do not fit."""
    way, shape = entry["way"], torch.Size(entry["shape"])
    if way == "dense":
        return parts[name]
    values = parts[f"{name}:values"]
    keep = DECODERS[way](parts[f"{name}:codes"], shape.numel())
    if int(keep.sum()) != values.numel():
        raise ValueError(f"'{name}' has {values.numel()} values for {int(keep.sum())} places")
    flat = torch.zeros(shape.numel(), dtype=values.dtype)
    flat[keep] = values
    return flat.view(shape)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict (on the CPU, in the order it was saved) and card of a file that `save` wrote.

    Raises DamagedFile naming the file: missing, truncated, changed, or not of this format.
    """
    parts, about = digests.load_tensors(Path(path), KIND)
    try:
        return {name: _decode(name, entry, parts) for name, entry in about["tensors"].items()}, about["card"]
    except (AttributeError, ValueError, LookupError, TypeError, RuntimeError, MemoryError) as error:
        raise digests.DamagedFile(f"{path}: cannot be read as a compact model: {error}.") from None


def is_compact(path: Path) -> bool:
    """Whether `path` is a file that `save` wrote, told by its header."""
    return digests.kind_of(path) == KIND


save_compact, load_compact = save, load
"""Their names in the library."""
