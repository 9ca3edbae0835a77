import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from epsd.datasets import DATASETS, DEVKITS
from epsd.registry import ParamsError, choose, settings_of
from epsd.types import EpsdError

EVERY = [*DATASETS.items(), *DEVKITS.items()]


@pytest.mark.parametrize(("name", "cls"), EVERY)
def test_a_variant_is_one_file_of_its_name_documented_and_frozen(name: str, cls: type[Any]) -> None:
    assert Path(inspect.getfile(cls)).stem == name
    assert inspect.getdoc(cls) and inspect.getdoc(inspect.getmodule(cls))
    for field in settings_of(cls):
        assert field in (inspect.getdoc(cls) or ""), f"{name}: its docstring does not tell of '{field}'"
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "cls"), DATASETS.items())
def test_an_unknown_setting_lists_the_known_ones(name: str, cls: type[Any]) -> None:
    with pytest.raises(ParamsError, match=rf"dataset \({name}\): unknown 'siz_e'.*Valid: .*{settings_of(cls)[0]}"):
        choose(DATASETS, {"name": name, "siz_e": 1}, "dataset")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_what_is_not_there_is_one_clear_line_naming_the_place(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": name, "root": str(tmp_path / "nowhere")}
    fields = {field.name for field in dataclasses.fields(DATASETS[name])}
    if "download" in fields:
        settings["download"] = False
    with pytest.raises(EpsdError, match="nowhere") as error:
        choose(DATASETS, settings, "dataset")()
    assert "\n" not in str(error.value)
