"""dvc.yaml, stages/ and the imports tell the same story; imports point the way the house is laid out."""

import ast
import functools
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import ROOT
from epsd.project import artifacts, code
from epsd.project.params import bearing, flatten, load, read_yaml
from test_private_parts import ATTRIBUTES, NAMES

PACKAGE = ROOT / "src" / "epsd"
REGISTRIES = {  # name of the registry -> (package, dotted key of the choice in params.yaml)
    "DATASETS": ("datasets", "dataset.name"),
    "DEVKITS": ("datasets", "voc.name"),
    "ARCHITECTURES": ("architectures", "architecture.name"),
    "OBJECTIVES": ("objectives", "objective.name"),
    "SCORES": ("scores", "prune.score.name"),
    "DETECTORS": ("detectors", "detect.detector.name"),
}
CHOICES = {package for package, _ in REGISTRIES.values()}
ORDER = (  # from the ground up: a room imports rooms of the lines above its own, and itself
    {"types"},
    {"files"},
    {"registry", "masks", "losses"},
    {"compute"},
    {"project"},
    {"architectures", "objectives", "detectors", "voc"},
    {"data", "datasets", "preparing", "tracking", "engine"},
    {"pruning", "training", "evaluation", "comparison"},
    {"scores", "figures"},
    {"detection"},
    {"pipeline"},
    {"tuning", "studies", "analysis"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
NAMERS = {"pipeline", "tuning", "studies", "analysis", "cli"}  # know variants by name; all others receive objects


def stages() -> dict[str, dict]:
    return read_yaml(ROOT / "dvc.yaml")["stages"]


def test_every_stage_says_whose_code_runs_and_how_threads_wait_before_anything_is_loaded() -> None:
    """Seconds would be lost where torch came first and Python began anew after it."""
    for file in (ROOT / "stages").glob("*.py"):
        nodes = ast.parse(file.read_text()).body
        first = next(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
        assert ast.unparse(first) == "import epsd.project.own_code", file


def test_the_first_import_of_a_stage_loads_nothing_heavy() -> None:
    code = "import epsd.project.own_code, sys; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("own", "found"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_wait_briefly_unless_the_user_says_otherwise(own: dict[str, str], found: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    told = [sys.executable, "-c", "import epsd, os; print(os.environ.get('GOMP_SPINCOUNT'))"]
    assert subprocess.run(told, env={**kept, **own}, capture_output=True, text=True).stdout.strip() == found


def module_file(module: str) -> Path | None:
    """File of `epsd.a.b`, None when there is no such module."""
    path = ROOT.joinpath("src", *module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node except what stands under `if TYPE_CHECKING:`, which never runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _runtime_nodes(node)


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def imports(file: Path) -> frozenset[tuple[str, str]]:
    """(module, name) of every import in `file`, anywhere in it; name is "" for a plain `import module`."""
    found = set()
    for node in _runtime_nodes(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write absolute imports"
            found |= {(node.module or "", alias.name) for alias in node.names}
    return frozenset(found)


def first_party(file: Path) -> set[tuple[str, str]]:
    """(module, name) of the project's own imports, `from epsd import losses` read as module epsd.losses."""
    found = set()
    for module, name in imports(file):
        if module.split(".")[0] != "epsd":
            continue
        inner = f"{module}.{name}"
        found.add((inner, "") if name and module_file(inner) else (module, name))
    return found


def variants(registry: str) -> dict[str, Path]:
    package, _ = REGISTRIES[registry]
    entries = getattr(importlib.import_module(f"epsd.{package}"), registry)
    return {name: module_file(entry.__module__) for name, entry in entries.items()}


def walk(file: Path, inside: Callable[[Path], bool]) -> set[Path]:
    """The files that `file` imports, theirs ... as far as they are `inside`; a registry stands for all its variants."""
    found, waiting = set(), [file]
    while waiting:
        for module, name in first_party(waiting.pop()):
            reached = variants(name).values() if name in REGISTRIES else [module_file(module)]
            new = {path for path in reached if path and path not in found}
            found |= new
            waiting += filter(inside, new)
    return found


# --- dvc.yaml -------------------------------------------------------------------------------------------------------


def test_stages_are_the_scripts():
    assert list(stages()) == ["prepare", "prune", "train", "evaluate", "detect"]
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} == set(stages())


@pytest.mark.parametrize("name", ["prepare", "prune", "train", "evaluate", "detect"])
def test_stage_is_one_command(name):
    assert stages()[name]["cmd"] == f"python stages/{name}.py"


@pytest.mark.parametrize("name", ["prepare", "prune", "train", "evaluate", "detect"])
def test_declared_code_is_what_the_table_says(name):
    deps = stages()[name]["deps"]
    declared = [dep.removeprefix("src/epsd/") for dep in deps if dep.startswith("src/")]
    carried = code.rooms("train") if str(artifacts.RUN) in deps else []  # new with each training, so they rerun with it
    assert sorted(declared) == sorted(set(code.rooms(name)) - set(carried)) and len(declared) <= 12
    assert f"stages/{name}.py" in deps


@pytest.mark.parametrize("name", ["prepare", "prune", "train", "evaluate", "detect"])
def test_a_stage_imports_nothing_that_the_table_does_not_know(name):
    """Of what a stage imports, all that can change its results is a dependency; one of `train`, whose run id is
    new with each training, is as good where a stage reads that.
    """
    takes = {name, "train"} if str(artifacts.RUN) in stages()[name]["deps"] else {name}
    reached = walk(ROOT / "stages" / f"{name}.py", lambda path: known(path, *takes))
    assert len(reached) > 10, "the walk finds the imports"
    unknown = {path for path in reached if not known(path, *takes) and not known_to_change_nothing(path)}
    assert not unknown, sorted(str(path.relative_to(PACKAGE)) for path in unknown)


def known(path: Path, *uses: str) -> bool:
    """Whether a room of these uses holds the file; a variant may be the chosen one."""
    rooms = code.rooms(*uses)
    chosen = tuple(f"{package}/*.py" for package, key in REGISTRIES.values() if f"{package}/${{{key}}}.py" in rooms)
    inner = path.relative_to(PACKAGE)
    return code.within(inner, rooms) or (any(map(inner.match, chosen)) and path.stem[0] != "_")


def known_to_change_nothing(path: Path) -> bool:
    """`__init__` of the choices only lists them."""
    return path.name == "__init__.py" or code.within(path.relative_to(PACKAGE), code.NOTHING)


def test_every_module_has_a_place_in_the_table():
    uses = set(" ".join(code.CHANGES.values()).split())
    lost = [path for path in MODULES if not known(path, *uses) and not known_to_change_nothing(path)]
    assert not lost, f"say in project/code.py which results these can change: {lost}"


def test_the_pipeline_fits_a_screen_or_two():
    assert len((ROOT / "dvc.yaml").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("name", ["prepare", "prune", "train", "evaluate", "detect"])
def test_every_file_between_stages_is_written_by_an_earlier_one(name):
    written: set[str] = set()
    for other, stage in stages().items():
        if other == name:
            break
        written |= {Path(out) for out in stage["outs"]}
    for dep in (Path(dep) for dep in stages()[name]["deps"] if dep.startswith("artifacts/")):
        assert {dep, *dep.parents} & written, dep


def test_artifact_paths_are_those_of_the_code():
    known = {path for path in flat(vars(artifacts).values()) if artifacts.ROOT in path.parents}
    folders = {Path(out) for stage in stages().values() for out in stage["outs"]}
    assert folders == {path for path in known if path.parent == artifacts.ROOT}
    content = read_yaml(ROOT / "dvc.yaml")
    named = {dep for stage in content["stages"].values() for dep in stage["deps"] if dep.startswith("artifacts/")}
    named |= {*content["metrics"], *(entry for entry in content["plots"] if isinstance(entry, str))}
    named |= {path for plot in content["plots"] if isinstance(plot, dict) for one in plot.values() for path in one["y"]}
    assert {Path(path) for path in named} <= known, "not in artifacts.py"


def flat(values) -> Iterator[Path]:
    for value in values:
        if isinstance(value, Path):
            yield value
        elif isinstance(value, tuple):
            yield from flat(value)


def test_declared_parameters_exist_and_every_parameter_is_declared():
    tree = load(ROOT / "params.yaml").model_dump()
    declared = {key for stage in stages().values() for key in stage["params"]}
    names = {name for name, _ in flatten(tree)}
    for key in declared:
        assert any(name == key or name.startswith(f"{key}.") for name in names), f"{key} is not in params.yaml"
    free = {name for name in names if not any(name == key or name.startswith(f"{key}.") for key in declared)}
    assert free == {"data.workers", "launch.processes", "tracking.experiment"}, "parameters that make no stage stale"
    assert not any(bearing(name).marked for name in free), "nor anything else"


def test_training_parameters_rerun_nothing_before_train():
    for name in ("prepare", "prune"):
        assert not [key for key in stages()[name]["params"] if key.startswith("train")]


def test_detect_does_not_wait_for_evaluate():
    assert not [dep for dep in stages()["detect"]["deps"] if dep.startswith("artifacts/evaluate")]


def test_no_checkpoint_is_an_output():
    """DVC keeps `persist` outputs when parameters change: a stale checkpoint would be taken for a finished training."""
    assert "persist" not in (ROOT / "dvc.yaml").read_text(encoding="utf-8")


# --- imports --------------------------------------------------------------------------------------------------------

MODULES = sorted(PACKAGE.rglob("*.py"))


def place(file: Path) -> str:
    """The room a module is in: the choice's package, or its own name."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own(file: Path) -> set[str]:
    return {module.split(".")[1] for module, _ in first_party(file) if "." in module}


def test_every_module_is_in_a_known_room_and_few_lie_flat():
    assert {place(file) for file in MODULES} - {"__init__"} == set(FLOOR)
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file):
    room = place(file)
    if room == "__init__":
        return
    above = {other for other in own(file) if other != room and FLOOR[other] >= FLOOR[room]}
    assert not above, f"{room} imports {sorted(above)}"
    if room not in NAMERS | CHOICES | {"registry"}:
        assert ("epsd.registry", "choose") not in first_party(file), "machinery receives objects, never names"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_below_the_pipeline_a_function_takes_what_it_needs(file):
    """Never the parameters of the whole program. `tracking` has "params" in MLflow's sense, a mapping of text."""
    room = place(file)
    if room in {"__init__", "project", "tracking"} or FLOOR[room] >= FLOOR["pipeline"]:
        return
    taking = [
        f"{function.name}({argument.arg})"
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        if argument.arg == "params"
        or (argument.annotation and re.search(r"\bParams\b", ast.unparse(argument.annotation)))
    ]
    assert not taking


def test_device_and_threads_are_decided_at_the_openings_only():
    """Of a stage, a trial, a study's cell, an analysis; `stage` also looks whether the device is there at all."""
    openings = {"pipeline/stage.py", "tuning/worker.py", "studies/work.py", "analysis/command.py"}
    assert _callers("open_machine") == openings
    assert _callers("pick_device") == {"compute/devices.py", "compute/distributed.py", "pipeline/stage.py"}
    timed = {"compute/timing.py"}  # on one thread and on all, which the process has again afterwards
    assert _callers("set_num_threads") == {"compute/devices.py", "studies/run.py"} | timed


def _callers(function: str) -> set[str]:
    """Files of the package and of stages/ that call a function of that name."""
    files = {str(file.relative_to(PACKAGE)): file for file in MODULES}
    files |= {str(file.relative_to(ROOT)): file for file in (ROOT / "stages").glob("*.py")}
    call = re.compile(rf"(?<!def )\b{function}\(")
    return {name for name, file in files.items() if call.search(file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("package", ["mlflow", "optuna", "dvc"])
def test_heavy_libraries_have_one_door(package):
    doors = {"mlflow": {"tracking"}, "optuna": {"engine", "tuning"}, "dvc": set()}
    files = [*MODULES, *(ROOT / "stages").glob("*.py")]
    users = {
        place(f) if PACKAGE in f.parents else f.stem
        for f in files
        if package in {m.split(".")[0] for m, _ in imports(f)}
    }
    assert users <= doors[package]


def test_there_are_no_circles():
    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module in done or not (file := module_file(module)):
            return
        for other, _ in first_party(file):
            visit(other, (*trail, module))
        done.add(module)

    done: set[str] = set()
    for file in MODULES:
        if file.stem != "__init__":
            visit(".".join(file.relative_to(ROOT / "src").with_suffix("").parts), ())


@pytest.mark.parametrize("registry", REGISTRIES)
def test_key_is_file_stem(registry):
    found = variants(registry)
    assert found
    assert {name: path.stem for name, path in found.items()} == {name: name for name in found}


def test_start_is_light():
    """`import epsd` pulls nothing in; the start-up path of a stage does not load what only some stages need."""
    heavy = "{'mlflow', 'optuna', 'sklearn', 'pandas', 'matplotlib'}"
    code = "import sys, epsd; print('torch' in sys.modules); import epsd.pipeline.stage, epsd.tracking; "
    code += f"print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["False", "set()"]


def test_commands_that_train_nothing_start_without_torch():
    code = "import sys, epsd.cli, epsd.project.presets, epsd.project.params, epsd.project.artifacts; "
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- private parts of other libraries -------------------------------------------------------------------------------

NAMED_TUPLE = {"_asdict", "_fields", "_replace"}  # public, but for their names


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


@functools.cache
def own_private_names() -> frozenset[str]:
    """Every private name that a class of src itself defines or sets: what else begins so is another library's."""
    found = set(NAMED_TUPLE)
    for kind in (node for file in MODULES for node in ast.walk(parsed(file)) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(kind):
            match node:
                case ast.FunctionDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    found.add(name)
    return frozenset(found)


def names_of_others(tree: ast.AST) -> dict[str, str]:
    """Name in a file -> what it stands for, of all that is imported from neither the project nor Python itself."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
            found |= {(top := alias.name.split(".")[0]): top for alias in node.names if not alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    known = {"epsd", *sys.stdlib_module_names}
    return {name: meant for name, meant in found.items() if meant.split(".")[0] not in known}


def private_parts(tree: ast.AST) -> set[str]:
    """Private parts of other libraries: of a module with their full names, of an object the attribute alone."""
    others = names_of_others(tree)
    found = {meant for meant in others.values() if private(meant)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if private(name):
                root, _, rest = ast.unparse(node).partition(".")
                if root in others:
                    found.add(f"{others[root]}.{rest}")
                elif root not in sys.stdlib_module_names and name not in own_private_names():
                    found.add(name)
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=name), *_]):
                if private(str(name)) and name not in own_private_names():
                    found.add(str(name))
    return found


def test_private_parts_of_other_libraries_are_listed_and_tried():
    found = set().union(*(private_parts(parsed(file)) for file in MODULES))
    listed = {*NAMES, *ATTRIBUTES}
    assert found == listed, f"not in test_private_parts.py: {found - listed}; used nowhere: {listed - found}"


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("import torch\ntorch._foreach_pow(a, 2)", "torch._foreach_pow"),
        ("import torch\nx = torch._C.get_cpu_capability()", "torch._C"),
        ("from torch import nn\nnn.modules.conv._ConvNd", "torch.nn.modules.conv._ConvNd"),
        ("from torch._dynamo import reset", "torch._dynamo.reset"),
        ("import torch._inductor.config as config", "torch._inductor.config"),
        ("from torch.nn.modules.conv import _ConvNd as Conv", "torch.nn.modules.conv._ConvNd"),
        ("def f(module):\n    return module._backward_hooks", "_backward_hooks"),
        ("def f(self):\n    return self._backward_hooks", "_backward_hooks"),
        ("def f(module):\n    return getattr(module, '_backward_hooks', None)", "_backward_hooks"),
    ],
)
def test_a_private_part_is_found(source, part):
    assert private_parts(ast.parse(source)) == {part}
    assert private_parts(ast.parse("import os\nos._exit(1)\nfrom epsd.types import Loss\nLoss._replace(a)")) == set()


def test_no_file_of_src_is_long():
    lengths = {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8").count("\n") for file in MODULES}
    long = {name: length for name, length in lengths.items() if length > 500}
    assert not long, f"split along a seam: {long}"


# --- the lock and the presets ---------------------------------------------------------------------------------------


UNIMPORTED = {  # declared, and imported by another package or by none
    "dvc": "the command that runs the stages",
    "onnxscript": "torch.onnx.export writes by it",
    "plotly": "Optuna draws the search's figures with it",
    "pyyaml": "of the design card",
    "ruamel-yaml-clib": "DVC reads YAML with it, twice as fast",
}


def declared(*extras: str) -> set[str]:
    """The packages that pyproject.toml names, as the lock spells them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = [
        *project["dependencies"],
        *(entry for extra in extras for entry in project["optional-dependencies"][extra]),
    ]
    return {spelt(re.split(r"[<>=\[ ]", entry)[0]) for entry in entries}


def spelt(name: str) -> str:
    return re.sub(r"[._]", "-", name.lower())


def test_packages_are_declared_when_they_are_imported_and_needed_when_they_are_declared():
    owners = importlib.metadata.packages_distributions()
    files = [*MODULES, *(ROOT / "stages").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    own = {"epsd", *sys.stdlib_module_names, *(file.stem for file in files)}
    used = {module.split(".")[0] for file in files for module, _ in imports(file)} - own
    brought = {name: {spelt(owner) for owner in owners.get(name, [name])} for name in used}
    assert not {name for name in used if not brought[name] & declared("timm")}
    assert declared() - set().union(*brought.values()) <= set(UNIMPORTED)


def test_lock_pins_every_dependency_and_names_no_host():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    assert declared() <= {spelt(name) for name in re.findall(r"^([a-z0-9._-]+)==", lock, re.M)}
