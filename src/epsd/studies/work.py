"""A cell of a study: its identity, its training, its result, and where the study keeps them.

State, under `.epsd/studies/NAME`: `cells/<mark>.json`, the result of a finished cell, written last; `work/<mark>`,
checkpoints and run id of one under way here; `trials.journal`, who is at what, unless a storage is named (`queue`);
`data`, the prepared images.
"""

import functools
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from epsd.comparison.configuration import MACHINE
from epsd.compute.devices import open_machine
from epsd.data.prepared import Prepared
from epsd.datasets import DATASETS
from epsd.evaluation import evaluate as evaluation
from epsd.pipeline import changes, deploy, describe
from epsd.pipeline.train import card
from epsd.pipeline.weights import content_of
from epsd.preparing.write import prepare
from epsd.project import artifacts, code
from epsd.project.params import Params
from epsd.project.runtime import located, state_folder, versions
from epsd.registry import choose
from epsd.studies.plan import Cell, Plan
from epsd.studies.procedures import Desk, Trained
from epsd.studies.procedures.types import Cache
from epsd.tracking import Tracker, track
from epsd.tracking.texts import as_text
from epsd.training import checkpoints

CODE = ("images", "prune", "train", "evaluate", "procedure")
"""What a cell's result depends on, in the words of `epsd.project.code`."""

RESULT = "epsd-cell-1"


class Result(NamedTuple):
    """A finished cell: what its run in MLflow says, kept here so that the table needs no store.

    `began`: Unix milliseconds. `params`: as text, as MLflow has them.
    """

    run_id: str
    began: int
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    seconds: float


@dataclass
class Place:
    """Where a study keeps its state."""

    name: str
    _data: dict[str, Prepared] = field(default_factory=dict)
    _seen: dict[Path, str | None] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """`.epsd/studies/NAME`."""
        return state_folder("studies", self.name)

    def prepared(self, params: Params, split_seed: int) -> bool:
        """Whether `data` would find what it needs."""
        return (self.folder / "data" / self._key(params, split_seed) / "data.json").exists()

    def data(self, params: Params, split_seed: int) -> Prepared:
        """The images of a cell, prepared once: the same splits for every seed, so that all read the same test images.

        On the machine of the cell, with as many threads as this process has.
        Raises what `epsd.preparing.write.prepare` raises.
        """
        key = self._key(params, split_seed)
        if key not in self._data:
            folder, settings = self.folder / "data" / key, params.data.model_dump(include=_SPLITTING)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not self.prepared(params, split_seed):
                    source = choose(DATASETS, params.dataset, "dataset")()
                    prepare(source, folder, seed=split_seed, dataset=params.dataset, **settings)
            self._data[key] = Prepared.load(folder)
        return self._data[key].on(open_machine(params.device, workers=params.data.workers))

    def _key(self, params: Params, split_seed: int) -> str:
        """Of all that the images are made from. A user's own are looked at once: a change under way is for the next."""
        made_from = {"dataset": params.dataset, "seed": split_seed, **params.data.model_dump(include=_SPLITTING)}
        made_from["code"] = _code(("images",), params.model_dump_json())
        dataset = choose(DATASETS, params.dataset, "dataset")
        if hasattr(dataset, "root") and not getattr(dataset, "download", False):  # a download is what it always was
            root = located(dataset.root)
            if root not in self._seen:
                self._seen[root] = changes.glance(root)
            made_from["images"] = self._seen[root]
        return _digest(made_from)

    def result(self, mark: str) -> Result | None:
        """The result of the cell, None where it is not finished. Raises ArtifactError for a damaged file."""
        path = self.folder / "cells" / f"{mark}.json"
        if not path.exists():
            return None
        content = artifacts.read_json(path)
        return Result(**content["result"]) if content.get("format") == RESULT else None

    def keep(self, mark: str, result: Result) -> None:
        """From here on the cell is done."""
        artifacts.write_json(self.folder / "cells" / f"{mark}.json", {"format": RESULT, "result": result._asdict()})
        self.tidy(mark)

    def tidy(self, mark: str) -> None:
        """Remove what attempts at a finished cell have left."""
        shutil.rmtree(self.folder / "work" / mark, ignore_errors=True)

    def parent(self) -> str | None:
        """The id of the study's own run, where it has begun."""
        path = self.folder / "run.json"
        return artifacts.read_run(path).run_id if path.exists() else None


_SPLITTING = {"validation", "test", "limit", "classes"}
_OTHERWISE = ("threads", "voc.", "detect.")


def mark(cell: Cell, data: Prepared) -> str:
    """Identity of a cell: parameters, procedure, data, code and torch. Not the number of threads or of workers.

    Another number of threads changes the last bits of a result, which is no reason to train everything again.
    """
    params = {name: value for name, value in cell.params.marked().items() if not name.startswith(_OTHERWISE)}
    values = {"params": params, "procedure": dict(cell.procedure), "device": data.machine.device.type}
    tree = json.dumps({**cell.params.model_dump(), "procedure": values["procedure"]})
    return checkpoints.fingerprint(
        {**values, **_start(cell.params), "data": data.digest, "torch": torch.__version__, "code": _code(CODE, tree)}
    )


def _start(params: Params) -> dict[str, str]:
    """The content of the weights that the cell begins with."""
    return {} if params.start.weights is None else {"start": _content(params.start.weights)}


_content = functools.cache(content_of)


@functools.cache
def _code(uses: tuple[str, ...], tree: str) -> dict[str, str]:
    """Read once in a process: an edit while it works changes no identity under its feet."""
    return code.digests(uses, json.loads(tree))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


