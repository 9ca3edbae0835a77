"""Self-distillation methods, one file and one line each. `objective.name` picks one for scoring and training."""

from epsd.objectives.cross_entropy import CrossEntropy
from epsd.objectives.cskd import CsKd
from epsd.objectives.dlb import Dlb
from epsd.objectives.pskd import PsKd
from epsd.types import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "cskd": CsKd,
    "pskd": PsKd,
    "dlb": Dlb,
}
