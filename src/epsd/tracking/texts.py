"""Values, keys and descriptions in the form in which MLflow keeps them."""

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any


def as_text(value: Any) -> str:
    """A parameter as MLflow keeps it: as in params.yaml (`null`, `true`, `0.95`, `[1, 2]`), strings without quotes."""
    text = value if isinstance(value, str) else json.dumps(value, default=_plain)
    return text[:6000]


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def as_number(value: Any) -> float | None:
    """`value` as a float; None for what is no number (a report's text or list), which is no metric."""
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def as_key(name: str) -> str:
    """`name` with the characters that MLflow refuses replaced."""
    return re.sub(r"[^/\w.\- :]", "_", name).strip("/")[:250]


def same_value(first: str, second: str) -> bool:
    """Equal as numbers where both are numbers: MLflow compares text, in which 1 is not 1.0."""
    with contextlib.suppress(ValueError):
        return float(first) == float(second)
    return first == second


def conflicts(known: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Names of the parameters that both have, with different values."""
    return [name for name, value in wanted.items() if name in known and not same_value(known[name], value)]


def with_paragraph(description: str, label: str, text: str) -> str:
    """`description` with the paragraph that begins with `**label.**` replaced, or added at the end."""
    start = f"**{label}.**"
    parts = [part for part in description.split("\n\n") if part and not part.startswith(start)]
    return "\n\n".join([*parts, f"{start} {text}"])
