"""The study file: what varies around a base, checked as a whole, and the cells that come of it.

A cell is one model to train: a method (a score or a named variant), an objective, a sparsity, a seed, and one value of
each parameter under `vary`. Every cell is a whole, checked `Params` before any work is done.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError

from epsd.engine.grid import Values, points
from epsd.objectives import OBJECTIVES
from epsd.pipeline.describe import method
from epsd.pipeline.stage import check
from epsd.project import presets
from epsd.project.params import DEFAULT_PATH, Params, at, flatten, override, parse, read_yaml
from epsd.project.runtime import project_root
from epsd.project.settings import Choice, Count, Section, Share, Text
from epsd.registry import ParamsError, choose, explain, settings_of, unknown
from epsd.scores import SCORES
from epsd.studies.procedures import PROCEDURES, Procedure
from epsd.types import EpsdError

CHOICES: dict[str, Mapping[str, type[Any]]] = {"prune.score": SCORES, "objective": OBJECTIVES}
"""What the grid itself chooses; a setting under `set` or `vary` holds for every choice that has it."""

MOST_MODELS = 100_000


def _mapping(choice: Any) -> Any:
    """`epsd` is short for `{name: epsd}`."""
    return {"name": choice} if isinstance(choice, str) else choice


Named = Annotated[Choice, BeforeValidator(_mapping)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class VariantParams(Section):
    """A method with a name of its own. `set`: what makes it; it has the last word over all other values of a cell.

    `procedure`: how its cells are trained, where not as the study's others.
    """

    name: Text
    set: dict[str, Any] = Field(default_factory=dict)
    procedure: Named | None = None


PLAIN = VariantParams.model_construct(name="")
"""A score as it is."""
_UNUSED = {"voc", "detect"}
"""Sections of the parameters that no cell reads."""


class StudyParams(Section):
    """A study file.

    name : of the folder under artifacts/studies and of the tag `study`; default: the file's name.
    base : `params.yaml` (or another parameter file, relative to the study file) or the name of a preset.
    set : dotted names and values that change the base, for all cells.
    scores, objectives : names, or mappings `{name: ..., setting: ...}`; default: the base's own. Settings that are not
        given are the base's where it has the same name, else the variant's defaults.
    variants : further methods, crossed with all objectives and sparsities that they do not set themselves.
    sparsities, seeds : lists; seeds also as a number, n = 0 ... n - 1. Sparsity 0 is the dense network, trained once
        for each objective and seed, whatever the scores.
    vary : dotted name -> values; all combinations. Settings that a choice lacks are skipped for it.
    procedure : how a cell becomes a trained model (`epsd.studies.procedures`).
    baseline, metric : of the final table (`epsd compare`).
    keep_models : log each cell's compact network to its run.
    storage : where the cells are handed out: a URL (`postgresql://USER@HOST/DATABASE`) for several machines, or a file;
        default: a journal beside the study's state.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.\-]*$")]
    base: str = "params.yaml"
    set: dict[str, Any] = Field(default_factory=dict)
    scores: list[Named] | None = None
    objectives: Annotated[list[Named], Field(min_length=1)] | None = None
    variants: list[VariantParams] = Field(default_factory=list)
    sparsities: Annotated[list[Share], Field(min_length=1)] | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)] | Count = 1
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    procedure: Named = Field(default_factory=lambda: {"name": "pipeline"})
    baseline: str | None = None
    metric: str = "test/top1"
    keep_models: bool = True
    storage: str | None = None


class Cell(NamedTuple):
    """One model to train. `variant`: the name of its method in the study file, "" for a plain score."""

    params: Params
    procedure: Mapping[str, Any]
    variant: str = ""

    @property
    def method(self) -> str:
        """The variant's name, else the procedure's, else score and control; `dense` where nothing is removed."""
        procedure = str(self.procedure["name"])
        return self.variant or (method(self.params) if procedure == "pipeline" else procedure)

    def how(self) -> Procedure:
        """The procedure as an object."""
        return choose(PROCEDURES, self.procedure, "procedure")

    def logged(self) -> Values:
        """Every parameter that bears on a cell, flat, as MLflow gets it; those of a procedure other than the pipeline
        included. A cell detects nothing.
        """
        how = self.how()
        settings = {"name": self.procedure["name"], **{name: getattr(how, name) for name in settings_of(type(how))}}
        other = {} if settings["name"] == "pipeline" else dict(flatten({"procedure": settings}))
        return {**dict(flatten(self.params.model_dump(exclude=_UNUSED))), **other}

    def __str__(self) -> str:
        return f"{self.method} {self.params.objective['name']} s{self.params.prune.sparsity:g} seed {self.params.seed}"


