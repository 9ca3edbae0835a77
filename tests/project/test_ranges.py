"""Every number of params.yaml and of every variant has two ends; what lies beyond is refused in one short line."""

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import ConfigDict, PydanticUserError, TypeAdapter

from conftest import ROOT
from epsd.architectures import ARCHITECTURES
from epsd.datasets import DATASETS, DEVKITS
from epsd.detectors import DETECTORS
from epsd.objectives import OBJECTIVES
from epsd.pipeline.stage import check
from epsd.project.params import flatten, load, override, parse, read_yaml
from epsd.project.settings import Section
from epsd.registry import QUOTED, ParamsError, choose, cut, settings_of, shown
from epsd.scores import SCORES
from epsd.studies import plan
from epsd.studies.procedures import PROCEDURES

REGISTRIES = (ARCHITECTURES, DATASETS, DEVKITS, DETECTORS, OBJECTIVES, SCORES, PROCEDURES)
assert plan.StudyParams  # its sections are looked at, too
VARIANTS = [cls for registry in REGISTRIES for cls in registry.values()]  # type: ignore[attr-defined]
BASE = {key: value for key, value in read_yaml(ROOT / "params.yaml").items() if key != "tune"}
LEAVES = [key for key, _ in flatten(BASE)]


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


BEYOND = [math.inf, -math.inf, math.nan, 1e300, -1e300, 10**40, -(10**40), 10**5000, "x" * 10_000, "\0", nested(29)]


def numbers(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Every whole or other number of a JSON schema."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield schema
        for part in schema.values():
            yield from numbers(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from numbers(part)


def unbounded(kind: Any) -> list[Mapping[str, Any]]:
    try:
        schema = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).json_schema()
    except PydanticUserError:  # a section or dataclass has a configuration of its own
        schema = TypeAdapter(kind).json_schema()
    schema.pop("$defs", None)  # sections within sections: each is looked at by itself
    ends = ({"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"})
    free = [number for number in numbers(schema) if not {"enum", "const"} & set(number)]
    return [number for number in free if not all(end & set(number) for end in ends)]


def sections(cls: type[Section] = Section) -> Iterator[type[Section]]:
    for inner in cls.__subclasses__():
        yield inner
        yield from sections(inner)


FREE = {("RangeParams", "choice"), ("RangeParams", "when")}
"""What is tried is checked as the parameter that it is."""


@pytest.mark.parametrize("cls", sorted(set(sections()), key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_every_number_of_a_section_has_two_ends(cls: type[Section]) -> None:
    hints = get_type_hints(cls, include_extras=True)
    names = [name for name in cls.model_fields if (cls.__name__, name) not in FREE]
    assert {name: found for name in names if (found := unbounded(hints[name]))} == {}


@pytest.mark.parametrize("cls", VARIANTS, ids=lambda cls: cls.__name__)
def test_every_number_of_a_variant_has_two_ends(cls: type) -> None:
    hints = get_type_hints(cls, include_extras=True)
    assert {name: found for name in settings_of(cls) if (found := unbounded(hints[name]))} == {}


@pytest.mark.parametrize("key", LEAVES)
def test_what_lies_beyond_is_refused_in_one_short_line(key: str) -> None:
    for value in BEYOND:
        tree = copy.deepcopy(BASE)
        override(tree, key, value)
        with pytest.raises(ParamsError) as caught:
            check(parse(tree))
        line = str(caught.value)
        assert "\n" not in line and len(line) < 1000, value
        assert key.rpartition(".")[2] in line, value


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dataset", {"name": "image_folder", "root": "~nosuchuser/x"}, "dataset.root: is no path"),
        ("dataset", {"name": "image_folder", "root": "x" * 300}, "dataset.root: is no path .File name too long"),
        ("dataset", {"name": "image_folder", "root": ""}, "dataset.root: "),
        ("voc", {"name": "devkit", "root": "~nosuchuser/x"}, "voc.root: is no path"),
        ("train.accumulate", 33, "accumulate: 33 parts of batch_size 64"),
        ("train.milestones", [0.75, 0.5], "milestones: each must be larger"),
        ("train.milestones", [0.5, 0.5], "milestones: each must be larger"),
        ("tracking.experiment", " ", "tracking.experiment: needs 1 to 200 printable characters"),
        ("tracking.experiment", "a\nb", "tracking.experiment: needs 1 to 200 printable characters"),
        ("data.workers", 10**6, "data.workers: "),
        ("threads", 10**6, "threads: "),
        ("launch.processes", 10**6, "launch.processes: "),
    ],
)
def test_what_no_machine_can_do_is_refused(key: str, value: Any, words: str) -> None:
    tree = copy.deepcopy(BASE)
    override(tree, key, value)
    with pytest.raises(ParamsError, match=words):
        check(parse(tree))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: " + "[" * 1000 + "]" * 1000, "nested more than 30 deep"),
        ("seed: " + "{a: " * 400 + "1" + "}" * 400, "nested more than 30 deep"),
        ("seed: &x [*x]", "nested more than 30 deep"),
        (
            "a0: &a0 [1, 2]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]\n" for i in range(1, 20)),
            "more than 100,000",
        ),
        ("seed: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("seed: 2024-99-99", "not valid YAML: month must be"),
    ],
)
def test_a_file_that_never_ends_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match=words) as caught:
        load(path)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 500


def test_a_value_is_quoted_short() -> None:
    for value in (*BEYOND, ["x" * 500] * 500, {"x" * 500: ["y" * 500]}, "two\nlines", "many words " * 1000):
        assert len(shown(value)) <= QUOTED and "\n" not in shown(value)
    assert shown("short") == "'short'" and shown([1, 2]) == "[1, 2]" and cut("a  b\nc") == "a b c"
    for given in ("x" * 10_000, nested(29), 10**5000):
        with pytest.raises(ParamsError) as caught:
            choose(SCORES, {"name": given}, "prune.score")
        assert len(str(caught.value)) < 2 * QUOTED + 200