# --- which cells ----------------------------------------------------------------------------------------------------


class Marked(NamedTuple):
    """A cell of a plan. `key`: what it shares with others (`Procedure.shares`), None for nothing."""

    cell: Cell
    key: str | None
    data: str


def marked(plan: Plan, place: Place) -> dict[str, Marked]:
    """Mark -> cell of the plan, in its order, with the digest of its data."""
    found = {}
    for cell in plan.cells:
        data, shares = place.data(cell.params, plan.split_seed), cell.how().shares(cell.params)
        key = None if shares is None else _digest([dict(shares), dict(cell.procedure), data.digest])
        found[mark(cell, data)] = Marked(cell, key, data.digest)
    return found


def results(plan: Plan, place: Place) -> Iterator[tuple[Cell, Result]]:
    """The finished cells of the plan, in its order. A result without its cell in the plan is left out."""
    for cell in plan.cells:
        if result := place.result(mark(cell, place.data(cell.params, plan.split_seed))):
            yield cell, result


# --- the work -------------------------------------------------------------------------------------------------------


Tell = Callable[..., None]
Runs = tuple[str, str | None]


def run_cell(plan: Plan, place: Place, own: str, wanted: Marked, cache: Cache, tell: Tell, runs: Runs) -> Result:
    """Train, evaluate on test once, log. Goes on where an interrupted attempt of the same mark stopped.

    tell : is told `run_id` of the cell's run, and `result` before that run ends; it raises where the cell was given to
        another worker meanwhile.
    runs : the study's, and that of an attempt whose worker is gone.
    """
    cell, params = wanted.cell, wanted.cell.params
    data, folder = place.data(params, plan.split_seed), place.folder / "work" / own
    started, clock = time.time(), time.monotonic()
    with opened(plan, cell, data, folder, *runs) as tracker:
        tell(run_id=tracker.run_id)
        trained = cell.how()(params, data, Desk(folder, own, tracker.epoch, cache, wanted.key))
        figures = {**trained.figures, **evaluated(params, data, trained, tracker, keep=plan.study.keep_models)}
        tracker.metrics({**figures, "time/study": time.monotonic() - clock})
        tracker.dataset(params.data_title, data.digest, str(data.index.get("source", "")), data.sizes)
        last = {name: value for name, value in trained.history[-1].items() if name != "epoch"}
        result = Result(
            run_id=tracker.run_id,
            began=int(1000 * started),
            params={name: as_text(value) for name, value in cell.logged().items()},
            metrics=_finite({**last, **figures}),
            tags={"data.digest": data.digest, "variant": cell.variant, **_machine()},
            seconds=time.monotonic() - clock,
        )
        tell(result=result._asdict())
    return result


def _machine() -> dict[str, str]:
    """What the timings of a cell depend on beside its parameters."""
    known = {"threads": str(torch.get_num_threads()), **{f"versions.{name}": of for name, of in versions().items()}}
    return {name: known[name] for name in MACHINE if name in known}


def _finite(figures: Mapping[str, Any]) -> dict[str, float]:
    numbers = {k: float(v) for k, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def opened(plan: Plan, cell: Cell, data: Prepared, folder: Path, parent: str, lost: str | None) -> Any:
    """The cell's run: a new one under the study's, or the one that an interrupted attempt began."""
    params = cell.params
    method = {"method": f"{cell.method}+{params.objective['name']}"}
    method |= {"variant": cell.variant} if cell.variant else {}
    method |= {} if cell.procedure["name"] == "pipeline" else {"procedure": cell.procedure["name"]}
    return track(
        "study",
        experiment=params.tracking.experiment,
        name=describe.run_name(params, cell.method),
        run_id=describe.begun(folder),
        parent_run_id=parent,
        lost_run_id=lost,
        params=cell.logged(),
        tags={**describe.tags(params, data, kind="cell"), "study": plan.study.name, **method, **_machine()},
        description=f"{cell.how().story(params, data)} A cell of the study `{plan.study.name}`.",
    )


def evaluated(params: Params, data: Prepared, trained: Trained, tracker: Tracker, *, keep: bool) -> dict[str, float]:
    """`test/...`, `model/...`, `deploy/...`, `latency/...` and their time: the one reading of the test split."""
    begun, settings = time.perf_counter(), params.evaluate
    test = data.batches("test", batch_size=settings.batch_size)
    answers = evaluation.predict(trained.model, test)
    result = evaluation.measure(*answers, settings.ece_bins)
    found = {f"test/{name}": value for name, value in result.metrics.items()}
    with tempfile.TemporaryDirectory() as folder:
        built = params.model_copy(update={"architecture": trained.architecture or params.architecture})
        about = card(built, data, trained.mask, trained.model)
        dense, compact = Path(folder) / "model.safetensors", Path(folder) / "model.sparse.safetensors"
        artifacts.save_model(trained.model, dense, about)
        costs = {"model": deploy.measured(trained.model, about, dense=dense, compact=compact)}
        subject = deploy.Subject(trained.model, about, dense, data, answers)
        costs |= deploy.deployed(subject, settings, Path(folder)).figures
        found |= {f"{group}/{name}": value for group, part in costs.items() for name, value in part.items()}
        if keep:
            for path in (compact, dense.with_suffix(".json"), *sorted(Path(folder).glob("*.onnx"))):
                tracker.artifact(path, folder="model")
    return {**found, "time/evaluate": time.perf_counter() - begun}
