"""From a name in params.yaml to an object: `choose(REGISTRY, choice)`, or one error that lists what is valid."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as _pydantic_dataclass

from epsd.types import EpsdError

T = TypeVar("T")
CONFIG = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


class ParamsError(EpsdError):
    """A key of params.yaml (or a setting of a variant) that is unknown, of the wrong type or out of range."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def variant(cls: type[T]) -> type[T]:
    """Class decorator of a choice without state: a frozen, keyword-only dataclass checked on construction."""
    return cast(type[T], _pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)(cls))


@dataclass_transform(kw_only_default=True)
def stateful_variant(cls: type[T]) -> type[T]:
    """Class decorator of a choice that carries state beside its settings (an objective)."""
    return cast(type[T], _pydantic_dataclass(kw_only=True, config=CONFIG)(cls))


def settings_of(cls: type) -> list[str]:
    """The settings that a variant takes, in the order of its file."""
    return [field.name for field in dataclasses.fields(cls) if field.init]


def unknown(where: str, given: str, valid: Iterable[str]) -> ParamsError:
    """The error for a name that does not exist: says which do, and which was probably meant."""
    valid = list(valid)
    near = difflib.get_close_matches(given, valid, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return ParamsError(f"{where}: unknown '{given}'.{hint} Valid: {', '.join(valid) or '(none)'}.")


def explain(where: str, error: ValidationError) -> ParamsError:
    """pydantic's findings as one line with dotted keys."""
    findings = []
    for item in error.errors(include_url=False):
        key = ".".join([where, *(str(part) for part in item["loc"])]).strip(".")
        findings.append(f"{key}: {item['msg'][0].lower()}{item['msg'][1:]} (given: {item['input']!r})")
    return ParamsError("; ".join(findings))


def choose(registry: Mapping[str, type[T]], choice: Mapping[str, Any], where: str = "") -> T:
    """Build the variant that `choice` names.

    Parameters
    ----------
    registry : name -> variant class.
    choice : `{"name": ..., **settings}`, as one section of params.yaml.
    where : dotted key of that section, for messages.

    Raises
    ------
    ParamsError : unknown name (lists the names), unknown setting (lists the variant's), wrong type or range.
    """
    settings = dict(choice)
    name = settings.pop("name", None)
    if name not in registry:
        raise unknown(f"{where}.name".strip("."), str(name), registry)
    cls = registry[name]
    valid = settings_of(cls)
    for key in settings:
        if key not in valid:
            raise unknown(f"{where} ({name})".strip(), key, valid)
    try:
        return cls(**settings)
    except ValidationError as error:
        raise explain(where, error) from None
