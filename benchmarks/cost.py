"""What pruning methods cost: seconds and image passes, side by side, and what each needs for EPSD's accuracy.

    python benchmarks/cost.py --preset digits --set data.validation=0.25 --seeds 3 --out cost.jsonl --write cost.md

Trains each method at one sparsity (and the dense network) on the same data, batches and recipe. Every method hands on
the epoch that validation likes best (top-1, then NLL), as "Prune, then distill" does; the test split is read once per
model. An image pass is one image sent forwards through the network; see `epsd.compute.cost` for what the rest counts.
Stops and goes on: a finished model is one line of `--out`, and "Prune, then distill" also goes on in the middle. Its
three students share one teacher, whose whole cost each of them is charged with: "narrow" (dense, with as many
parameters), "rewound" (under the teacher's mask) and "scored" (under EPSD's mask), both from the initial weights. The
pruned teacher by itself is the row "iterative magnitude pruning".
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from ruamel.yaml import YAML
from torch import nn

from epsd.compute.cost import Meter
from epsd.compute.devices import Machine, pick_device
from epsd.compute.seeds import mix
from epsd.data.prepared import Prepared
from epsd.datasets import DATASETS
from epsd.evaluation import evaluate as evaluation
from epsd.masks import Mask
from epsd.pipeline.prune import initial, pruned
from epsd.pipeline.train import trained
from epsd.preparing.write import prepare
from epsd.project import presets
from epsd.project.code import digests
from epsd.project.params import Params, override, parse
from epsd.project.runtime import versions
from epsd.registry import choose
from epsd.studies.procedures import Desk, PruneThenDistill
from epsd.studies.procedures.types import Cache
from epsd.studies.prune_then_distill.student import StudentKind
from epsd.training.checkpoints import fingerprint
from epsd.training.record import Record
from epsd.training.result import kept
from page import of_preset, options, show

ROOT = Path(__file__).resolve().parent.parent
PLAIN = {"name": "cross_entropy"}
METHODS: dict[str, dict[str, Any]] = {
    "EPSD": {"prune.score": {"name": "epsd"}},
    "ProsPr": {"prune.score": {"name": "prospr"}},
    "random, ERK": {"prune.score": {"name": "random", "distribution": "erk"}},
    "dense, self-distilled": {"prune.sparsity": 0.0, "prune.score": {"name": "random"}},
    "dense, cross entropy": {"prune.sparsity": 0.0, "prune.score": {"name": "random"}, "objective": PLAIN},
}
KINDS: tuple[StudentKind, ...] = get_args(StudentKind)
STUDENTS: dict[StudentKind, str] = {
    "narrow": "prune, then distill: narrow",
    "rewound": "prune, then distill: rewound",
    "scored": "prune, then distill: scored",
}
ROUNDS = "iterative magnitude pruning"
REFERENCE = "EPSD"
Curve = list[dict[str, float]]


class Row(NamedTuple):
    """One trained model. `curve`: per epoch of its last training `epoch`, `val`, `image_passes`, `seconds`, the cost
    being all that was spent until then.
    """

    method: str
    seed: int
    test: float
    val: float
    parameters: int
    epochs: int
    curve: Curve


def params_of(arguments: argparse.Namespace, seed: int, changes: dict[str, Any]) -> Params:
    """The preset, changed by the command line and then by the method."""
    tree = presets.read(arguments.preset)
    if arguments.images:
        tree["dataset"] = {"name": "image_folder", "root": str(arguments.images.resolve()), "size": 32}
    for change in arguments.set:
        name, _, value = change.partition("=")
        override(tree, name, YAML(typ="safe").load(value))
    for name, value in {"prune.compare": False, "seed": seed, **changes}.items():
        override(tree, name, value)
    return parse(tree)


def prepared(params: Params, folder: Path) -> Prepared:
    """The images, split by seed 0 for all models."""
    settings = params.data.model_dump(include={"validation", "test", "limit", "classes"})
    prepare(choose(DATASETS, params.dataset, "dataset")(), folder, seed=0, **settings)
    return Prepared.load(folder, Machine(pick_device(params.device), workers=params.data.workers))


def point(record: Record) -> dict[str, float]:
    """What the curve keeps of an epoch."""
    names = {"val": "val/top1", "image_passes": "cost/image_passes", "seconds": "cost/seconds"}
    return {"epoch": record["epoch"], **{name: record[key] for name, key in names.items()}}


def row(params: Params, data: Prepared, method: str, model: nn.Module, val: float, curve: Curve) -> Row:
    """Test the model that was chosen."""
    test = data.batches("test", batch_size=params.evaluate.batch_size, seed=mix(params.seed, "test"))
    top1 = evaluation.evaluate(model, test).metrics["top1"]
    nonzero = sum(int((p != 0).sum()) for p in model.parameters())
    return Row(method, params.seed, top1, val, nonzero, int(curve[-1]["epoch"]), curve)


def one_training(arguments: argparse.Namespace, data: Prepared, method: str, seed: int) -> Row:
    """A mask at initialisation (or none), one training."""
    params = params_of(arguments, seed, METHODS[method])
    if params.prune.sparsity:
        mask, model, report, *_ = pruned(params, data)
    else:
        model, report = initial(params, data), {}
        mask = Mask.dense(model)
    best = params.model_copy(update={"train": params.train.model_copy(update={"keep": "best"})})
    history = trained(best, data, model, mask, on_epoch=lambda record: None, meter=Meter.of(report))
    chosen = kept(history, "best")
    return row(params, data, method, model, chosen["val/top1"], [point(record) for record in history])


def with_a_teacher(
    arguments: argparse.Namespace, data: Prepared, kind: StudentKind, seed: int, folder: Path
) -> Iterator[Row]:
    """The student, and of the first one also the pruned teacher by itself."""
    params = params_of(arguments, seed, {"prune.score": {"name": "epsd"}})
    tree = {**params.model_dump(), "procedure": {"name": "prune_then_distill"}}
    read = {"torch": torch.__version__, "data": data.digest, "code": digests(["prune", "train", "procedure"], tree)}
    mark = fingerprint({**params.marked(), **read})
    place = folder / f"{mark}-{kind}"
    shared = folder / f"{mark}-{KINDS[0]}" / "course.safetensors"
    if kind != KINDS[0] and shared.exists() and not place.exists():
        place.mkdir(parents=True)
        shutil.copy(shared, place)
    desk = Desk(place, mark, lambda record: None, Cache(), None)
    found, teacher = PruneThenDistill(student=kind).with_teacher(params, data, desk)
    last = max(record["train/phase"] for record in found.history)

    def curve(phase: float) -> Curve:
        return [point(record) for record in found.history if record["train/phase"] == phase]

    yield row(params, data, STUDENTS[kind], found.model, found.figures["val/top1"], curve(last))
    if kind == KINDS[0]:
        yield row(params, data, ROUNDS, teacher, found.figures["teacher/pruned_top1"], curve(last - 1))


def finished(path: Path) -> list[Row]:
    """What `--out` holds; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return rows


