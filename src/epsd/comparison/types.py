"""What is compared, and the table that comes of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from epsd.comparison.statistics import Difference, Summary, summarise
from epsd.types import EpsdError


class ComparisonError(EpsdError):
    """Nothing to compare, an unknown metric or baseline."""


@dataclass(frozen=True)
class Entry:
    """One finished run.

    params : dotted name -> value as text, as MLflow has them.  metrics : name -> last value.
    began : when, in any unit; of two runs of one configuration and seed the later one counts.
    digest : of the data it saw.  variant : a name for its method, "" for none.  machine : its tags that MACHINE names.
    """

    params: Mapping[str, str]
    metrics: Mapping[str, float]
    began: float = 0
    digest: str = ""
    variant: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Cell:
    """A configuration: one value per seed. `best`: the best mean of its column, or not told apart from it.

    data : seed -> digest of the data of that value.
    """

    values: dict[int, float]
    data: dict[int, str] = field(default_factory=dict)
    against: Difference | None = None
    best: bool = False

    @property
    def summary(self) -> Summary:
        """Mean, deviation, seeds."""
        return summarise(list(self.values.values()))

    @property
    def runs(self) -> dict[tuple[int, str], float]:
        """The values by what makes a pair of two: the seed and the data."""
        return {(seed, self.data.get(seed, "")): value for seed, value in self.values.items()}


@dataclass
class Row:
    """One method under one objective. `context`: what else tells it from other rows, dotted name -> value. `named`: by
    a study, for what makes it.
    """

    method: str
    objective: str
    context: dict[str, str] = field(default_factory=dict)
    cells: dict[float, Cell] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict, repr=False)
    named: bool = False

    @property
    def label(self) -> str:
        """`epsd (train.lr=0.1)`."""
        told = ", ".join(f"{key}={value}" for key, value in self.context.items())
        return f"{self.method} ({told})" if told else self.method

    @property
    def name(self) -> str:
        """Label and objective in one."""
        return f"{self.label} + {self.objective}"


@dataclass
class Table:
    """Rows by columns of sparsity. `notes`: what a reader must know, one sentence each."""

    metric: str
    rows: list[Row]
    columns: list[float]
    baseline: str | None = None
    notes: list[str] = field(default_factory=list)
