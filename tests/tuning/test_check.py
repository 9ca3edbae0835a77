"""`epsd check`: the section tune and study files are refused before any work, and no more than has to be."""

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from conftest import ROOT
from epsd.cli import main
from epsd.project.params import override, read_yaml


def checked(folder: Path, *arguments: str, **changes: Any) -> int:
    """`epsd check` of the project's params.yaml with these dotted changes."""
    tree = read_yaml(ROOT / "params.yaml")
    for key, value in changes.items():
        override(tree, key, value)
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(tree, file)
    return main(["check", *arguments])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tune.space", {"prune.sparsity": {"float": [0.8, 1.5]}}, "tune.space.prune.sparsity: 1.5 is no valid value"),
        ("tune.space", {"train.lr": {"float": [0.1, 1e300]}}, "tune.space.train.lr.float"),
        ("tune.space", {"train.epochs": {"int": [1, 10**40]}}, "tune.space.train.epochs.int"),
        ("tune.space", {"train.lrr": {"float": [0.1, 0.2]}}, "unknown 'train.lrr'. Did you mean 'train.lr'"),
        ("tune.space", {"train.lr": {"floats": [0.1, 0.2]}}, "unknown 'floats'"),
        (
            "tune.space",
            {"objective.name": {"choice": ["cskd", "x" * 10_000]}},
            "tune.space.objective.name: unknown 'xxx",
        ),
        ("tune.fixed", {"prune.sparsity": 7}, "tune.fixed.prune.sparsity: 7 is outside its range"),
        ("tune.fixed", {"train.momentum": 7}, "train.momentum: input should be less than 1"),
        ("tune.fixed", {"train.momentum": "x" * 10_000}, "train.momentum: input should be a valid number"),
        ("tune.fixed", {"objective.name": ["cskd"]}, "tune.fixed.objective.name: unknown '['cskd']'"),
        ("tune.objectives", {"test/top1": "maximize"}, "tune.objectives: unknown 'test/top1'"),
        ("tune.constraints", {"test/top1": {"at_least": 0.5}}, "tune.constraints: unknown 'test/top1'"),
        ("tune.study", " ", "tune.study: needs 1 to 200 printable characters"),
        ("tune.trails", 3, "unknown 'trails'"),
        ("tune.workers", 10**9, "tune.workers: "),
    ],
)
def test_a_section_tune_that_cannot_be_is_refused(
    folder: Path, key: str, value: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the space also what is fixed at present, as the default's sparsity is."""
    assert checked(folder, **{key: value}) == 1
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1 and len(line) < 1500


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.lr": 0.9},  # outside of what is searched
        {"prune.sparsity": 0.5},
        {"objective": {"name": "pskd"}, "tune.fixed": {"objective.temperature": 2.0}},  # a setting of another variant
        {"architecture": {"name": "vgg", "depth": 11}, "tune.space": {"architecture.width": {"float": [0.5, 1.0]}}},
        {"prune.score": {"name": "snip"}},
    ],
)
def test_who_does_not_search_need_not_change_the_section(folder: Path, changes: dict[str, Any]) -> None:
    assert checked(folder, **changes) == 0


STUDY = "base: params.yaml\nscores: [snip]\nsparsities: [0.9]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (STUDY, ""),
        (STUDY + "seed: 3\n", "unknown 'seed'"),
        (STUDY.replace("0.9", "1.5"), "sparsities"),
        (STUDY.replace("0.9", ".nan"), "sparsities"),
        (STUDY + "vary: {train.lrr: [0.1]}\n", "lrr"),
        (STUDY + "vary: {train.lr: [1.0e+300]}\n", "train.lr"),
        (STUDY + "set: {train.epochs: 1" + "0" * 40 + "}\n", "train.epochs"),
        (STUDY + "variants: [{name: ' '}]\n", "printable"),
        (STUDY + "seeds: 1000000000\n", "models"),
        (STUDY + "procedure: {name: " + "x" * 10_000 + "}\n", "unknown 'xxx"),
        (STUDY + "set: &x {a: *x}\n", "nested more than 30 deep"),
    ],
)
def test_a_study_file_is_checked(folder: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.yaml").write_text(text)
    assert checked(folder, "mine.yaml") == (1 if words else 0)
    line = capsys.readouterr().err
    assert words in line and (not words or (line.startswith("epsd: mine.yaml") and len(line) < 1500))
