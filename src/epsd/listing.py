"""Whether the images that `prepare` read have changed since, told by names, sizes and times: no file is opened.

DVC watches the files that dvc.yaml names. A user's images lie somewhere else, may be a million, and are named in
params.yaml only; so `make repro` asks here before it asks DVC.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from epsd.archives import open_tree
from epsd.artifacts import write_json
from epsd.runtime import state_folder

_SEEN = "read.json"
"""Beside the checkpoints, not among the artifacts: times differ between copies of the same images."""


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


def remember(roots: Iterable[Path]) -> None:
    """Note how these folders and archives look now."""
    seen = _remembered() | {str(root): found for root in roots if (found := glance(root))}
    state_folder().mkdir(exist_ok=True)
    write_json(state_folder(_SEEN), seen)


def changed(roots: Iterable[Path]) -> list[Path]:
    """Those that look otherwise than when they were remembered. What nobody remembers is not among them."""
    seen = _remembered()
    return [root for root in roots if str(root) in seen and glance(root) not in (None, seen[str(root)])]


def _remembered() -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(state_folder(_SEEN).read_text(encoding="utf-8")))
    return {}
