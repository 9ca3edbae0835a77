"""Files that carry a digest of what was written, so that damage is told instead of used: tensors, JSON, any other file.

The digest is a CRC-32. It finds every flipped byte and every cut, at a gigabyte per second (benchmarks/results/
digests-cpu.md): it is meant for accidents, and no signature. The bytes of a file depend on its content alone.
"""

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epsd.files.regular import check_regular, refused
from epsd.types import EpsdError

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "epsd"
"""The only key of a safetensors file's metadata: of several, their order would differ from run to run."""
_SEAL = "checksum"
"""Key of a JSON file's digest. Its value is a list, which DVC takes for no metric."""
_SEALED = re.compile(rb',?\n  "checksum": \["crc32", "([0-9a-f]{8})"\]\n\}\n\Z')
_LONGEST_SEAL = 80
_AT_ONCE = 1 << 20


class DamagedFile(EpsdError):
    """A file that is not what was written, or that was written by something else. The message names it."""


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Eight hexadecimal digits over the parts, one after another."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def digest_of(path: Path) -> str:
    """The digest of a file's bytes. Raises OSError."""
    with check_regular(path).open("rb") as file:
        return digest(iter(lambda: file.read(_AT_ONCE), b""))


def check(path: Path, wanted: str) -> None:
    """Raises DamagedFile where the file at `path` is missing, or not that of which `digest_of` gave `wanted`."""
    with refused(DamagedFile, path, "read"):
        found = digest_of(path)
    if found != wanted:
        raise DamagedFile(f"{path}: damaged or replaced: its digest is {found}, {wanted} was written.")


def sealed(content: Mapping[str, Any]) -> str:
    """The mapping as indented JSON, with the digest of what stands before it as a last entry.

    Raises ValueError for NaN and infinity, which are not JSON.
    """
    body = json.dumps(content, indent=2, allow_nan=False, default=str)[:-1].rstrip()
    return f'{body}{"," if content else ""}\n  "{_SEAL}": ["crc32", "{digest([body.encode()])}"]\n}}\n'


def unsealed(text: bytes, path: Path) -> dict[str, Any]:
    """The mapping that `sealed` was given. Raises DamagedFile naming `path` where it is not what was written."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: cannot be read ({error}).") from None
    seal = _SEALED.search(text, max(0, len(text) - _LONGEST_SEAL))
    if not (isinstance(content, dict) and seal):
        raise DamagedFile(f"{path}: carries no digest: damaged, edited, or not written by this version.")
    if (found := digest([memoryview(text)[: seal.start()]])) != (wanted := seal[1].decode()):
        raise DamagedFile(f"{path}: damaged or edited: its digest is {found}, {wanted} was written.")
    del content[_SEAL]
    return content


def save_tensors(path: Path, kind: str, tensors: Mapping[str, "Tensor"], about: Mapping[str, Any]) -> None:
    """One safetensors file of contiguous tensors on the CPU, with its `kind` and `about` (plain JSON) in the header."""
    from safetensors.torch import save_file

    text = json.dumps(dict(about), default=str)
    header = {"kind": kind, "about": text, "digest": _tensor_digest(kind, text, tensors)}
    save_file(dict(tensors), path, {_KEY: json.dumps(header)})


def load_tensors(path: Path, kind: str) -> tuple[dict[str, "Tensor"], Any]:
    """The tensors, on the CPU, and `about`, as `save_tensors` was given them.

    Raises DamagedFile: missing, no safetensors file, of another kind, or not what was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(check_regular(path), "pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except FileNotFoundError:
        raise DamagedFile(f"{path}: missing.") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: cannot be read as safetensors ({error}).") from None
    match header:
        case {"kind": str(found), "about": str(text), "digest": str(wanted)}:
            if _tensor_digest(found, text, tensors) != wanted:
                raise DamagedFile(f"{path}: damaged: its content is not what was written.")
            if found == kind:
                return tensors, json.loads(text)
            raise DamagedFile(f"{path}: holds {found}, not {kind}.")
        case _:
            raise DamagedFile(f"{path}: carries no digest: damaged, or no {kind} of this version of the project.")


def kind_of(path: Path) -> str | None:
    """What the file says that it holds, without reading it all; None where it is none of `save_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(check_regular(path), "pt") as file:
            kind: str = json.loads((file.metadata() or {})[_KEY])["kind"]
            return kind
    except (SafetensorError, OSError, ValueError, LookupError, TypeError):
        return None


def _tensor_digest(kind: str, about: str, tensors: Mapping[str, "Tensor"]) -> str:
    import torch

    def parts() -> Iterable[bytes | memoryview]:
        yield f"{kind}\n{about}".encode()
        for name, tensor in sorted(tensors.items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.reshape(-1).view(torch.uint8).numpy().data

    return digest(parts())
