"""Early-pruning criteria: one file and one line each. `params.prune.score.name` picks one."""

from epsd.scores.epsd import Epsd
from epsd.scores.grasp import Grasp
from epsd.scores.magnitude import Magnitude
from epsd.scores.prospr import ProsPr
from epsd.scores.random import Random
from epsd.scores.snip import Snip
from epsd.scores.synflow import SynFlow
from epsd.types import Score

SCORES: dict[str, type[Score]] = {
    "epsd": Epsd,
    "prospr": ProsPr,
    "snip": Snip,
    "grasp": Grasp,
    "synflow": SynFlow,
    "magnitude": Magnitude,
    "random": Random,
}