class Plan(NamedTuple):
    """`study`: the file's content. `cells`: all models, seed by seed, each once. `split_seed`: of the one data split
    that all seeds share.
    """

    study: StudyParams
    cells: list[Cell]
    split_seed: int


def find(name: str) -> Path:
    """A study file by path, or one of `presets/studies` by name. Raises ParamsError, listing those."""
    path = Path(name)
    if path.is_file():
        return path
    folder = presets.folder() / "studies"
    shipped = sorted(file.stem for file in folder.glob("*.yaml"))
    if path.suffix or len(path.parts) > 1:
        raise ParamsError(f"{path}: no such file. Shipped studies: {', '.join(shipped) or '(none)'}.")
    if name not in shipped:
        raise unknown("study", name, shipped)
    return folder / f"{name}.yaml"


def load(path: Path) -> Plan:
    """Read and check a study file and every cell of it.

    Raises ParamsError: naming the key and the valid choices, or the cell whose parameters do not fit together.
    """
    content = {"name": path.stem, **read_yaml(path)}
    try:
        study = StudyParams.model_validate(content)
        return plan(study, _base(path.parent, study.base))
    except ValidationError as error:
        raise ParamsError(f"{path}: {explain('', error, whole='')}") from None
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from None


def _base(folder: Path, name: str) -> dict[str, Any]:
    """The base's tree, without what no model depends on."""
    beside = folder / name
    if name == str(DEFAULT_PATH) and not beside.is_file():
        beside = project_root() / name
    try:
        tree = read_yaml(beside) if beside.suffix in (".yaml", ".yml") else presets.read(name)
    except ParamsError as error:
        raise ParamsError(f"base: {error}") from None
    return {section: content for section, content in tree.items() if section != "tune"}


def plan(study: StudyParams, base: Mapping[str, Any]) -> Plan:
    """All cells of `study` on the parameter tree `base`. Raises ParamsError before any work."""
    grid = _Grid(study, base)
    cells: dict[str, Cell] = {}
    for cell in grid.cells():
        cells.setdefault(json.dumps([cell.params.model_dump(), cell.procedure], sort_keys=True), cell)
    grid.complain_of_unused()
    if not cells:
        raise ParamsError("nothing to train: give 'scores' or 'variants'.")
    return Plan(study, list(cells.values()), grid.split_seed)


