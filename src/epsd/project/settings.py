"""What a parameter is: a value in a range, on which some figures depend, in a section that knows its keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from epsd.project.runtime import located
from epsd.registry import QUOTED, not_known

MOST = 10**9
"""No count is larger: what is more overflows in one library or another, hours later."""
LARGEST = 1e6
"""Likewise of temperatures, weights, learning rates: 1e300 is finite, and its square is not."""


def _named(choice: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(choice.get("name"), str):
        raise ValueError("a choice needs a 'name'")
    return choice


def _text(value: str) -> str:
    if not (value.strip() and value.isprintable() and len(value) <= QUOTED):
        raise ValueError(f"needs 1 to {QUOTED} printable characters, not only spaces")
    return value


def _place(value: str) -> str:
    if "\0" in value:
        raise ValueError("is no path (embedded null character)")
    try:
        located(value).exists()
    except (OSError, RuntimeError) as error:  # a name that is too long; the home of nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"is no path ({str(reason).rstrip('.')})") from None
    return value


Choice = Annotated[dict[str, Any], AfterValidator(_named)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Few = Annotated[int, Field(ge=1, le=1024)]
"""Threads or processes."""
Natural = Annotated[int, Field(ge=0, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, lt=1)]
ClassWeights = Literal["auto"] | Annotated[list[Positive], Field(min_length=2)] | None
"""A factor on the loss of each class; "auto": by how rare it is (`epsd.data.balance`)."""
Side = Annotated[int, Field(ge=32, le=4096)]
"""Of a photograph, in pixels."""
Text = Annotated[str, AfterValidator(_text)]
"""A name that goes into tables, pages and other people's tools."""
Place = Annotated[str, Field(min_length=1), AfterValidator(_place)]
"""A file or folder, as `epsd.project.runtime.located` takes it. It need not be there."""


@dataclass(frozen=True)
class Bearing:
    """What a parameter bears on, as a note beside its type. Without one: on every metric and every mark.

    on : how the names of the metrics begin that it bears on.
    only_timing : nothing but how long it takes (and the last bits) depends on it.
    timed_with : two timings must have it in common to be compared at all.
    marked : whether what was trained under another value is another thing: no mark holds one that is not.
    neutral : the value, as text, that does what was done before there was this parameter.
    settings : likewise of settings of a choice.
    """

    on: tuple[str, ...] = ("",)
    only_timing: bool = False
    timed_with: bool = False
    marked: bool = True
    neutral: str | None = None
    settings: Mapping[str, "Bearing"] = field(default_factory=dict)


NOTHING = Bearing(on=(), marked=False)
TIMING = Bearing(only_timing=True, timed_with=True)
SPREAD = replace(TIMING, marked=False)


class Section(BaseModel):
    """A mapping of params.yaml: unknown keys, wrong types and out-of-range numbers are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, content: Any) -> Any:
        valid = [field.alias or name for name, field in cls.model_fields.items()]
        for key in content if isinstance(content, Mapping) else ():
            if key not in valid:
                raise ValueError(not_known(key, valid))
        return content
