"""What makes a stage stale, as DVC sees it: in a copy of the project whose artifacts were made up and committed."""

import compileall
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from conftest import ROOT
from epsd.project.params import read_yaml


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repo]:
    """All stages done, as far as DVC knows."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", ".dvcignore", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    stages = read_yaml(ROOT / "dvc.yaml")["stages"].values()
    outs = [f"{out}/content" for stage in stages for out in stage["outs"]]
    read = [dep for stage in stages for dep in stage["deps"] if dep.startswith("artifacts/") and Path(dep).suffix]
    for made in (folder / path for path in (*outs, *read)):
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text("{}")
    before = Path.cwd()
    os.chdir(folder)
    repo = Repo.init(no_scm=True)
    repo.commit(force=True)
    yield repo
    repo.close()
    os.chdir(before)


def stale(repo: Repo) -> set[str]:
    """The stages of which a dependency has changed; those after them rerun when these have."""
    repo._reset()
    return set(repo.status())


def test_what_is_no_change_makes_nothing_stale(copied: Repo) -> None:
    assert stale(copied) == set()
    source = Path("src/epsd")
    for path in source.rglob("*.py"):
        path.touch()
    assert compileall.compile_dir("src", quiet=1) and compileall.compile_dir(source / "files", quiet=1, legacy=True)
    for name in (".archives.py.swp", ".archives.py.swo", "archives.py~", "archives.py.orig", ".#archives.py",
                 "#archives.py#", "archives.py.rej", "archives.py.bak", ".DS_Store"):  # fmt: skip
        (source / "files" / name).write_text("left by an editor")
    assert stale(copied) == set()


@pytest.mark.parametrize(
    "file, expected",
    [
        ("training/fit.py", {"train"}),  # and with its run evaluate and detect
        ("objectives/cskd.py", {"prune", "train"}),  # the chosen one
        ("objectives/dlb.py", set()),
        ("evaluation/model_card.py", {"evaluate"}),
        ("tracking/runs.py", set()),
        ("cli.py", set()),
        ("datasets/digits.py", {"prepare"}),
    ],
)
def test_an_edit_makes_stale_what_it_can_change(copied: Repo, file: str, expected: set[str]) -> None:
    path = Path("src/epsd", file)
    before = path.read_text(encoding="utf-8")
    path.write_text(f"{before}# another line\n", encoding="utf-8")
    assert stale(copied) == expected
    path.write_text(before, encoding="utf-8")


def test_another_variant_is_another_dependency(copied: Repo) -> None:
    path, yaml = Path("params.yaml"), YAML()
    before = path.read_text(encoding="utf-8")
    tree = yaml.load(before)
    tree["prune"]["score"] = {"name": "snip"}
    yaml.dump(tree, path)
    assert stale(copied) == {"prune"}
    path.write_text(before, encoding="utf-8")
