"""The search space of params.yaml's `tune` section: checked as a whole, conditional on the chosen variants."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from epsd.architectures import ARCHITECTURES
from epsd.engine.grid import Values, points
from epsd.engine.ledger import Taken
from epsd.objectives import OBJECTIVES
from epsd.pipeline.stage import check
from epsd.project import code
from epsd.project.params import Params, RangeParams, TuneParams, at, flatten, override, parse
from epsd.registry import ParamsError, choose, settings_of, shown, unknown
from epsd.scores import SCORES
from epsd.tuning.judge import FIGURES, MEASURED

REGISTRIES: dict[str, Mapping[str, type[Any]]] = {
    "architecture": ARCHITECTURES,
    "objective": OBJECTIVES,
    "prune.score": SCORES,
}
SEARCHABLE = ("architecture.", "objective.", "start.", "prune.", "train.", "data.crop_padding", "data.flip")
"""What may differ between trials: they share one prepared data set, the same seeds and one device."""


class Space:
    """What each trial may be: the parameters of the study (`base`), the fixed values, the ranges.

    Raises ParamsError on construction, before any work: an unknown dotted key, an end of a range that the parameter
    cannot take, a fixed or current value outside its range, a `when` that never holds. `alone`: the section is looked
    at by itself, with no search in mind: a setting may be that of a variant which is not chosen at present.
    """

    def __init__(self, params: Params, tune: TuneParams | None = None, *, alone: bool = False) -> None:
        self.tune, self._alone = tune or params.tune, alone
        self.base: dict[str, Any] = params.model_dump()
        self.fixed: Values = dict(self.tune.fixed)
        self.ranges = {key: entry for key, entry in self.tune.space.items() if key not in self.fixed}
        self._order = sorted(self.ranges, key=lambda key: (not _names_a_variant(key), bool(self.ranges[key].when)))
        if alone:
            self.fixed = {key: value for key, value in self.fixed.items() if self.active(key, {})}
        self._check()

    # --- what a trial is ---

    def suggest(self, trial: Taken) -> Values:
        """Every searched value of one trial, the inactive ones left out."""
        return self._each(lambda key: _suggest(trial, key, self.ranges[key]))

    def current(self) -> Values:
        """The present params.yaml as a point of the space: the first trial."""
        tree = self.tree({})
        return self._each(lambda key: _present(tree, key))

    def _each(self, value: Callable[[str], Any]) -> Values:
        chosen: Values = {}
        for key in self._order:
            if self.active(key, chosen):
                chosen[key] = value(key)
        return chosen

    def active(self, key: str, chosen: Mapping[str, Any]) -> bool:
        """Whether `key` exists beside the values chosen so far: its variant has it, its `when` holds."""
        section = _section(key)
        if section and not _names_a_variant(key):
            variant = self._value(f"{section}.name", chosen)
            if key.removeprefix(f"{section}.") not in settings_of(REGISTRIES[section][variant]):
                return False
        entry = self.ranges.get(key)
        return entry is None or all(self._holds(other, wanted, chosen) for other, wanted in entry.when.items())

    def tree(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The whole of params.yaml (without `tune`) for one trial.

        A variant other than the present one begins with its own defaults: settings belong to their variant.
        """
        tree = copy.deepcopy(self.base)
        values = {**self.fixed, **chosen}
        for section in REGISTRIES:
            name = values.get(f"{section}.name")
            if name is not None and name != at(tree, f"{section}.name"):
                override(tree, section, {"name": name})
        for key, value in values.items():
            override(tree, key, value)
        return tree

    def params(self, chosen: Mapping[str, Any]) -> Params:
        """`tree`, checked, with the section that it was made by."""
        return parse(self.tree(chosen)).model_copy(update={"tune": self.tune})

    def grid(self) -> Iterator[Values]:
        """Every point, for the sampler `grid`. Raises ParamsError for a range without steps."""
        return points({key: list(_steps(key, self.ranges[key])) for key in self._order}, self.active)

    # --- what a study is: two searches with equal signatures may share one ---

    def signature(self) -> dict[str, Any]:
        """All that makes trials comparable: space, objectives, constraints, and the parameters that no trial sets."""
        ranges = sorted(self.ranges.items())
        return {
            "space": {key: entry.model_dump(by_alias=True, exclude_defaults=True) for key, entry in ranges},
            "objectives": dict(self.tune.objectives),
            "constraints": {key: limit.model_dump() for key, limit in self.tune.constraints.items()},
            "fixed": self.fixed,
            "params": {**dict(self.unsearched()), "tune.repeats": self.tune.repeats},
        }

    def code(self) -> dict[str, str]:
        """The code that a trial's figures depend on, that of every variant that one may choose included."""
        trees = [self.base]
        for section in REGISTRIES:
            for name in self._variants(section):
                trees.append(copy.deepcopy(self.base))
                override(trees[-1], section, {"name": name})
        return code.digests(["prune", "train", "evaluate"], *trees)

    def unsearched(self) -> Iterator[tuple[str, Any]]:
        """(key, value) of the parameters that bear on a trial and that neither space nor fixed values set."""
        free = {section for section in REGISTRIES if f"{section}.name" in {**self.ranges, **self.fixed}}
        for key, value in flatten(self.base):
            searched = key in self.ranges or key in self.fixed or _section(key) in free
            if not searched and (key.startswith(SEARCHABLE) or key in ("seed", "device")) and key != "prune.compare":
                yield key, value

    # --- checks ---

    def _check(self) -> None:
        self._check_figures()
        for where, keys in (("tune.fixed", self.tune.fixed), ("tune.space", self.tune.space)):
            for key in keys:
                self._check_key(where, key)
        for key, value in self.tune.fixed.items():
            if key in self.tune.space and not _inside(self.tune.space[key], value):
                raise ParamsError(
                    f"tune.fixed.{key}: {shown(value)} is outside its range in tune.space, "
                    f"{_shown(self.tune.space[key])}."
                )
        check(self.params({}))
        for key, entry in self.tune.space.items():  # also what is fixed at present
            if key in self.ranges:
                self._check_when(key, entry)
            self._check_ends(key, entry)
        if self.tune.current_first and not self._alone:
            self._check_current()

    def _check_figures(self) -> None:
        if self.tune.pruner == "race" and self.tune.repeats < 2:
            raise ParamsError("tune.pruner: 'race' compares trials seed by seed: set tune.repeats to 2 or more.")
        if self.tune.sampler == "gp" and self.tune.constraints and self.tune.pruner != "none":
            raise ParamsError(
                "tune.sampler: 'gp' learns of whole trials only, so it would never see which limits a stopped one "
                "broke: with tune.constraints set tune.pruner to none, or tune.sampler to tpe."
            )
        for where in ("objectives", "constraints"):
            for name in getattr(self.tune, where):
                if name not in (*FIGURES, *MEASURED):
                    raise unknown(f"tune.{where}", name, [*FIGURES, *MEASURED])

    def _check_key(self, where: str, key: str) -> None:
        known = {name for name, _ in flatten(self.base)}
        for section in REGISTRIES:
            for variant in [*self._variants(section), *(REGISTRIES[section] if self._alone else ())]:
                known |= {f"{section}.{setting}" for setting in settings_of(REGISTRIES[section][variant])}
        if key not in known:
            searchable = sorted(name for name in known if name.startswith(SEARCHABLE))
            beside = [name for name in searchable if name.partition(".")[0] == key.partition(".")[0]]
            raise unknown(where, key, beside or searchable)
        if not key.startswith(SEARCHABLE):
            raise ParamsError(
                f"{where}: '{key}' is the same for all trials, which share one prepared data set, one seed and one "
                f"device. Valid: whatever begins with {', '.join(SEARCHABLE)}."
            )

    def _variants(self, section: str) -> list[str]:
        """The variants that a trial may choose. Raises ParamsError for one that does not exist."""
        key = f"{section}.name"
        fixed, entry = self.fixed.get(key), self.tune.space.get(key)
        names = [fixed] if fixed else (entry.ends if entry else [at(self.base, key)])
        for name in names:
            if not isinstance(name, str) or name not in REGISTRIES[section]:
                raise unknown(f"tune.{'fixed' if fixed else 'space'}.{key}", name, REGISTRIES[section])
        return [str(name) for name in names]

    def _check_when(self, key: str, entry: RangeParams) -> None:
        for other in entry.when:
            known = {name for name, _ in flatten(self.base)} | set(self.tune.space) | set(self.fixed)
            if other not in known:
                raise unknown(f"tune.space.{key}.when", other, sorted(known))
            if other in self.ranges and self.ranges[other].when:
                raise ParamsError(f"tune.space.{key}.when: '{other}' is itself conditional; name what it depends on.")
        if _names_a_variant(key) and entry.when:
            raise ParamsError(f"tune.space.{key}: a variant's name cannot be conditional.")

    def _check_ends(self, key: str, entry: RangeParams) -> None:
        """Both ends of the range are values that the parameter takes, in some trial in which it is active."""
        beside = next((chosen for chosen in self._surroundings() if self.active(key, chosen)), None)
        if beside is None and (self._alone or key in self.fixed):
            return
        if beside is None:
            raise ParamsError(f"tune.space.{key}: no trial would ever use it: no variant that may be chosen has it.")
        for value in entry.ends:
            try:
                check(self.params({**beside, key: value}))
            except ParamsError as error:
                raise ParamsError(f"tune.space.{key}: {shown(value)} is no valid value. {error}") from None

    def _surroundings(self) -> Iterator[Values]:
        """Every combination of choices, beside which a conditional parameter may exist."""
        axes = {key: self.ranges[key].choice or [] for key in self._order if self.ranges[key].choice is not None}
        whens = {other for entry in self.ranges.values() for other in entry.when}
        axes = {key: values for key, values in axes.items() if _names_a_variant(key) or key in whens}
        return points(axes, self.active)

    def _check_current(self) -> None:
        for key, value in self.current().items():
            if not _inside(self.ranges[key], value):
                raise ParamsError(
                    f"tune.space.{key}: params.yaml's own value {value!r} is outside {_shown(self.ranges[key])}, but "
                    "the first trial is params.yaml as it stands. Widen the range, or set tune.current_first: false."
                )

    def _holds(self, other: str, wanted: Any, chosen: Mapping[str, Any]) -> bool:
        if other in self.ranges and other not in chosen:
            return False
        value = self._value(other, chosen)
        return value in wanted if isinstance(wanted, list) else value == wanted

    def _value(self, key: str, chosen: Mapping[str, Any]) -> Any:
        if key in chosen:
            return chosen[key]
        return self.fixed[key] if key in self.fixed else at(self.base, key)


