"""What a parameter is: a value in a range, on which some figures depend, in a section that knows its keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from epsd.registry import not_known


def _named(choice: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(choice.get("name"), str):
        raise ValueError("a choice needs a 'name'")
    return choice


Choice = Annotated[dict[str, Any], AfterValidator(_named)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


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
