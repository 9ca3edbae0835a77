"""A project for whoever has installed the package and has no clone of it: what `epsd init` writes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from epsd.files.regular import read_bytes, refused
from epsd.project.runtime import brief
from epsd.types import EpsdError

FILES = ("params.yaml", ".gitignore", ".dvcignore", "stages", "presets")
PACKAGE = "package.txt"
"""Holds the version of the package: what the stages of such a project depend on instead of the package's files."""

HEAD = f"""\
# The whole pipeline: `dvc repro` runs what is stale. Code is the installed package: another version of it reruns all.
# `${{...}}` stands for a value of params.yaml.
stages:
  package:
    cmd: epsd --version > {PACKAGE}
    always_changed: true
    outs:
      - {PACKAGE}:
          cache: false

"""
README = """\
# A project of epsd

```console
$ dvc repro      # prepare, prune, train, evaluate, detect: what is stale of them
$ epsd           # what makes sense next
$ mlflow ui --backend-store-uri sqlite:///mlflow.db     # the recorded runs
```

Every number that a result depends on is in `params.yaml`; `epsd preset --list` has whole files for known benchmarks.
"""


def init(folder: Path) -> None:
    """Write a project to `folder`, which is new or empty. Raises EpsdError, with nothing written."""
    source = template()
    if folder.exists() and (not folder.is_dir() or any(path.name != ".git" for path in folder.iterdir())):
        raise EpsdError(f"{folder}: is there and not empty. Name a new folder.")
    with refused(EpsdError, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            copy = shutil.copytree if (source / name).is_dir() else shutil.copy
            copy(source / name, folder / name)
        (folder / "dvc.yaml").write_text(of_package(read_bytes(source / "dvc.yaml").decode("utf-8")), encoding="utf-8")
        (folder / "README.md").write_text(README, encoding="utf-8")
        (folder / "mlruns").mkdir()
        (folder / "mlruns" / ".gitkeep").touch()
    _dvc(folder)


def template() -> Path:
    """The files of a project: of the installed package, or of the checkout that the code lies in."""
    places = Path(__file__).with_name("template"), Path(__file__).parents[3]
    return next(place for place in places if (place / "dvc.yaml").is_file())


def of_package(pipeline: str) -> str:
    """The text of our dvc.yaml with the package's version where the package's files are dependencies."""
    stages = pipeline.partition("stages:\n")[2]
    named = re.sub(r"^( +- )(stages/\w+\.py)$", rf"\1\2\n\1{PACKAGE}", stages, flags=re.MULTILINE)
    return HEAD + re.sub(r"^ +- src/.*\n", "", named, flags=re.MULTILINE)


def _dvc(folder: Path) -> None:
    """Make it a project of DVC, too: of git where git has it, without its telemetry."""
    inside = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--show-prefix"], capture_output=True, text=True, check=False
    )
    scm = ["--no-scm"] if inside.returncode else ["--subdir"] if inside.stdout.strip() else []
    dvc = [sys.executable, "-m", "dvc"]
    settings = [["config", f"core.{name}", "false"] for name in ("analytics", "check_update")]
    for arguments in (["init", "-q", *scm], *settings):
        done = subprocess.run([*dvc, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EpsdError(f"{folder}: dvc {arguments[0]}: {brief(RuntimeError(done.stderr or done.stdout))}")
