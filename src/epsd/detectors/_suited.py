"""What `auto` stands for in a detector: a size, maps and anchors that suit the training pictures and their boxes.

A tenth of the boxes is smaller than the low side (root of the area, after resizing), a tenth larger than the high one.

size : the shorter side of the typical picture; at most MOST, and at most what makes the low side SMALL pixels, but
    LEAST in any case.
finest_stride : the coarsest of the backbone's at which the low side is CELLS cells, if no map is larger than WIDEST.
anchor_scale (smallest) : the low side, in whole cells of the finest map (as a share of the picture).
extra_levels (biggest) : as many as it takes for anchors that double from map to map to reach the high side (its share).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from epsd.detectors._features import Floats, Level, Picture, choose_levels, sides

Auto = Literal["auto"]
AUTO: Auto = "auto"

MOST = 600
"""Pixels of the shorter side: Faster R-CNN's on Pascal VOC."""
LEAST = 224
"""Pixels: what classifiers of photographs usually see."""
SMALL = 32
"""Pixels of a side below which COCO calls an object small."""
CELLS = 4.0
"""Cells of its map that an anchor is wide: RetinaNet's at each level."""
WIDEST = 200
"""Cells along the shorter side of the finest map: of 800 pixels at stride 4, as in the pyramid of Lin et al."""
MOST_LEVELS = 4

Sizes = Callable[[Sequence[int], float], Sequence[Sequence[int]]]
"""Strides of the maps, anchor_scale -> sides of the anchors of each map, in pixels."""


class Plan(NamedTuple):
    """How a detector looks at pictures, with a number for every `auto`.

    settings : those that were `auto`.  shorter, longer : most pixels of the sides of the resized picture.
    levels : maps of the backbone that are used.  strides : of all maps, fine to coarse.
    anchors : (n, 2) widths and heights in pixels of the resized picture, of all maps.
    boxes : (m, 2) likewise of the training boxes; none where nobody knows them.
    """

    settings: dict[str, Any]
    shorter: int
    longer: int
    levels: list[Level]
    strides: list[int]
    anchors: Floats
    boxes: Floats

    def covered(self) -> float:
        """Share of the boxes that some anchor around the same point overlaps by half or more; NaN without boxes."""
        shared = np.minimum(self.boxes[:, None], self.anchors[None]).prod(2)
        union = self.boxes.prod(1)[:, None] + self.anchors.prod(1)[None] - shared
        return float((shared / union).max(1).__ge__(0.5).mean()) if len(self.boxes) else math.nan

    def told(self) -> str:
        """One line."""
        low, high = (round(side) for side in reach(self.boxes))
        least, most = (round(side) for side in np.sqrt(self.anchors.prod(1)[[0, -1]]))
        return (
            f"pictures of up to {self.shorter}x{self.longer} px, maps at strides {', '.join(map(str, self.strides))}, "
            f"anchors of {least} to {most} px; most of the {len(self.boxes):,} training boxes have {low} to {high} px, "
            f"{self.covered():.0%} are covered"
        )


def planned(
    own: Mapping[str, Any],
    levels: Sequence[Level],
    picture: Picture,
    usual: Mapping[str, Any],
    sizes: Sizes,
    first: float = 1,
) -> Plan:
    """The plan of a detector with a pyramid.

    own : its settings.  usual : what `auto` is where the boxes are not known.
    first : the smallest anchor of a single map, in anchor_scale.
    """
    found = {name: own[name] for name in ("size", *usual)}
    if picture.boxes is None:
        found = known(found, usual)
    if found["size"] == AUTO:
        found["size"] = size_of(picture)
    shorter, longer = sides(picture, found["size"], own["largest"])
    seen = min(shorter, longer * picture.shorter / picture.longer)
    boxes = np.zeros((0, 2)) if picture.boxes is None else picture.boxes * seen
    low, high = reach(boxes)
    if found["finest_stride"] == AUTO:
        found["finest_stride"] = finest(levels, low, seen)
    used = choose_levels(levels, found["finest_stride"], own["fpn"])
    if found["anchor_scale"] == AUTO:
        found["anchor_scale"] = float(max(1, round(low / used[0].stride / (1 if own["fpn"] else first))))
    if found["extra_levels"] == AUTO:
        least = found["anchor_scale"] * used[0].stride
        found["extra_levels"] = further(used, least, high, seen, MOST_LEVELS) if own["fpn"] else 0
    strides = all_strides(used, found["extra_levels"] if own["fpn"] else 0)
    anchors = shapes(sizes(strides, found["anchor_scale"]), own["aspect_ratios"])
    chosen = {name: value for name, value in found.items() if own[name] == AUTO}
    return Plan(chosen, shorter, longer, used, strides, anchors, boxes)


def all_strides(used: Sequence[Level], extra: int) -> list[int]:
    """Of the maps of the backbone and of `extra` coarser ones."""
    strides = [level.stride for level in used]
    return strides + [strides[-1] * 2**step for step in range(1, extra + 1)]


def known(asked: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """`asked` with the usual values for `auto`."""
    return {name: usual.get(name, value) if value == AUTO else value for name, value in asked.items()}


def size_of(picture: Picture) -> int:
    """`size`, see the module."""
    if picture.boxes is None:
        return picture.shorter
    enough = math.ceil(SMALL / reach(picture.boxes)[0])
    return min(picture.shorter, MOST, max(LEAST, enough))


def reach(boxes: Floats) -> tuple[float, float]:
    """Low and high side of boxes (n, 2); NaN without any."""
    if not len(boxes):
        return math.nan, math.nan
    low, high = np.quantile(np.sqrt(boxes.prod(1)), (0.1, 0.9))
    return float(low), float(high)


def finest(levels: Sequence[Level], low: float, seen: float) -> int:
    """`finest_stride`, see the module. `seen`: shorter side of the resized picture."""
    fits = [level.stride for level in levels if seen / level.stride <= WIDEST] or [levels[-1].stride]
    return max((stride for stride in fits if low / stride >= CELLS), default=fits[0])


def further(used: Sequence[Level], reached: float, high: float, seen: float, most: int) -> int:
    """`extra_levels`, see the module; none whose map would be less than two cells wide."""
    wanted = math.ceil(math.log2(high / reached)) + 1 - len(used)
    room = math.floor(math.log2(max(1.0, seen / used[-1].stride))) - 1
    return max(0, min(wanted, room, most))


def shapes(sizes: Sequence[Sequence[int]], ratios: Sequence[float]) -> Floats:
    """Widths and heights (n, 2) of anchors of these sides, map by map; ratio: height over width."""
    rows = [(side / math.sqrt(ratio), side * math.sqrt(ratio)) for some in sizes for side in some for ratio in ratios]
    return np.array(rows)
