"""Typed params.yaml: load, check, override by dotted name.

Every number that a result depends on is here, under the same dotted name in YAML, in code, in MLflow and in
Optuna. A choice (`dataset`, `architecture`, `objective`, `prune.score`, `voc`, `detect.detector`) is one mapping, `name` plus
the settings of that variant, which the variant itself checks (`epsd.registry.choose`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from epsd.registry import ParamsError, explain, unknown

DEFAULT_PATH = Path("params.yaml")


def _named(choice: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(choice.get("name"), str):
        raise ValueError("a choice needs a 'name'")
    return choice


Choice = Annotated[dict[str, Any], AfterValidator(_named)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Section(BaseModel):
    """A mapping of params.yaml: unknown keys, wrong types and out-of-range numbers are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataParams(Section):
    """How images reach the network. Used by prepare (shares, limit), prune and train (augmentation)."""

    validation: Share
    test: Share
    limit: Count | None
    crop_padding: Annotated[int, Field(ge=0)]
    flip: bool
    workers: Annotated[int, Field(ge=0)]


class PruneParams(Section):
    """The early-prune mask. Each key's unit and range stand beside it in params.yaml."""

    score: Choice
    sparsity: Share
    scope: Literal["global", "layer"]
    rounds: Count
    batch_size: Count
    keep_at_least_one: bool
    control: Literal["none", "shuffled", "reinitialised"]
    compare: bool


class TrainParams(Section):
    """Self-distilled training of the masked network."""

    epochs: Count
    batch_size: Count
    lr: Positive
    momentum: Share
    nesterov: bool
    weight_decay: NonNegative
    schedule: Literal["step", "cosine", "constant"]
    milestones: list[Annotated[float, Field(gt=0, lt=1)]]
    gamma: Annotated[float, Field(gt=0, le=1)]
    warmup_epochs: Annotated[int, Field(ge=0)]
    clip_norm: Positive | None
    precision: Precision


class EvaluateParams(Section):
    """The one reading of the test split."""

    batch_size: Count
    ece_bins: Count
    latency_batch_size: Count
    latency_repeats: Annotated[int, Field(ge=0)]


class DetectParams(Section):
    """Detection transfer of the pruned, trained backbone."""

    detector: Choice
    beside: Literal["none", "dense", "random"]
    epochs: Count
    batch_size: Count
    lr: Positive
    momentum: Share
    weight_decay: NonNegative
    clip_norm: Positive | None
    warmup_steps: Annotated[int, Field(ge=0)]
    flip: bool
    frozen_stages: Annotated[int, Field(ge=0)]
    pictures: Annotated[int, Field(ge=0)]
    precision: Precision


class TrackingParams(Section):
    """Where runs are filed."""

    experiment: Annotated[str, Field(min_length=1)]


class Params(Section):
    """The whole of params.yaml, checked."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    device: str
    dataset: Choice
    data: DataParams
    architecture: Choice
    objective: Choice
    prune: PruneParams
    train: TrainParams
    evaluate: EvaluateParams
    voc: Choice
    detect: DetectParams
    tracking: TrackingParams


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML 1.2 mapping as plain Python (1e-3 is a number, `on` a string, as DVC reads them).

    Raises ParamsError when the file is missing, unreadable or no mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file. Run from the project's root, or copy one from presets/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: cannot be read ({error}).") from None
    except YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ParamsError(f"{path}: expected a mapping of sections, found {type(content).__name__}.")
    return content


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> `("a.b", 1)`, the dotted names used in MLflow and Optuna."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
    unknown_keys = [key for key in tree if key not in Params.model_fields]
    if unknown_keys:
        raise unknown("params.yaml", unknown_keys[0], Params.model_fields)
    for key, value in tree.items():
        section = Params.model_fields[key].annotation
        if isinstance(section, type) and issubclass(section, Section) and isinstance(value, Mapping):
            for inner in value:
                if inner not in section.model_fields:
                    raise unknown(key, inner, section.model_fields)
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        raise explain("", error) from None


def load(path: Path = DEFAULT_PATH) -> Params:
    """Read and check `path`."""
    return parse(read_yaml(path))
