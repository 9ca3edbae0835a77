"""Typed params.yaml: load, check, override by dotted name.

Every number that a result depends on is here, under the same dotted name in YAML, in code, in MLflow and in
Optuna. A choice (`dataset`, `architecture`, `objective`, `prune.score`, `voc`, `detect.detector`) is one mapping,
`name` plus the settings of that variant, which the variant itself checks (`epsd.registry.choose`).
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from epsd.files.regular import read_bytes
from epsd.project.recipes import DetectorRecipe, Recipe
from epsd.project.settings import (
    LARGEST,
    MOST,
    NOTHING,
    SPREAD,
    TIMING,
    Bearing,
    Choice,
    Count,
    Few,
    Natural,
    Place,
    Positive,
    Section,
    Share,
    Text,
)
from epsd.registry import ParamsError, explain, unknown

DEFAULT_PATH = Path("params.yaml")

_DETECTION = Bearing(on=("detect/", "time/detect"))
_LATENCY = replace(TIMING, on=("latency/", "time/evaluate"))
_FILES = Bearing(on=("detect/onnx_", "detect/latency_", "time/detect"), marked=False)


class LaunchParams(Section):
    """How many processes share prune, train and detect."""

    processes: Annotated[Few | Literal["auto"], SPREAD] = 1
    sync_batchnorm: bool = True


class DataParams(Section):
    """How images reach the network. Used by prepare (shares, limit), prune and train (augmentation)."""

    validation: Share
    test: Share
    limit: Count | None
    classes: Annotated[Annotated[list[str], Field(min_length=2)] | None, Bearing(neutral="null")] = None
    crop_padding: Annotated[int, Field(ge=0, le=1024)]
    flip: bool
    workers: Annotated[int, Field(ge=0, le=1024), SPREAD]


class StartParams(Section):
    """The weights that prune and train begin with. Each key's meaning stands beside it in params.yaml."""

    weights: Annotated[Place | None, Bearing(neutral="null")] = None
    head: Annotated[Literal["auto", "keep", "new"], Bearing(neutral="auto")] = "auto"
    mask: Annotated[Literal["new", "keep"], Bearing(neutral="new")] = "new"

    @model_validator(mode="after")
    def _of_weights(self) -> Self:
        if self.weights is None and (self.mask, self.head) != ("new", "auto"):
            raise ValueError("weights: null draws them by seed, which have no mask and no head to keep")
        return self


class PruneParams(Section):
    """The early-prune mask. Each key's unit and range stand beside it in params.yaml."""

    score: Annotated[Choice, Bearing(settings={"graphs_kept": Bearing(only_timing=True)})]
    structure: Annotated[Literal["weights", "channels"], Bearing(neutral="weights")] = "weights"
    sparsity: Share
    macs: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = 0.25
    latency_ms: Annotated[Positive | None, Bearing(neutral="null")] = None
    bytes: Annotated[Count | None, Bearing(neutral="null")] = None
    allocation: Literal["uniform", "cost", "random"] = "uniform"
    round_to: Literal[4] | Annotated[int, Field(ge=8, le=MOST, multiple_of=8)] = 8
    floor: Annotated[float, Field(gt=0, le=1)] = 0.5
    scope: Literal["global", "layer", "erk", "lamp"]
    exclude: Annotated[list[str], Bearing(neutral="[]")] = Field(default_factory=list)
    densities: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    channel_cap: Annotated[Annotated[float, Field(ge=1, le=LARGEST)] | None, Bearing(neutral="null")] = None
    rounds: Count
    batches: Annotated[Count, Bearing(neutral="1")] = 1
    average: Annotated[Literal["absolute", "signed"], Bearing(neutral="absolute")] = "absolute"
    batch_size: Count
    keep_at_least_one: bool
    rescale: Annotated[bool, Bearing(neutral="false")] = False
    control: Literal["none", "shuffled", "reinitialised"]
    compare: Annotated[bool, Bearing(only_timing=True)]
    memory: Literal["auto"] | Positive
    precision: Literal["fp32", "bf16"]

    @model_validator(mode="after")
    def _of_weights(self) -> Self:
        if self.exclude and self.structure == "channels":
            raise ValueError("exclude: names layers whose weights stay; structure: channels goes by groups")
        return self

    @model_validator(mode="after")
    def _of_a_budget(self) -> Self:
        asked, auto = self.budget(), self.macs == "auto"
        if auto and not asked:
            raise ValueError("macs: auto needs latency_ms, bytes or both; else a share, (0, 1]")
        if asked and not (auto and self.structure == "channels"):
            raise ValueError(f"{next(iter(asked))}: needs structure: channels and macs: auto, which goes by it")
        return self

    def budget(self) -> dict[str, float]:
        """What the ONNX file may take at most, of `latency_ms` and `bytes`; {} where no budget is given."""
        return {name: float(most) for name in ("latency_ms", "bytes") if (most := getattr(self, name)) is not None}


