"""YAML that is rewritten with its comments kept."""

import io
import re
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML


def load(text: str) -> Any:
    """The content with all that `dump` needs to write it as it was. Raises ruamel's YAMLError."""
    return _yaml().load(text)


def dump(tree: Any) -> str:
    """What `load` gave, changed or not, as text."""
    text = io.StringIO()
    _yaml().dump(tree, text)
    return text.getvalue()


def laid_over(base: str, own: str) -> str:
    """The mapping `base` with what `own` has otherwise, values and comments. Raises ruamel's YAMLError.

    A mapping in `own` that has a `name` takes the place of the one in `base`: settings belong to their variant.
    """
    tree, changes = load(base), load(own)
    changes.pop("base", None)
    _lay_over(tree, changes)
    apart = "|".join(re.findall(r"\n\n(\w+):", base))
    return re.sub(rf"^(?=(?:{apart}):)", "\n", re.sub(r"\n+", "\n", dump(tree)), flags=re.M) if apart else dump(tree)


def _lay_over(base: Any, own: Any) -> None:
    for key, value in own.items():
        old = base.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and "name" not in value:
            _lay_over(old, value)
        else:
            base[key] = value
        if comment := own.ca.items.get(key):
            base.ca.items[key] = comment


def _yaml() -> YAML:
    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    null = "tag:yaml.org,2002:null"
    yaml.representer.add_representer(type(None), lambda made, _: made.represent_scalar(null, "null"))
    yaml.representer.add_representer(float, _number)
    return yaml


def _number(made: Any, value: float) -> Any:
    """1e-05 as 1.0e-05, which is a number for readers of YAML 1.1 too."""
    text = repr(value)
    return made.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))
