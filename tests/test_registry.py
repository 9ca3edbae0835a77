"""choose(): from a mapping to an object, or one error that lists what is valid."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from epsd import registry
from epsd.registry import ParamsError, choose, explain, foreign, settings_of, stateful_variant, variant


@variant
class Circle:
    radius: Annotated[float, Field(gt=0)] = 1.0
    label: str = "c"


@stateful_variant
class Counter:
    start: int = 0

    def count(self) -> int:
        self.start += 1
        return self.start


SHAPES: dict[str, type] = {"circle": Circle, "counter": Counter}


def test_the_named_variant_with_its_settings() -> None:
    assert choose(SHAPES, {"name": "circle", "radius": 2.0}) == Circle(radius=2.0)
    assert choose(SHAPES, {"name": "circle", "radius": 2}).radius == 2.0
    assert settings_of(Circle) == ["radius", "label"]


def test_the_choice_itself_is_left_as_it_is() -> None:
    choice = {"name": "circle", "radius": 2.0}
    choose(SHAPES, choice)
    assert choice == {"name": "circle", "radius": 2.0}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"name": "cirlce"}, r"shape\.name: unknown 'cirlce'\. Did you mean 'circle'\? Valid: circle, counter"),
        ({}, r"shape\.name: unknown 'None'"),
        ({"name": "circle", "radiu": 1.0}, r"shape \(circle\): unknown 'radiu'\. Did you mean 'radius'\?"),
        ({"name": "circle", "radius": -1.0}, r"shape\.radius: input should be greater than 0 \(given: -1\.0\)"),
        ({"name": "circle", "radius": "big"}, r"shape\.radius"),
        ({"name": "circle", "radius": True}, r"shape\.radius"),
    ],
)
def test_mistakes(choice: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        choose(SHAPES, choice, "shape")


def test_a_value_of_several_kinds_says_what_each_wants() -> None:
    """And nothing of how pydantic names them; a mapping that lacks a key is not printed whole."""

    class Inner(BaseModel):
        wanted: int

    class Several(BaseModel):
        count: Annotated[int, Field(ge=1)] | Literal["auto"]
        inner: Inner

    with pytest.raises(ValidationError) as caught:
        Several.model_validate({"count": 0, "inner": {"other": 1}})
    said = str(explain("section", caught.value))
    assert said == (
        "section.count: input should be greater than or equal to 1, or input should be 'auto' (given: 0); "
        "section.inner.wanted: field required"
    )


@variant
class Ring:
    radius: list[float]
    label: str = "r"


def test_what_was_left_of_another_variant_is_no_mistake() -> None:
    """A number where a list is taken, and another variant takes a number; never a number out of range."""
    shapes: dict[str, type] = {"circle": Circle, "counter": Counter, "ring": Ring}
    assert foreign(shapes, {"name": "ring", "radius": 2.0, "start": 3, "label": "x"}) == ["radius", "start"]
    assert foreign(shapes, {"name": "circle", "radius": [1.0]}) == ["radius"]
    assert foreign(shapes, {"name": "circle", "radius": -1.0, "label": 3, "width": 1}) == []
    assert choose(shapes, {"name": "circle", "radius": [1.0], "start": 3}) == Circle()


def test_variants_are_values_and_stateful_ones_are_not() -> None:
    with pytest.raises(AttributeError):
        Circle().radius = 3.0  # type: ignore[misc]
    counter = Counter(start=4)
    assert counter.count() == 5
    assert hash(Circle()) == hash(Circle())


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        Circle(radius=0.0)


def test_what_checks_a_setting_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study of thousands of models chooses ten thousands of times."""
    made: list[object] = []
    monkeypatch.setattr(registry, "TypeAdapter", lambda kind: made.append(kind) or TypeAdapter(kind))

    @variant
    class Square:
        side: float = 1.0

    for _ in range(3):
        choose({**SHAPES, "square": Square}, {"name": "square", "side": 2.0})
        assert len(made) == 1