class _Whole(Section):
    """A section that leaves nothing to a recipe's defaults: every number that a result depends on is in the file.

    Options that came later may be left out: by default they do nothing (`Bearing.neutral`).
    """

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, content: Any) -> Any:
        given = content if isinstance(content, Mapping) else cls.model_fields
        missing = [name for name, field in cls.model_fields.items() if name not in given and not _later(field)]
        if missing and cls.model_fields.keys() >= given.keys():  # of a misspelt key that alone is told
            told: list[Any] = [{"type": "missing", "loc": (key,), "input": content} for key in missing]
            raise ValidationError.from_exception_data(cls.__name__, told)
        return content


def _later(field: FieldInfo) -> bool:
    return any(isinstance(note, Bearing) and note.neutral is not None for note in field.metadata)


class TrainParams(_Whole, Recipe):
    """Self-distilled training of the masked network."""

    batch_size: Count

    @model_validator(mode="after")
    def _parts_of_two(self) -> Self:
        most = max(1, self.batch_size // 2)
        if self.accumulate != "auto" and self.accumulate > most:
            raise ValueError(f"accumulate: {self.accumulate} parts of batch_size {self.batch_size} are fewer than two "
                             f"images each. At most {most} works here")  # fmt: skip
        return self


class ExportParams(Section):
    """The files that are deployed."""

    onnx: bool = True
    int8: Literal["auto"] | bool = "auto"
    calibration: Count = 512
    max_drop: Share = 0.01


class EvaluateParams(Section):
    """The one reading of the test split."""

    batch_size: Annotated[Count, replace(TIMING, on=("time/evaluate",))]
    ece_bins: Annotated[int, Field(ge=1, le=10_000), Bearing(on=("test/ece",))]
    latency_batch_sizes: Annotated[list[Count], Field(min_length=1), _LATENCY]
    latency_repeats: Annotated[Natural, _LATENCY]
    export: Annotated[ExportParams, Bearing(on=("deploy/", *_LATENCY.on))] = ExportParams()


class DetectParams(_Whole, DetectorRecipe):
    """Detection transfer of the pruned, trained backbone."""

    detector: Choice
    backbone: Annotated[Place | None, replace(_DETECTION, neutral="null")] = None
    beside: Literal["none", "dense", "random"]
    frozen_stages: Natural
    pictures: Annotated[Natural, NOTHING]
    onnx: Annotated[bool, _FILES] = True
    latency_repeats: Annotated[Natural, _FILES] = 20

    @model_validator(mode="after")
    def _of_this_folder(self) -> Self:
        if self.backbone is not None and self.beside == "dense":
            raise ValueError("beside: dense trains this folder's network; with backbone use none or random")
        return self


class TrackingParams(Section):
    """Where runs are filed."""

    experiment: Text


Finite = Annotated[float, Field(ge=-1e15, le=1e15)]
Value = str | bool | int | float | None
Direction = Literal["maximize", "minimize"]


class RangeParams(Section):
    """Where one parameter may lie: `float: [low, high]`, `int: [low, high]` (both ends included) or `choice: [...]`.

    log : searched evenly in its logarithm. step : distance of the values tried, from `low`.
    when : other searched or set parameter -> its values (one or a list) for which this one is tried at all.
    """

    floats: list[Finite] | None = Field(None, alias="float", min_length=2, max_length=2)
    ints: list[Annotated[int, Field(ge=-MOST, le=MOST)]] | None = Field(None, alias="int", min_length=2, max_length=2)
    choice: list[Value] | None = Field(None, min_length=1)
    log: bool = False
    step: Positive | None = None
    when: dict[str, Value | list[Value]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_range(self) -> Self:
        if sum(kind is not None for kind in (self.floats, self.ints, self.choice)) != 1:
            raise ValueError("needs exactly one of 'float: [low, high]', 'int: [low, high]', 'choice: [...]'")
        if self.choice is not None:
            if self.log or self.step:
                raise ValueError("'log' and 'step' are for numbers, not for a choice")
            if len({repr(value) for value in self.choice}) < len(self.choice):
                raise ValueError("names a value twice")
            return self
        self._check_ends(*self.ends)
        return self

    def _check_ends(self, low: float, high: float) -> None:
        if low == high:
            raise ValueError(f"the range [{low}, {high}] is empty: put the value under tune.fixed")
        if low > high:
            raise ValueError(f"the range [{low}, {high}] is reversed: write the lower end first")
        if self.log and low <= 0:
            raise ValueError("a logarithmic range begins above 0")
        if self.log and self.step:
            raise ValueError("'log' and 'step' exclude each other")
        if self.ints and self.step and self.step != int(self.step):
            raise ValueError("the step between whole numbers is a whole number")

    @property
    def ends(self) -> list[Any]:
        """[low, high]; of a choice, all its values."""
        return list(self.floats or self.ints or self.choice or [])


class LimitParams(Section):
    """What a trial must keep to."""

    at_least: Finite | None = None
    at_most: Finite | None = None

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("needs 'at_least', 'at_most' or both")
        return self


def _most_right() -> dict[str, Direction]:
    return {"val/top1": "maximize"}


def _default_space() -> dict[str, RangeParams]:
    ranges: dict[str, dict[str, Any]] = {
        "prune.sparsity": {"float": [0.9, 0.99]},
        "prune.score.steps": {"int": [1, 6]},
        "prune.score.lr": {"float": [0.01, 1.0], "log": True},
        "objective.name": {"choice": ["cross_entropy", "cskd", "pskd", "dlb"]},
        "objective.temperature": {"float": [1.0, 8.0]},
        "objective.weight": {"float": [0.1, 3.0], "log": True},
        "train.lr": {"float": [0.01, 0.5], "log": True},
        "train.weight_decay": {"float": [1e-5, 5e-3], "log": True},
    }
    return {key: RangeParams.model_validate(entry) for key, entry in ranges.items()}


class TuneParams(Section):
    """The search. No stage depends on it. Each key's meaning stands beside it in params.yaml."""

    study: Text = "search"
    storage: str | None = None
    trials: Count = 20
    workers: Few = 1
    sampler: Literal["tpe", "gp", "nsga2", "random", "grid"] = "tpe"
    pruner: Literal["hyperband", "median", "race", "none"] = "hyperband"
    repeats: Count = 1
    objectives: Annotated[dict[str, Direction], Field(min_length=1, max_length=3)] = Field(default_factory=_most_right)
    constraints: dict[str, LimitParams] = Field(default_factory=dict)
    current_first: bool = True
    heartbeat: Count = 30
    fixed: dict[str, Any] = Field(default_factory=dict)
    space: Annotated[dict[str, RangeParams], Field(min_length=1)] = Field(default_factory=_default_space)


class Params(Section):
    """The whole of params.yaml, checked. `tune` is left out of dumps: no trained model depends on it."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    device: Annotated[Text, TIMING]
    threads: Annotated[Few | None, TIMING] = None
    launch: LaunchParams = Field(default_factory=LaunchParams)
    dataset: Annotated[Choice, Bearing(settings={"download": NOTHING, "title": NOTHING})]
    data: DataParams
    architecture: Choice
    objective: Choice
    start: StartParams = Field(default_factory=StartParams)
    prune: PruneParams
    train: TrainParams
    evaluate: Annotated[EvaluateParams, Bearing(settings={"latency_batch_size": _LATENCY})]  # of runs before `sizes`
    voc: Annotated[Choice, replace(_DETECTION, settings={"title": NOTHING})]
    detect: Annotated[DetectParams, _DETECTION]
    tracking: Annotated[TrackingParams, NOTHING]
    tune: Annotated[TuneParams, NOTHING] = Field(default_factory=TuneParams, exclude=True)

    @property
    def data_title(self) -> str:
        """What people call the data set: its `title`, else of a folder or archive of one's own its name (`photos.zip`
        is "photos").
        """
        return _title(self.dataset, "image_folder")

    @property
    def scenes_title(self) -> str:
        """Likewise of what is detected."""
        return _title(self.voc, "devkit", "coco", "yolo")

    def pruning(self, **changes: Any) -> Self:
        """The same, but for these values of `prune`."""
        return self.model_copy(update={"prune": self.prune.model_copy(update=changes)})

    def marked(self, *sections: str) -> dict[str, Any]:
        """Dotted name -> value of what a mark holds (of these sections; none given: of all)."""
        named = flatten(self.model_dump(include=set(sections) or None))
        return {name: value for name, value in named if bearing(name).marked}


def _title(choice: Mapping[str, Any], *own: str) -> str:
    if title := choice.get("title"):
        return str(title)
    name, root = str(choice["name"]), Path(str(choice.get("root") or ""))
    return re.sub(r"\.(zip|tar|tgz|tar\.\w+)$", "", root.name) or name if name in own else name


@functools.cache
def bearing(dotted: str) -> Bearing:
    """What the parameter of this name bears on: its own note, else that of its section."""
    kind: Any = Params
    note = Bearing()
    for part in dotted.split("."):
        hint = get_type_hints(kind, include_extras=True).get(part) if isinstance(kind, type) else None
        notes = [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Bearing)]
        note = notes[0] if notes else note.settings.get(part, note)
        kind = getattr(hint, "__origin__", hint)
    return note


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML 1.2 mapping as plain Python (1e-3 is a number, `on` a string, as DVC reads them).

    Raises ParamsError when the file is missing, unreadable or no mapping.
    """
    return as_tree(read_text(path), path)


def read_text(path: Path) -> str:
    """The text of a parameter file. Raises ParamsError when it is missing or unreadable."""
    try:
        return read_bytes(path).decode("utf-8")
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file. Run from the project's root: `epsd preset` has more.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: cannot be read ({error}).") from None


def as_tree(text: str, path: Path) -> dict[str, Any]:
    """The content of `path` as `read_yaml` gives it. Raises ParamsError for what is no YAML, or no mapping."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:  # the latter: a date that there is not, a number of too many digits
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ParamsError(f"{path}: {_TOO_DEEP}") from None
    _check_size(content, path)
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise ParamsError(f"{path}: expected a mapping of sections, found {found}.")
    return content


_DEEPEST, _LARGEST = 30, 100_000
_TOO_DEEP = f"nested more than {_DEEPEST} deep."


def _check_size(content: Any, path: Path) -> None:
    """Raises ParamsError for what only recursion without end could follow (an anchor in itself), or memory hold."""
    level, count = [content], 0
    for _ in range(_DEEPEST):
        inner = [
            list(node.values()) if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)
        ]
        count += sum(map(len, inner))
        if count > _LARGEST:
            raise ParamsError(f"{path}: holds more than {_LARGEST:,} values.")
        level = [value for values in inner for value in values]
    if level:
        raise ParamsError(f"{path}: {_TOO_DEEP}")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> `("a.b", 1)`, the dotted names used in MLflow and Optuna."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def at(tree: Any, dotted: str) -> Any:
    """The value of a dotted name; None where there is none."""
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def override(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one value in place by its dotted name; the path up to the last part must exist.

    Raises ParamsError naming the first unknown part and the valid ones.
    """
    *parents, last = dotted.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if not isinstance(node.get(part), dict):
            raise unknown(".".join(parents[: depth + 1]), part, [k for k, v in node.items() if isinstance(v, dict)])
        node = node[part]
    node[last] = value


def parse(tree: Mapping[str, Any]) -> Params:
    """Check a plain mapping. Raises ParamsError with every finding in one line."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        raise explain("", error) from None


def load(path: Path = DEFAULT_PATH) -> Params:
    """Read and check `path`."""
    return parse(read_yaml(path))
