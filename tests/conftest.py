"""What every test shares: the sample data and oracles where they exist, one seed, no telemetry."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import warm

if TYPE_CHECKING:
    from epsd.data.prepared import Prepared
    from epsd.project.params import Params

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
signal.signal(signal.SIGINT, signal.default_int_handler)  # `nohup` and `&` have them ignored, and so would all children
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("EPSD_SHARED", ROOT.parent / "shared"))


def shared_file(*parts: str) -> Path:
    """A file of the samples that live beside the repository, or a skip with the reason."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} of the project's shared samples (set EPSD_SHARED to their folder)")
    return path


def pytest_configure(config: pytest.Config) -> None:
    """A place for `warm.python()`, of all workers of this session."""
    if not hasattr(config, "workerinput"):
        os.environ[warm.PLACE] = tempfile.mkdtemp(prefix="epsd-warm-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(warm.PLACE), ignore_errors=True)


LONGEST = ("pipeline/test_pipeline", "tuning/test_tuning", "pipeline/test_bytes", "stages/test_detect",
           "studies/test_study", "studies/test_queue", "engine/test_two_machines", "pipeline/test_stage")  # fmt: skip
"""The longest files, from half a minute to five. They go first, so that the workers of `make test` end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(f"{item.path.parent.name}/{item.path.stem}", len(LONGEST)))


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Append a line to files of the package, in a copy that all marks and fingerprints are made from."""
    from epsd.project import code

    package = tmp_path / "edited" / "epsd"
    shutil.copytree(code.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", package)

    def append(*names: str) -> None:
        for name in names:
            assert (package / name).is_file(), name
            with (package / name).open("a", encoding="utf-8") as file:
                file.write("# another line\n")

    return append


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs: to make one takes MLflow a second or more."""
    from epsd.tracking.database import complete

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    complete(file, file.parent)
    return file


def shipped(changes: Mapping[str, object]) -> "Params":
    """The parameters of the repository with some of them changed, by dotted name."""
    from epsd.project.params import override, parse, read_yaml

    tree = read_yaml(ROOT / "params.yaml")
    for key, value in changes.items():
        override(tree, key, value)
    return parse(tree)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """The current folder: a project of its own with a store without runs."""
    shutil.copy(empty_store, tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> "Prepared":
    """Twelve images of each digit, prepared; nobody writes there."""
    from epsd.data.prepared import Prepared
    from epsd.datasets import DATASETS
    from epsd.preparing.write import prepare
    from epsd.registry import choose

    folder = tmp_path_factory.mktemp("digits")
    prepare(choose(DATASETS, {"name": "digits"})(), folder, limit=12)
    return Prepared.load(folder)
