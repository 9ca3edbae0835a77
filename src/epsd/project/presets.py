"""Ready-made parameter files for the field's benchmarks: `presets/<name>.yaml`, a whole params.yaml, or `base: OTHER`
and what differs from that preset.
"""

import re
import time
from pathlib import Path
from typing import Any

from epsd.project import commented
from epsd.project.artifacts import replacing
from epsd.project.params import DEFAULT_PATH, as_tree, parse, read_text
from epsd.project.runtime import project_root
from epsd.registry import ParamsError, unknown


def folder() -> Path:
    """`presets/` of the project that the current folder belongs to, else of the code's own checkout.

    Raises ParamsError where neither has one.
    """
    for root in (project_root(), Path(__file__).resolve().parents[3]):
        if (root / "presets").is_dir():
            return root / "presets"
    raise ParamsError("presets: no such folder here. Run from the project's root.")


def names() -> list[str]:
    """Every preset, sorted."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a preset. Raises ParamsError for an unknown one, listing those there are."""
    if name not in names():
        raise unknown("preset", name, names())
    return folder() / f"{name}.yaml"


def summary(name: str) -> str:
    """What it is for, in one line: the first line of its head comment."""
    first = find(name).read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").removeprefix(f"{name}: ")


def whole(name: str) -> str:
    """A preset as a whole parameter file, comments included. Raises ParamsError: unknown, no YAML, or its `base` is."""
    return _whole(name, ())


def read(name: str) -> dict[str, Any]:
    """`whole` as plain Python."""
    return as_tree(whole(name), find(name))


def _whole(name: str, above: tuple[str, ...]) -> str:
    path = find(name)
    head, own = _parts(read_text(path))
    base = as_tree(own, path).get("base")
    if base is None:
        return head + own
    if base not in names() or base in (name, *above):
        raise unknown(f"{path}: base", base, [other for other in names() if other not in (name, *above)])
    return head + commented.laid_over(_parts(_whole(base, (name, *above)))[1], own)


def _parts(text: str) -> tuple[str, str]:
    """The comment that a file begins with, and the rest."""
    rest = re.sub(r"\A(#.*\n)*", "", text)
    return text[: len(text) - len(rest)], rest


def current() -> Path:
    """params.yaml of the project that the current folder belongs to. Raises ParamsError outside of one."""
    root = project_root()
    if not (root / "dvc.yaml").is_file():
        raise ParamsError(
            f"{root}: belongs to no project (there is no dvc.yaml here or above). Go to the project's folder."
        )
    return root / DEFAULT_PATH


def apply(name: str, target: Path) -> Path | None:
    """Make the preset the parameters in `target`, comments included. Returns the copy of what was there before.

    The copy is `<target>.<date>-<time>`; None where there was nothing to lose (no file, or these very parameters).
    Raises ParamsError for an unknown or unfit preset, ArtifactError where a file cannot be written; `target` then
    is what it was.
    """
    text = whole(name)
    parse(as_tree(text, find(name)))
    wanted = text.encode()
    before = target.read_bytes() if target.exists() else wanted
    copy = None if before == wanted else _free(target)
    if copy is not None:
        _write(copy, before)
    _write(target, wanted)
    return copy


def keep(target: Path) -> Path:
    """A copy of `target` beside it, `<target>.<date>-<time>`."""
    copy = _free(target)
    _write(copy, target.read_bytes())
    return copy


def _free(target: Path) -> Path:
    """A name beside `target` that no file has yet."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    endings = ["", *(f"-{number}" for number in range(2, 1000))]
    return next(path for ending in endings if not (path := target.with_name(f"{target.name}.{stamp}{ending}")).exists())


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)
