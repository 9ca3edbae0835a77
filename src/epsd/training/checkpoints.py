"""Checkpoints: any nest of tensors and plain values in one safetensors file, bound to what it was trained on.

They live outside DVC's outputs, under a folder named by a fingerprint of everything that the training depends on, so
that a run with other parameters never resumes from them (DVC keeps persistent outputs across such changes).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from epsd.files import digests
from epsd.files.regular import read_bytes
from epsd.project.artifacts import replacing
from epsd.types import EpsdError


class CheckpointError(EpsdError):
    """A checkpoint that is damaged, or that belongs to other parameters, data or code."""


def fingerprint(values: Mapping[str, Any], files: Iterable[Path] = ()) -> str:
    """32 hexadecimal digits over plain values and the content of files. Raises EpsdError for a missing file."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for path in files:
        try:
            digest.update(hashlib.sha256(read_bytes(path)).digest())
        except FileNotFoundError:
            raise EpsdError(f"{path}: missing. `dvc repro` runs the stage that writes it.") from None
        except OSError as error:
            raise EpsdError(f"{path}: cannot be read ({error.strerror}).") from None
    return digest.hexdigest()[:32]


def _encode(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON in which tensors are names and mappings keep the type of their keys."""
    if isinstance(node, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(node, Mapping):
        return {"mapping": [[key, _encode(value, tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return {"list": [_encode(value, tensors) for value in node]}
    return {"value": node}


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    kind, content = next(iter(node.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "mapping":
        return {key: _decode(value, tensors) for key, value in content}
    if kind == "list":
        return [_decode(value, tensors) for value in content]
    return content


def save(path: Path, state: Mapping[str, Any], mark: str) -> None:
    """Write `state` under `mark` (a fingerprint); the previous checkpoint stays until the new one is on disk."""
    tensors: dict[str, Tensor] = {}
    about = {"mark": mark, "tree": _encode(state, tensors)}
    with replacing(path) as temporary:
        digests.save_tensors(temporary, "checkpoint", tensors, about)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def load(path: Path, mark: str) -> dict[str, Any] | None:
    """What `save` wrote, on the CPU; None where there is no checkpoint.

    Raises CheckpointError for a damaged file and for one written under another fingerprint.
    """
    if not path.exists():
        return None
    try:
        tensors, about = digests.load_tensors(path, "checkpoint")
    except digests.DamagedFile as error:
        raise CheckpointError(f"{error} Delete it to start again.") from None
    if (found := about["mark"]) != mark:
        raise CheckpointError(
            f"{path}: this checkpoint belongs to other parameters, data or code ({found[:8]}, this run is {mark[:8]}). "
            "Delete it to start again."
        )
    state: dict[str, Any] = _decode(about["tree"], tensors)
    return state


def described(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """Plain values that tell `value` from another one, the same in every process that runs this code.

    Of a function its code, its defaults and what it closes over; of an object its class and its attributes; of a tensor
    its content.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        return repr(value)
    if id(value) in inside:
        return "..."
    inside = (*inside, id(value))
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return [repr(value.dtype), list(value.shape), digests.digest([content.numpy().data])]
    if isinstance(value, Mapping):
        return [[described(part, inside) for part in pair] for pair in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        parts = [described(part, inside) for part in value]
        return sorted(parts, key=repr) if isinstance(value, set | frozenset) else parts
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, described(value.co_consts, inside)]
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [
            name,
            *(described(p, inside) for p in (value.__code__, value.__defaults__, value.__kwdefaults__, cells)),
        ]
    if isinstance(value, MethodType):
        return [described(value.__func__, inside), described(value.__self__, inside)]
    if isinstance(value, partial):
        return [described(part, inside) for part in (value.func, value.args, value.keywords)]
    return [name, described(getattr(value, "__dict__", {}), inside) if not isinstance(value, type) else ""]
