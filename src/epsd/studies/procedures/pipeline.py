"""The stages prune and train in memory: score, select, self-distil. Scores are shared over sparsities and controls."""

import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from epsd.compute.cost import Meter
from epsd.compute.devices import seed_everything
from epsd.data.prepared import Prepared
from epsd.masks import Mask
from epsd.pipeline import describe
from epsd.pipeline.prune import Pruned, Scored, network, pruned, scored, scoring_key, selection, uncontrolled
from epsd.pipeline.train import trained
from epsd.project.params import Params
from epsd.registry import variant
from epsd.studies.procedures.types import Desk, Trained
from epsd.training import result


@variant
class Pipeline:
    """EPSD's own: prune at initialisation, then train what is left. No settings beside params.yaml's.

    `mask/seconds` and `cost/...` of cells that share a scoring include that one scoring whole, as without sharing.
    """

    def __call__(self, params: Params, data: Prepared, desk: Desk) -> Trained:
        """As the stages do it, without files. At sparsity 0 nothing is scored."""
        begun = time.perf_counter()
        mask, model, report, *_ = self._pruned(params, data, desk)
        middle = time.perf_counter()
        checkpoint = desk.folder / "last.safetensors"
        settings: dict[str, Any] = {"checkpoint": checkpoint, "mark": desk.mark, "meter": Meter.of(report)}
        history = trained(params, data, model, mask, on_epoch=desk.log, **settings)
        seconds = {"time/prune": middle - begun, "time/train": time.perf_counter() - middle}
        figures = {f"mask/{name}": value for name, value in report.items()} | seconds
        best = result.chosen(result.kept(history, "best")) if params.train.keep == "best" else {}
        return Trained(model, mask, history, figures | best)

    def check(self, params: Params) -> None:
        """Every checked parameter file works."""

    def story(self, params: Params, data: Prepared) -> str:
        """As the stage `train` tells it."""
        return describe.story(params, data)

    def shares(self, params: Params) -> Mapping[str, Any] | None:
        """One scoring, which gives masks of any sparsity; where later rounds score again, the mask they end in."""
        prune = params.prune
        if prune.structure != "weights" or prune.sparsity == 0:
            return None
        return scoring_key(params) | ({"rounds": prune.rounds, **selection(params)} if prune.rounds > 1 else {})

    def _pruned(self, params: Params, data: Prepared, desk: Desk) -> Pruned:
        if params.prune.sparsity == 0 and params.prune.structure == "weights":
            return _dense(params, data)
        if self.shares(params) is None:
            return pruned(params, data)
        return pruned(params, data, desk.shared(lambda: _known(params, data)))


def _known(params: Params, data: Prepared) -> Scored | Pruned:
    if params.prune.rounds == 1:
        return scored(params, data)
    return pruned(uncontrolled(params), data)._replace(model=nn.Identity())  # training changes it: each gets its own


def _dense(params: Params, data: Prepared) -> Pruned:
    seed_everything(params.seed)
    model = network(params, data)
    mask = Mask.dense(model, params.prune.exclude)
    return Pruned(mask, model, mask.summary())
