"""Whether the images that `prepare` read have changed since, told by names, sizes and times: no file is opened.

DVC watches the files that dvc.yaml names. A user's images lie somewhere else, may be a million, and are named in
params.yaml only; so `make repro` asks here before it asks DVC.
"""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from epsd.files.archives import open_tree
from epsd.project.artifacts import read_json, write_json
from epsd.project.runtime import state_folder
from epsd.types import EpsdError

_SEEN = "read.json"
"""Beside the checkpoints, not among the artifacts: times differ between copies of the same images."""

Read = Mapping[Any, str]
"""Folder or archive, or the name of weights -> digest of what was made from it."""
Look = Callable[[Any], str | None]
"""How one of these looks now; None where it cannot be told."""


def glance(root: Path) -> str | None:
    """A digest over names, sizes and times of what lies at `root`, hidden files left out; None where nothing does.

    Raises ArchiveError: a folder that cannot be listed.
    """
    if not root.exists():
        return None
    digest = hashlib.blake2b(digest_size=16)
    names = [""] if root.is_file() else open_tree(root).names
    for path in (root / name for name in names):
        with contextlib.suppress(OSError):  # gone meanwhile, or a link to nowhere
            found = path.stat()
            digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def remember(read: Read, look: Look = glance) -> None:
    """Note how these folders and archives look now, as what was made from them."""
    seen = _remembered()
    for root, digest in read.items():
        if found := look(root):
            seen[_key(root, digest)] = found
    state_folder().mkdir(exist_ok=True)
    write_json(state_folder(_SEEN), seen)


def changed(read: Read, look: Look = glance) -> list[Path | str]:
    """Those that look otherwise than when this was made from them. What nobody remembers is not among them.

    By what was made, as DVC may have brought back from its cache what an earlier state of the images gave.
    """
    seen = _remembered()
    known = {root: seen[key] for root, digest in read.items() if (key := _key(root, digest)) in seen}
    return [root for root, before in known.items() if look(root) not in (None, before)]


def _key(root: object, digest: str) -> str:
    return f"{root} {digest}"


def _remembered() -> dict[str, str]:
    with contextlib.suppress(EpsdError):
        return read_json(state_folder(_SEEN))
    return {}
