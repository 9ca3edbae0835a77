"""From a name in params.yaml to an object: `choose(REGISTRY, choice)`, or one error that lists what is valid."""

import dataclasses
import difflib
import functools
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast, dataclass_transform, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _pydantic_dataclass

from epsd.types import EpsdError

T = TypeVar("T")
CONFIG = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


QUOTED = 200
"""Characters of a user's value that a message quotes at most."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = QUOTED


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


def unknown(where: str, given: object, valid: Iterable[str]) -> ParamsError:
    """The error for a name that does not exist: says which do, and which was probably meant."""
    return ParamsError(f"{where}: {not_known(given, valid)}")


def not_known(given: object, valid: Iterable[str]) -> str:
    """What `unknown` says. `given`: a key of a YAML file may be a number."""
    valid, text = list(valid), given if isinstance(given, str) else shown(given)
    near = difflib.get_close_matches(text[:QUOTED], valid, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown '{cut(text)}'.{hint} Valid: {', '.join(valid) or '(none)'}."


def cut(text: str) -> str:
    """`text` in one line of at most QUOTED characters."""
    text = " ".join(text[: 2 * QUOTED].split())
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def shown(value: object) -> str:
    """`value` as a message quotes it: however long or deeply nested, in one line of at most QUOTED characters."""
    try:
        return cut(_SHORT.repr(value))
    except ValueError:  # Python writes no number of more than some thousand digits
        return f"a number of {int(value).bit_length():,} bits" if isinstance(value, int) else type(value).__name__


def explain(where: str, error: ValidationError, whole: str = "params.yaml") -> ParamsError:
    """pydantic's findings as one line with dotted keys. Of a value that may be of several kinds, what each wants.

    whole : what a finding about the whole of it is said of.
    """
    findings: dict[str, tuple[list[str], str]] = {}
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"] if not _KIND.fullmatch(str(part))]
        given = "" if item["type"] == "missing" or isinstance(item["input"], Mapping) else shown(item["input"])
        messages, _ = findings.setdefault(".".join([where, *parts]).strip("."), ([], given))
        messages.append(item["msg"].removeprefix("Value error, "))
    told = []
    for key, (messages, given) in findings.items():
        said = ", or ".join(f"{message[0].lower()}{message[1:]}" for message in messages)
        told.append(": ".join(filter(None, [key or whole, said])) + (f" (given: {given})" if given else ""))
    return ParamsError("; ".join(told))


_KIND = re.compile(r"constrained-\w+|list\[.*\]|literal\[.*\]|function-[\w-]+\[.*\]")
"""How pydantic names the kinds of a value that may be of several, among the keys on the way to it."""


def foreign(registry: Mapping[str, type[Any]], choice: Mapping[str, Any]) -> list[str]:
    """Settings in `choice` that are another variant's: the one it names has none of that name, or takes another kind of
    value there (a list of names, where a number was left).
    """
    name = choice.get("name")
    if not isinstance(name, str) or name not in registry:
        return []
    mine, others = registry[name], [cls for other, cls in registry.items() if other != name]
    return [
        key
        for key, value in choice.items()
        if key != "name" and _not_meant(mine, key, value) and any(_findings(cls, key, value) == [] for cls in others)
    ]


def _not_meant(cls: type, key: str, value: object) -> bool:
    findings = _findings(cls, key, value)
    return findings is None or any(kind.endswith("_type") for kind in findings)


@functools.cache
def _kind(cls: type, key: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(cls, include_extras=True)[key])


def _findings(cls: type, key: str, value: object) -> list[str] | None:
    """What is wrong with a value as that setting, in pydantic's words; None: the variant has no such setting."""
    if key not in settings_of(cls):
        return None
    try:
        _kind(cls, key).validate_python(value, strict=True)
    except ValidationError as error:
        return [item["type"] for item in error.errors(include_url=False)]
    return []


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

    Settings that only another variant has are left out, so that a variant is chosen by its name alone: see `foreign`.
    """
    name = choice.get("name")
    if not isinstance(name, str) or name not in registry:
        raise unknown(f"{where}.name".strip("."), name, registry)
    cls, others = registry[name], foreign(registry, choice)
    settings = {key: value for key, value in choice.items() if key != "name" and key not in others}
    for key in settings:
        if key not in settings_of(cls):
            raise unknown(f"{where} ({name})".strip(), key, settings_of(cls))
    try:
        return cls(**settings)
    except ValidationError as error:
        raise explain(where, error) from None
