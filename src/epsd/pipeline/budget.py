"""`prune.macs: auto`: the most multiply-adds whose ONNX file keeps to `prune.latency_ms` and `prune.bytes`.

Found by bisection on untrained networks, whose values make nothing faster or slower. What is measured is the file that
`evaluate` writes, in fp32, from pixels to probabilities: its size, and how long ONNX Runtime takes for one image on one
thread of this machine (`epsd.compute.timing`).
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from epsd.compute import distributed, timing
from epsd.data.prepared import Prepared
from epsd.files.onnx_file import FP32, OnnxFile
from epsd.masks import Mask
from epsd.pipeline import deploy
from epsd.pipeline.train import card
from epsd.project import artifacts
from epsd.project.params import Params
from epsd.project.runtime import brief, note
from epsd.pruning import channels, widths
from epsd.pruning.channels import ChannelError, Kept, Structure

Costs = dict[str, float]
"""`latency_ms` and `bytes`, those that are asked about."""

FINE = 1.02
"""The bisection ends where the share that fits and the one that does not are so near to each other."""

REPEATS = 100
"""Passes of which a latency is the median, fewer where they take long."""


class Budget:
    """What a file may take at most, and the networks measured so far.

    Raises ChannelError on construction, before anything is scored: not even the narrowest network keeps to it, or torch
    cannot export the network.
    """

    def __init__(self, params: Params, data: Prepared, model: nn.Module, structure: Structure) -> None:
        self._params, self._data, self._model, self._structure = params, data, model, structure
        self._asked, self._known = params.prune.budget(), dict[tuple[int, ...], Costs]()
        dense, least = structure.dense(), widths.Widths(structure, 1.0, params.prune.round_to).least
        self._whole, narrowest = (self._cost(_first(sizes)) for sizes in (dense, least))
        if broken := self._broken(narrowest):
            raise ChannelError(
                f"{_limits(broken, self._asked)} cannot be met: the narrowest network, with {params.prune.round_to} "
                f"channels in every group, takes {_told(narrowest, broken)} on this machine, the whole one "
                f"{_told(self._whole, broken)}. Raise it, or lower prune.round_to."
            )
        self._lowest = structure.macs(least) / structure.macs(dense) * (1 + 1e-9)

    def share(self, select: Callable[..., Kept]) -> tuple[float, Costs]:
        """The largest share of the multiply-adds that keeps to the budget, and figures for the report.

        select : given `macs`, a share, the channels that stay.
        """
        low, high = self._lowest, 1.0
        found, wider = (_sizes(select(macs=share)) for share in (low, high))
        if not self._broken(self._whole):
            low, found = high, wider
        while high / low > FINE and found != wider:
            middle = math.sqrt(low * high)
            tried = select(macs=middle)
            if self._broken(self._cost(tried)):
                high, wider = middle, _sizes(tried)
            else:
                low, found = middle, _sizes(tried)
        costs = self._known[found]
        self._say(costs)
        figures = {f"{name}_asked": most for name, most in self._asked.items()}
        figures |= {f"{name}_whole": taken for name, taken in self._whole.items()}
        return low, costs | figures | {"macs_found": low, "networks_measured": len(self._known)}

    def _say(self, costs: Costs) -> None:
        if not distributed.is_main():
            return
        if not self._broken(self._whole):
            note(f"{_limits(self._asked, self._asked)} asks for nothing: the whole network takes {_told(costs)} here.")
        else:
            note(
                f"prune.macs: auto: {_told(costs)} on this machine, where {_told(self._asked)} are allowed and the "
                f"whole network takes {_told(self._whole)}; {len(self._known)} networks were measured."
            )

    def _broken(self, costs: Costs) -> list[str]:
        return [name for name, most in self._asked.items() if costs[name] > most]

    def _cost(self, kept: Kept) -> Costs:
        """Measured once for equal widths; in all processes what the first one measured."""
        sizes = _sizes(kept)
        if sizes not in self._known:
            found = torch.tensor(list(self._measured(kept).values()), dtype=torch.float64)
            distributed.same_everywhere([found])
            self._known[sizes] = dict(zip(self._asked, found.tolist(), strict=True))
        return self._known[sizes]

    def _measured(self, kept: Kept) -> Costs:
        model = channels.cut(self._model, self._data.image_shape, kept)
        return measured(self._params, self._data, model, Mask.dense(model), self._asked)


@torch.random.fork_rng(devices=[])
def measured(params: Params, data: Prepared, model: nn.Module, mask: Mask, names: Iterable[str]) -> Costs:
    """`latency_ms` and `bytes`, those of `names`, of the ONNX file of `model`, which is left as it is.

    Raises ChannelError where torch cannot export it.
    """
    about = card(params, data, mask, model)
    with tempfile.TemporaryDirectory() as folder:
        weights, path = Path(folder) / artifacts.MODEL.name, Path(folder) / FP32
        artifacts.save_model(model, weights, about)
        try:
            deploy.export(model, about, weights, path)
        except Exception as error:  # torch.export raises nearly any type
            raise ChannelError(
                f"torch cannot export this network ({type(error).__name__}: {brief(error)}), so that its file cannot "
                "be measured."
            ) from None
        found = {"bytes": float(path.stat().st_size)}
        if "latency_ms" in names:
            found["latency_ms"] = _latency(path, data.image_shape)
    return {name: found[name] for name in names}


def _latency(path: Path, image_shape: tuple[int, int, int]) -> float:
    ask = partial(OnnxFile(path, threads=1), np.zeros((1, *image_shape), dtype=np.float32))
    clock = timing.clock_for(1, torch.device("cpu"))
    return timing.interleaved({"onnx": ask}, REPEATS, clock).milliseconds["onnx"]


def _first(sizes: Mapping[str, int]) -> Kept:
    """Any channels will do."""
    return {name: torch.arange(size) for name, size in sizes.items()}


def _sizes(kept: Kept) -> tuple[int, ...]:
    return tuple(map(len, kept.values()))


def _limits(names: Iterable[str], asked: Costs) -> str:
    return " and ".join(f"prune.{name}: {asked[name]:.10g}" for name in names)


def _told(costs: Costs, names: Iterable[str] | None = None) -> str:
    units = {"latency_ms": "{:.3g} ms", "bytes": "{:,.0f} bytes"}
    return " and ".join(units[name].format(costs[name]) for name in names or costs)
