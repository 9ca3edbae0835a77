"""EPSD: early pruning with self-distillation. A small vision network without a big one first.

    from epsd import CsKd, Epsd, fit, prune

    mask = prune(model, loader, score=Epsd(steps=3), sparsity=0.95, objective=CsKd())
    history = fit(model, loader, mask=mask, objective=CsKd())

Only what `epsd` itself offers (`epsd.__all__`) is public API: the modules below it move and change without notice.
Names are loaded when first used: `import epsd` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epsd.evaluation.evaluate import evaluate
    from epsd.masks import Mask
    from epsd.objectives.cross_entropy import CrossEntropy
    from epsd.objectives.cskd import CsKd
    from epsd.objectives.dlb import Dlb
    from epsd.objectives.pskd import PsKd
    from epsd.project.recipes import Recipe
    from epsd.pruning.prune import prune
    from epsd.scores.epsd import Epsd
    from epsd.scores.grasp import Grasp
    from epsd.scores.magnitude import Magnitude
    from epsd.scores.prospr import ProsPr
    from epsd.scores.random import Random
    from epsd.scores.snip import Snip
    from epsd.scores.synflow import SynFlow
    from epsd.training.fit import fit
    from epsd.types import Batch, EpsdError

_HOME = {
    "evaluate": "evaluation.evaluate",
    "Mask": "masks",
    "CrossEntropy": "objectives",
    "CsKd": "objectives",
    "Dlb": "objectives",
    "PsKd": "objectives",
    "prune": "pruning.prune",
    "Epsd": "scores",
    "Grasp": "scores",
    "Magnitude": "scores",
    "ProsPr": "scores",
    "Random": "scores",
    "Snip": "scores",
    "SynFlow": "scores",
    "Recipe": "project.recipes",
    "fit": "training.fit",
    "Batch": "types",
    "EpsdError": "types",
}

__all__ = [
    "Batch",
    "CrossEntropy",
    "CsKd",
    "Dlb",
    "Epsd",
    "EpsdError",
    "Grasp",
    "Magnitude",
    "Mask",
    "ProsPr",
    "PsKd",
    "Random",
    "Recipe",
    "Snip",
    "SynFlow",
    "evaluate",
    "fit",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'epsd' has no attribute '{name}'. It has: {', '.join(__all__)}")
    return getattr(import_module(f"epsd.{_HOME[name]}"), name)
