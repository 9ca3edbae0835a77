"""Which code does a result depend on? One table, from which the dependencies in dvc.yaml, the marks of checkpoints and
of studies' cells, and the fingerprints of searches derive: an edit reruns what it can change, and nothing else.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]

CHANGES = {
    "files": "prepare images prune train evaluate detect",
    "preparing": "prepare images",
    "voc": "prepare detect",
    "datasets/${dataset.name}.py": "prepare images",
    "datasets/${voc.name}.py": "prepare",
    "compute/seeds.py": "prepare images",
    "compute": "prune train evaluate detect",
    "data": "prune train evaluate detect",
    "masks.py": "prune train evaluate detect",
    "losses.py": "prune train",
    "architectures/${architecture.name}.py": "prune train evaluate detect",
    "architectures/_features.py": "prune train evaluate detect",
    "objectives/${objective.name}.py": "prune train",
    "scores/${prune.score.name}.py": "prune",
    "pruning": "prune",
    "pruning/start.py": "detect",
    "pipeline/backbone.py": "detect",
    "pipeline/prune.py": "prune",
    "training": "train detect",
    "pipeline/train.py": "train",
    "evaluation": "evaluate",
    "pipeline/deploy.py": "evaluate",
    "pipeline/export.py": "evaluate",
    "evaluation/predict.py": "detect",
    "tracking/models.py": "evaluate detect",
    "detection": "detect",
    "detectors/${detect.detector.name}.py": "detect",
    "detectors/_features.py": "detect",
    "detectors/_suited.py": "detect",
    "figures/style.py": "prune evaluate detect",
    "figures/boxes.py": "prepare detect",
    "figures/contact_sheet.py": "prepare",
    "studies/procedures/${procedure.name}.py": "procedure",
    "studies/${procedure.name}": "procedure",
}
"""Room or file of the package -> what an edit there can change: a stage's outputs, the `images` half of `prepare`, or
the `procedure` of a study. `${...}` stands for a value of params.yaml, as in dvc.yaml.

The dense twin of `detect` is trained as `train` does it: see `stages/detect.py`. What `train` depends on makes `detect`
and `evaluate` rerun in any case, as they read the id of its run.
"""

NOTHING = (
    "__init__.py", "cli.py", "registry.py", "types.py", "analysis", "comparison", "engine", "figures", "project",
    "studies", "tracking", "tuning", "datasets/downloads.py", "pipeline/budget.py", "pipeline/changes.py",
    "pipeline/describe.py", "pipeline/detect.py", "pipeline/doctor.py", "pipeline/hand_over.py", "pipeline/launch.py",
    "pipeline/load.py", "pipeline/place.py", "pipeline/predict.py", "pipeline/prepared.py", "pipeline/stage.py",
    "pipeline/weights.py",
)  # fmt: skip
"""Where nothing else stands in the table: no result depends on it (a download is checked against its checksum; what a
budget measured hangs on the machine and the moment, and is not to be measured again for an edit).
"""

SHOWN = (
    "evaluation/model_card.py", "evaluation/servable.py", "figures", "detection/drawing.py", "pipeline/export.py",
    "tracking",
)  # fmt: skip
"""What wraps and draws results: outputs of a stage depend on it, but no number, so that it is in no mark."""


def rooms(*uses: str) -> list[str]:
    """The entries of the table that any of `uses` depends on."""
    return [room for room, changes in CHANGES.items() if set(uses) & set(changes.split())]


def files(uses: Iterable[str], *trees: Mapping[str, Any]) -> list[Path]:
    """The files that the numbers of `uses` depend on, those of the variants that any of `trees` chooses included.

    trees : params.yaml as plain mappings (a study adds `procedure`).
    """
    found: set[Path] = set()
    for room in {_filled(room, tree) for room in rooms(*uses) for tree in trees}:
        path = PACKAGE / room
        found |= set(path.rglob("*.py")) if path.is_dir() else {path} if path.is_file() else set()
    return sorted(path for path in found if not within(path.relative_to(PACKAGE), SHOWN))


def digests(uses: Iterable[str], *trees: Mapping[str, Any]) -> dict[str, str]:
    """Name in the package -> digest of its content, of `files`: what marks and fingerprints are made of."""
    found = files(uses, *trees)
    return {path.relative_to(PACKAGE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in found}


def within(path: Path, places: Iterable[str]) -> bool:
    """Whether `path`, relative to the package, is one of these files or lies in one of these rooms."""
    return any(place in (path.as_posix(), *(parent.as_posix() for parent in path.parents)) for place in places)


def _filled(room: str, tree: Mapping[str, Any]) -> str:
    """The entry for the variant that `tree` chooses."""

    def value(name: re.Match[str]) -> str:
        node: Any = tree
        for part in name[1].split("."):
            node = node.get(part, {})
        return str(node)

    return re.sub(r"\$\{(.+?)\}", value, room)