def train(arguments: argparse.Namespace) -> list[Row]:
    """Every model that is not there yet, seed by seed."""
    rows = finished(arguments.out)
    done = {(r.method, r.seed) for r in rows}

    def keep(new: Row) -> None:
        rows.append(new)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(new._asdict()) + "\n")
        print(f"{new.method}, seed {new.seed}: {new.test:.4f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        data = prepared(params_of(arguments, 0, {}), Path(folder))
        state = arguments.out.with_suffix(".state")
        for seed in range(arguments.seeds):
            for method in METHODS:
                if (method, seed) not in done:
                    keep(one_training(arguments, data, method, seed))
            for kind in arguments.students:
                if (STUDENTS[kind], seed) not in done:
                    for new in with_a_teacher(arguments, data, kind, seed, state):
                        keep(new)
    shutil.rmtree(state, ignore_errors=True)
    return rows


# --- the tables -----------------------------------------------------------------------------------------------------


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Mean ± standard deviation."""
    more = f" ± {form.format(statistics.stdev(values))}" if len(set(values)) > 1 else ""
    return form.format(statistics.mean(values)) + more


def tables(arguments: argparse.Namespace, rows: list[Row]) -> Iterator[str]:
    """Markdown: what each method cost and reached; what each needs for the accuracy of EPSD."""
    params = params_of(arguments, 0, {})
    info = versions()
    changes = ", ".join(arguments.set) or "none"
    yield f"Preset {arguments.preset}, changes: {changes}; sparsity {params.prune.sparsity:g}, {arguments.seeds} seeds."
    yield (
        f"{info['cpu']}, {torch.get_num_threads()} threads, {info.get('gpu', 'no GPU')}, torch {info['torch']}, "
        f"commit {info.get('git.commit', '?')[:10]}."
    )
    names = [name for name in [*METHODS, ROUNDS, *STUDENTS.values()] if any(r.method == name for r in rows)]
    yield from ("", "| method | test top-1, % | validation top-1, % | nonzero parameters | epochs | image passes | "
                "× EPSD | seconds | × EPSD |", "|---" * 9 + "|")  # fmt: skip
    base = {r.seed: r.curve[-1] for r in rows if r.method == REFERENCE}
    for name in names:
        own = [r for r in rows if r.method == name]
        cells = [name, spread([100 * r.test for r in own]), spread([100 * r.val for r in own])]
        cells += [f"{statistics.mean(r.parameters for r in own):,.0f}", str(own[0].epochs)]
        for unit, form in (("image_passes", "{:,.0f}"), ("seconds", "{:.1f}")):
            cells.append(spread([r.curve[-1][unit] for r in own], form))
            cells.append(f"{statistics.mean(r.curve[-1][unit] / base[r.seed][unit] for r in own):.2f}")
        yield "| " + " | ".join(cells) + " |"
    yield from ("", f"To the validation accuracy that {REFERENCE} ends with (its last epoch, the same seed):", "")
    yield "| method | seeds that reach it | at epoch | image passes | × EPSD | seconds | × EPSD |"
    yield "|---" * 7 + "|"
    goals = {r.seed: r.curve[-1]["val"] for r in rows if r.method == REFERENCE}
    for name in names:
        yield "| " + " | ".join(to_equal([r for r in rows if r.method == name], name, goals, rows)) + " |"


def reached(row: Row, goal: float) -> dict[str, float] | None:
    """The first epoch of the curve that is as good as `goal`."""
    return next((each for each in row.curve if each["val"] >= goal), None)


def to_equal(own: list[Row], name: str, goals: dict[int, float], rows: list[Row]) -> list[str]:
    """One line of the second table: means over the seeds that reach the goal, ratios to EPSD's own first reaching."""
    came = {r.seed: found for r in own if (found := reached(r, goals[r.seed]))}
    cells = [name, f"{len(came)} of {len(own)}"]
    if not came:
        return [*cells, *[""] * 5]
    first = {r.seed: reached(r, goals[r.seed]) or {} for r in rows if r.method == REFERENCE}
    cells.append(f"{statistics.mean(found['epoch'] for found in came.values()):.0f}")
    for unit, form in (("image_passes", "{:,.0f}"), ("seconds", "{:.1f}")):
        cells.append(form.format(statistics.mean(found[unit] for found in came.values())))
        cells.append(f"{statistics.mean(found[unit] / first[seed][unit] for seed, found in came.items()):.2f}")
    return cells


def picture(rows: list[Row], path: Path) -> None:
    """Test accuracy over seconds and image passes."""
    import pandas as pd

    from epsd.figures import study
    from epsd.figures import style as figures

    frame = pd.DataFrame([{"method": r.method, "seed": r.seed, "accuracy": r.test, **r.curve[-1]} for r in rows])
    figures.save(study.cost_against_accuracy(frame), path)


def main() -> None:
    """Train what is missing, print the tables."""
    parser = options(__doc__)
    of_preset(parser, "digits")
    parser.add_argument("--students", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per finished model")
    parser.add_argument("--figure", type=Path, help="file for the picture of accuracy against cost")
    arguments = parser.parse_args()
    rows = train(arguments)
    show(tables(arguments, rows), arguments.write)
    if arguments.figure:
        picture(rows, arguments.figure)


if __name__ == "__main__":
    main()
