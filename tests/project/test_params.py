"""params.yaml: every mistake is one line that names the key and what is valid."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epsd.pipeline.describe import run_name
from epsd.pipeline.stage import check, describe
from epsd.project.params import flatten, load, override, parse, read_yaml
from epsd.registry import ParamsError


@pytest.fixture
def tree(root: Path) -> dict[str, Any]:
    return read_yaml(root / "params.yaml")


def test_the_shipped_file_is_valid_and_says_range_and_unit_beside_each_number(root: Path) -> None:
    params = load(root / "params.yaml")
    assert params.prune.sparsity == 0.95
    for line in (root / "params.yaml").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition("#")[0].partition(":")
        if re.fullmatch(r"[\d.e+-]+|null", value.strip()):
            assert "#" in line, f"no comment beside {key.strip()}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prune.sparsity", 1.0, r"prune\.sparsity: input should be less than 1"),
        ("prune.sparsity", -0.1, r"prune\.sparsity: input should be greater than or equal to 0"),
        ("prune.sparsity", "0.9", r"prune\.sparsity: .*valid number"),
        ("prune.sparsity", float("nan"), r"prune\.sparsity"),
        ("prune.scope", "local", "'global', 'layer', 'erk' or 'lamp'"),
        ("prune.rounds", 0, r"prune\.rounds"),
        ("train.epochs", 1.5, r"train\.epochs"),
        ("train.nesterov", "yes", r"train\.nesterov"),
        ("train.lr", float("inf"), r"train\.lr"),
        ("train.milestones", [0.5, 1.5], r"train\.milestones\.1"),
        ("train.warmup_epochs", 61, r"train: .*warmup_epochs: 61 is more than epochs \(60\)"),
        ("dataset", {"root": "x"}, r"dataset: .*needs a 'name'"),
        ("prune.score", "epsd", r"prune\.score"),
        ("seed", -1, "seed"),
        ("threads", 0, "threads"),
        ("tracking.experiment", "", r"tracking\.experiment"),
    ],
)
def test_a_wrong_value_names_its_key(tree: dict[str, Any], key: str, value: Any, message: str) -> None:
    override(tree, key, value)
    with pytest.raises(ParamsError, match=message) as error:
        parse(tree)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(trian={}), r"unknown 'trian'\. Did you mean 'train'\?"),
        (lambda tree: tree["prune"].update(sparsityy=0.5), r"prune: unknown 'sparsityy'\. Did you mean 'sparsity'\?"),
        (lambda tree: tree["train"].pop("lr"), r"train\.lr: field required"),
        (lambda tree: tree.pop("voc"), "voc: field required"),
        (lambda tree: tree.update(train=3), "train"),
        (lambda tree: tree.update({1: 2}), r"params\.yaml: unknown '1'\. Valid: seed, "),
        (lambda tree: tree["train"].update({None: 2}), r"train: unknown 'None'\. Valid: epochs, "),
        (lambda tree: tree["launch"].update(processes=0), r"launch\.processes: .* 1, or .*'auto' \(given: 0\)$"),
        (
            lambda tree: tree["tune"]["space"].update({"a.b": {"floats": [0, 1]}}),
            r"tune\.space\.a\.b: unknown 'floats'\. Did you mean 'float'\? Valid: float, int, choice, ",
        ),
        (lambda tree: tree["tune"].update(constraints={"x": {"at_last": 1}}), r"x: unknown 'at_last'\. Did .*at_least"),
    ],
)
def test_unknown_and_missing_keys(
    tree: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change(tree)
    with pytest.raises(ParamsError, match=message):
        parse(tree)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "not valid YAML"),
        (b"- 1\n- 2\n", "expected a mapping"),
        (b"", "expected a mapping"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: 1\na: 2\n", "not valid YAML"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ParamsError, match=f"params.yaml: .*{message}"):
        load(path)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"no such file.*preset"):
        load(tmp_path / "params.yaml")


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    """YAML 1.2: 1e-3 is a number and `on` a word; PyYAML takes them for a string and a truth value."""
    path = tmp_path / "x.yaml"
    path.write_text("lr: 1e-3\non: off\n")
    assert read_yaml(path) == {"lr": 0.001, "on": "off"}


def test_flatten_and_override_are_each_others_inverse(tree: dict[str, Any]) -> None:
    flat = dict(flatten(tree))
    assert flat["prune.score.name"] == "epsd"
    override(tree, "prune.score.steps", 7)
    assert dict(flatten(tree))["prune.score.steps"] == 7
    with pytest.raises(ParamsError, match=r"prune\.scor: unknown 'scor'\. Did you mean 'score'"):
        override(tree, "prune.scor.steps", 1)


@pytest.mark.parametrize(
    "where, title",
    [
        ("photos.zip", "photos"),
        ("~/pictures/blood.cells.tar.gz", "blood.cells"),
        ("data/my photos/", "my photos"),
        (".", "image_folder"),
    ],
)
def test_a_data_set_of_ones_own_is_called_by_its_name(tree: dict[str, Any], where: str, title: str) -> None:
    assert (parse(tree).data_title, parse(tree).scenes_title) == ("digits", "digit_scenes")
    tree["dataset"] = {"name": "image_folder", "root": where}
    tree["voc"] = {"name": "devkit", "root": where}
    assert parse(tree).data_title == title
    assert parse(tree).scenes_title == ("devkit" if where == "." else title)
    for section, kind in (("dataset", "image_folder"), ("voc", "yolo")):
        tree[section] = {"name": kind, "root": where, "title": "Blood cells, 2024"}
    params = check(parse(tree))
    assert params.data_title == params.scenes_title == "Blood cells, 2024"
    assert run_name(params).endswith("-seed0-Blood cells, 2024")
    for stage in ("prepare", "prune", "train", "evaluate", "detect"):
        assert " Blood cells, 2024" in describe(params, stage), stage
    assert not [name for name in params.marked() if name.endswith("title")], "another name is no other result"