class _Grid:
    """The cells of one study. Keeps count of the settings that no cell had a use for."""

    def __init__(self, study: StudyParams, base: Mapping[str, Any]) -> None:
        self.study = study
        self.base: dict[str, Any] = copy.deepcopy(dict(base))
        override(self.base, "evaluate.export.onnx", False)  # seconds for each cell: a study that wants it says so
        self.soft = {key: value for key, value in study.set.items() if _section(key)}
        for key, value in study.set.items():
            if key not in self.soft:
                _set(self.base, key, value, "set")
        self.split_seed = parse(self.base).seed
        self.unused = {*self.soft, *(key for key in study.vary if _section(key))}
        names = [variant.name for variant in study.variants]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ParamsError(f"variants: the name '{twice}' is given twice.")

    def cells(self) -> Iterator[Cell]:
        """Seed by seed; the sparsities of a method next to each other, as they share its scores.

        Cells are checked with the first seed alone: thousands of them differ in nothing else.
        """
        study = self.study
        own = {section: {"name": at(self.base, section)["name"]} for section in CHOICES}
        seeds = range(study.seeds) if isinstance(study.seeds, int) else study.seeds
        scores = [own["prune.score"]] if study.scores is None and not study.variants else study.scores or []
        axes: dict[str, Sequence[Any]] = {
            "objectives": study.objectives or [own["objective"]],
            "methods": [*((score, PLAIN) for score in scores), *((own["prune.score"], way) for way in study.variants)],
            **study.vary,
            "sparsities": study.sparsities or [self.base["prune"]["sparsity"]],
        }
        if (models := math.prod(map(len, [seeds, *axes.values()]))) > MOST_MODELS:
            raise ParamsError(f"{models:,} models: at most {MOST_MODELS:,} in a study.")
        checked: list[tuple[Cell, bool]] = []
        for point in points(axes):
            score, way = point.pop("methods")
            given = {"prune.score": score, "objective": point.pop("objectives")}
            checked.append(
                (self.cell(given, way, point.pop("sparsities"), seeds[0], point), "seed" in way.set or "seed" in point)
            )
        for seed in seeds:
            for cell, fixed in checked:
                yield cell if fixed else cell._replace(params=cell.params.model_copy(update={"seed": seed}))

    def cell(self, given: Mapping[str, Choice], way: VariantParams, sparsity: float, seed: int, point: Values) -> Cell:
        """One cell, checked. `given`: its score and objective."""
        tree = copy.deepcopy(self.base)
        for section, choice in given.items():
            present = at(tree, section)
            override(tree, section, {**(present if choice["name"] == present["name"] else {}), **choice})
        tree["prune"]["sparsity"], tree["seed"] = sparsity, seed
        for key, value in {**self.soft, **point}.items():
            self._apply(tree, key, value, given)
        for key, value in way.set.items():
            _set(tree, key, value, f"variants '{way.name}'.set")
        return self._check(tree, way.procedure or self.study.procedure, way)

    def _apply(self, tree: dict[str, Any], key: str, value: Any, given: Mapping[str, Choice]) -> None:
        """Set a value of `set` or `vary`; one under a choice only where the choice has it and the file does not say."""
        section = _section(key)
        if section is None:
            _set(tree, key, value, "vary")
            return
        choice = at(tree, section)
        setting, registry = key.removeprefix(f"{section}."), CHOICES[section]
        if choice.get("name") in registry and setting in settings_of(registry[choice["name"]]):
            self.unused.discard(key)
            if setting not in given[section]:
                choice[setting] = value

    def _check(self, tree: dict[str, Any], procedure: Choice, way: VariantParams) -> Cell:
        variant = way.name
        whole = at(tree, "prune.sparsity") == 0 and at(tree, "prune.structure") != "channels"
        if whole and procedure.get("name") == "pipeline":
            tree = _dense(tree, self.base)
            variant = "" if all(key.startswith("prune.") for key in way.set) else variant
        where = variant or at(tree, "prune.score.name")
        try:
            params = check(parse(tree))
            choose(PROCEDURES, procedure, "procedure").check(params)
        except EpsdError as error:
            objective, sparsity = at(tree, "objective.name"), at(tree, "prune.sparsity")
            raise ParamsError(f"cell '{where}, {objective}, sparsity {sparsity}': {error}") from None
        return Cell(params, dict(procedure), variant)

    def complain_of_unused(self) -> None:
        """Raises ParamsError for a setting that no choice of the grid has."""
        for key in sorted(self.unused):
            section = _section(key) or ""
            chosen = sorted({name for name in CHOICES[section] if self._chosen(section, name)})
            valid = sorted({setting for name in chosen for setting in settings_of(CHOICES[section][name])})
            where = f"{'set' if key in self.soft else 'vary'}: {section} ({', '.join(chosen)})"
            raise unknown(where, key.removeprefix(f"{section}."), valid)

    def _chosen(self, section: str, name: str) -> bool:
        present = at(self.base, section)
        listed = self.study.scores if section == "prune.score" else self.study.objectives
        return name in [choice["name"] for choice in listed or [present]]


def _section(key: str) -> str | None:
    """The choice of the grid that a setting belongs to; None for `prune.score` itself and for everything else."""
    return next((section for section in CHOICES if key.startswith(f"{section}.") and key != f"{section}.name"), None)


def _set(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """`override` that also refuses an unknown last part where the section is there, and says where it was asked for.

    A choice may be given by its name alone; another name of a choice brings that variant's own defaults.
    """
    parents, _, last = key.rpartition(".")
    try:
        if isinstance(at(tree, key), dict) and isinstance(value, str):
            value = {"name": value}
        if last == "name" and isinstance(at(tree, parents), dict):
            if at(tree, key) != value:
                override(tree, parents, {"name": value})
            return
        if at(tree, key) is None and not isinstance(at(tree, parents), dict | None):
            raise ParamsError(f"'{parents}' has no keys.")
        if "." not in key and key not in Params.model_fields:
            raise unknown("params.yaml", key, Params.model_fields)
        override(tree, key, copy.deepcopy(value))
    except ParamsError as error:
        raise ParamsError(f"{where}: '{key}': {error}") from None


def _dense(tree: dict[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The same dense network for every score: nothing is removed, so nothing of `prune` matters."""
    return {**tree, "prune": {**copy.deepcopy(base["prune"]), "sparsity": 0.0, "control": "none", "rounds": 1}}
