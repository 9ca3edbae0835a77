"""All points of a grid, each once: what a study's cells and the sampler `grid` of a search are laid out by."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Values = dict[str, Any]
"""Name of an axis -> value."""


def points(axes: Mapping[str, Sequence[Any]], active: Callable[[str, Values], bool] | None = None) -> Iterator[Values]:
    """Every point once, the last axis fastest.

    active : whether an axis exists beside the values of the axes before it; a point has no value on one that does not.
    """
    seen = set()
    for values in itertools.product(*axes.values()):
        point: Values = {}
        for axis, value in zip(axes, values, strict=True):
            if active is None or active(axis, point):
                point[axis] = value
        if (mark := json.dumps(point, sort_keys=True, default=repr)) not in seen:
            seen.add(mark)
            yield point
