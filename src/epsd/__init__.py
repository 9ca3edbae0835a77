"""EPSD: early pruning with self-distillation. A small vision network without a big one first.

    from epsd import CsKd, Epsd, fit, prune

    mask = prune(model, loader, score=Epsd(steps=3), sparsity=0.95, objective=CsKd())
    history = fit(model, loader, mask=mask, objective=CsKd())

docs/library.md shows every name at work, by task. Only what `epsd` itself offers (`epsd.__all__`) is public API: the
modules below it move and change without notice. Names are loaded when first used: `import epsd` itself costs nothing.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epsd.evaluation.compact_file import load_compact as load_compact
    from epsd.evaluation.compact_file import save_compact as save_compact
    from epsd.evaluation.deploy import export_onnx as export_onnx
    from epsd.evaluation.evaluate import cost as cost
    from epsd.evaluation.evaluate import evaluate as evaluate
    from epsd.masks import Mask as Mask
    from epsd.masks import prunable as prunable
    from epsd.objectives.cross_entropy import CrossEntropy as CrossEntropy
    from epsd.objectives.cskd import CsKd as CsKd
    from epsd.objectives.dlb import Dlb as Dlb
    from epsd.objectives.pskd import PsKd as PsKd
    from epsd.pipeline.load import load as load
    from epsd.project.recipes import Recipe as Recipe
    from epsd.pruning.cutting import cut_channels as cut_channels
    from epsd.pruning.prune import prune as prune
    from epsd.pruning.prune import scored as scored
    from epsd.scores.epsd import Epsd as Epsd
    from epsd.scores.grasp import Grasp as Grasp
    from epsd.scores.magnitude import Magnitude as Magnitude
    from epsd.scores.prospr import ProsPr as ProsPr
    from epsd.scores.random import Random as Random
    from epsd.scores.snip import Snip as Snip
    from epsd.scores.synflow import SynFlow as SynFlow
    from epsd.training.fit import fit as fit
    from epsd.training.updates import MaskHolder as MaskHolder
    from epsd.types import Batch as Batch
    from epsd.types import EpsdError as EpsdError

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # Threads that wait for the others spin for 10,000 rounds, then sleep. As torch comes they spin thirty times as
    # long: no step is shorter for it, and where other work is on the cores one takes up to fifty times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_HOMES = {
    "evaluation.compact_file": ("load_compact", "save_compact"),
    "evaluation.deploy": ("export_onnx",),
    "evaluation.evaluate": ("cost", "evaluate"),
    "masks": ("Mask", "prunable"),
    "objectives": ("CrossEntropy", "CsKd", "Dlb", "PsKd"),
    "pipeline.load": ("load",),
    "project.recipes": ("Recipe",),
    "pruning.cutting": ("cut_channels",),
    "pruning.prune": ("prune", "scored"),
    "scores": ("Epsd", "Grasp", "Magnitude", "ProsPr", "Random", "Snip", "SynFlow"),
    "training.fit": ("fit",),
    "training.updates": ("MaskHolder",),
    "types": ("Batch", "EpsdError"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'epsd' has no attribute '{name}'. It has: {', '.join(__all__)}")
    return getattr(import_module(f"epsd.{_HOME[name]}"), name)