def _section(key: str) -> str | None:
    """The choice that `key` belongs to: `prune.score.lr` -> `prune.score`."""
    return next((section for section in REGISTRIES if key.startswith(f"{section}.")), None)


def _names_a_variant(key: str) -> bool:
    return key.removesuffix(".name") in REGISTRIES


def _present(tree: Mapping[str, Any], key: str) -> Any:
    """The value of `key`; of a setting that is not written down, its variant's default."""
    section = _section(key)
    if section is None or _names_a_variant(key):
        return at(tree, key)
    return getattr(choose(REGISTRIES[section], at(tree, section)), key.removeprefix(f"{section}."))


def _inside(entry: RangeParams, value: Any) -> bool:
    if entry.choice is not None:
        return value in entry.choice
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = entry.ends
    return bool(low <= value <= high)


def _shown(entry: RangeParams) -> str:
    return f"{entry.ends}" if entry.choice is not None else f"[{entry.ends[0]}, {entry.ends[1]}]"


def _suggest(trial: Taken, key: str, entry: RangeParams) -> Any:
    if entry.choice is not None:
        return trial.suggest_categorical(key, entry.choice)
    low, high = entry.ends
    if entry.ints is not None:
        return trial.suggest_int(key, low, high, step=int(entry.step or 1), log=entry.log)
    return trial.suggest_float(key, low, high, step=entry.step, log=entry.log)


def _steps(key: str, entry: RangeParams) -> Iterator[Any]:
    """The values of one axis of the grid."""
    if entry.choice is not None:
        yield from entry.choice
        return
    low, high = entry.ends
    step = entry.step or (1 if entry.ints else None)
    if step is None:
        raise ParamsError(f"tune.space.{key}: the sampler grid needs a choice, whole numbers, or a step.")
    for number in range(int((high - low) / step + 1e-9) + 1):
        yield low + number * int(step) if entry.ints else low + number * step
