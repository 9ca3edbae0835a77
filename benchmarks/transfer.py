"""Networks that begin with weights that exist beside the same from random weights: `docs/transfer.md` by numbers.

    python benchmarks/transfer.py finetune --out a.jsonl --write finetune-digits.md
    python benchmarks/transfer.py transfer --images cifar10.zip --out b.jsonl --write transfer-cifar10.md

`finetune`: per seed a dense network of the digits is trained by the preset `digits`, then pruned to 98 % of its
weights, or to a quarter of its multiply-adds, and fine-tuned by the preset `digits-finetune`; beside it the same from
random weights, by the same recipe and by that of `digits`. `transfer`: per seed a network is pruned (or not) and
trained on the first five classes of CIFAR-10 by the preset `cifar10-quick` with 500 images of each, then fine-tuned
under its mask on 60 images of each of the last five by `cifar10-transfer`; beside it the same network from random
weights; a ResNet-8 of half the width, 8 and 25 epochs. Validation chooses nothing; the test split is read once for
each model. Stops and goes on: a finished model is a line of `--out`.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from epsd.architectures import narrowed
from epsd.compute.devices import Machine, pick_device
from epsd.compute.seeds import mix
from epsd.data.prepared import Prepared
from epsd.datasets import DATASETS
from epsd.evaluation import evaluate as evaluation
from epsd.pipeline.prune import Pruned, pruned
from epsd.pipeline.train import card, trained
from epsd.preparing.write import prepare
from epsd.project import artifacts, presets
from epsd.project.params import Params, override, parse
from epsd.project.runtime import versions
from epsd.registry import choose

FIRST, LAST = ["airplane", "automobile", "bird", "cat", "deer"], ["dog", "frog", "horse", "ship", "truck"]
Changes = dict[str, Any]
DENSE: Changes = {"prune.sparsity": 0.0, "prune.score": {"name": "random"}}
NARROW: Changes = {"prune.rounds": 1, "prune.structure": "channels", "prune.sparsity": 0.0, "prune.macs": 0.25}
ONE: Changes = {"prune.rounds": 1}
ROUNDS: Changes = {"prune.rounds": 20}
MAGNITUDE: Changes = {**ONE, "prune.score": {"name": "magnitude"}}
RANDOM: Changes = {"start.weights": None, "start.mask": "new", "start.head": "auto"}
SMALL: Changes = {"architecture.depth": 8, "architecture.width": 0.5}


class Model(NamedTuple):
    """How one row comes about. `data`: which images.  `begins`: the row whose network it begins with."""

    preset: str
    data: str
    changes: Changes
    begins: str | None = None


class Row(NamedTuple):
    """One trained model. `zeros`: whether every weight that its mask removes is exactly zero."""

    method: str
    seed: int
    test: float
    parameters: int
    epochs: int
    zeros: bool


FINETUNE = {
    "dense, the champion": Model("digits", "digits", DENSE),
    "98 % off the champion": Model("digits-finetune", "digits", ONE, "dense, the champion"),
    "98 % off random weights, as long": Model("digits-finetune", "digits", ONE | RANDOM),
    "98 % off the champion, 20 rounds": Model("digits-finetune", "digits", ROUNDS, "dense, the champion"),
    "98 % off the champion, by magnitude": Model("digits-finetune", "digits", MAGNITUDE, "dense, the champion"),
    "98 % off random weights, 20 rounds, as long": Model("digits-finetune", "digits", ROUNDS | RANDOM),
    "98 % off random weights, digits' recipe": Model("digits", "digits", {"prune.sparsity": 0.98}),
    "25 % MACs of the champion": Model("digits-finetune", "digits", NARROW, "dense, the champion"),
    "25 % MACs of random weights, as long": Model("digits-finetune", "digits", NARROW | RANDOM),
    "25 % MACs of random weights, digits' recipe": Model("digits", "digits", NARROW),
}
PRETRAINED: Changes = {**SMALL, "train.epochs": 8}
TUNED: Changes = {**SMALL, "train.epochs": 25}
TRANSFER = {
    "dense, on the first five": Model("cifar10-quick", "first", PRETRAINED | DENSE),
    "EPSD, on the first five": Model("cifar10-quick", "first", PRETRAINED),
    "transferred dense": Model("cifar10-transfer", "last", TUNED, "dense, on the first five"),
    "transferred EPSD": Model("cifar10-transfer", "last", TUNED, "EPSD, on the first five"),
    "EPSD from scratch": Model("cifar10-transfer", "last", TUNED | RANDOM),
    "dense from scratch": Model("cifar10-transfer", "last", TUNED | RANDOM | DENSE),
    "EPSD from scratch, lr 0.1": Model("cifar10-transfer", "last", TUNED | RANDOM | {"train.lr": 0.1}),
}


def params_of(model: Model, seed: int, images: Path | None, begins: Path | None) -> Params:
    """The preset of a row, for one seed; of `begins` the weights."""
    tree = presets.read(model.preset)
    if images is not None:
        tree["dataset"] = {"name": "image_folder", "root": str(images.resolve()), "size": 32}
    weights = {} if begins is None else {"start.weights": str(begins)}
    for name, value in {"seed": seed, "prune.compare": False, **weights, **model.changes}.items():
        override(tree, name, value)
    return parse(tree)


def datasets(kind: str, images: Path | None, folder: Path) -> dict[str, Prepared]:
    """By name, split by seed 0 for all models."""
    if kind == "finetune":
        wanted: dict[str, Changes] = {"digits": {}}
    else:
        wanted = {"first": {"classes": FIRST, "limit": 500}, "last": {"classes": LAST, "limit": 60}}
    found = {}
    for name, settings in wanted.items():
        params = params_of(Model("digits" if images is None else "cifar10-transfer", name, RANDOM), 0, images, None)
        whole = prepare(
            choose(DATASETS, params.dataset, "dataset")(), folder / name, seed=0, validation=0.1, **settings
        )
        assert whole["sizes"]["test"]
        found[name] = Prepared.load(folder / name, Machine(pick_device(params.device)))
    return found


def made(params: Params, data: Prepared, place: Path) -> tuple[Pruned, Row]:
    """Prune, train, test; the network stays in `place`, as a project leaves it."""
    found = pruned(params, data)
    trained(params, data, found.model, found.mask, on_epoch=lambda record: None)
    test = data.batches("test", batch_size=params.evaluate.batch_size, seed=mix(params.seed, "test"))
    metrics = evaluation.evaluate(found.model, test).metrics
    weights = dict(found.model.named_parameters())
    zeros = all(not weights[name][~keep].any() for name, keep in found.mask.keep.items())
    shapes = narrowed(found.model, params.architecture, data.num_classes, data.image_shape)
    described = card(params, data, found.mask, found.model) | ({"shapes": shapes} if shapes else {})
    (place / "prune").mkdir(parents=True)
    found.mask.save(place / "prune" / artifacts.MASK.name)
    artifacts.save_model(found.model, place / "train" / artifacts.MODEL.name, described)
    nonzero = sum(int((p != 0).sum()) for p in found.model.parameters())
    row = Row("", params.seed, metrics["top1"], nonzero, params.train.epochs, zeros)
    return found, row


def rows_of(arguments: argparse.Namespace) -> list[Row]:
    """Every model that is not there yet, seed by seed."""
    out, models = arguments.out, FINETUNE if arguments.kind == "finetune" else TRANSFER
    rows = [Row(**json.loads(line)) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row.method, row.seed) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        data = datasets(arguments.kind, arguments.images, Path(folder) / "data")
        for seed in range(arguments.seeds):
            places = {name: Path(folder) / f"{seed}" / str(number) for number, name in enumerate(models)}
            sources = {model.begins for model in models.values()}
            for name, model in models.items():
                if (name, seed) in done and (name not in sources or all((n, seed) in done for n in models)):
                    continue
                begins = None if model.begins is None else places[model.begins]
                row = made(params_of(model, seed, arguments.images, begins), data[model.data], places[name])[1]
                if (name, seed) in done:
                    continue
                rows.append(row._replace(method=name))
                with out.open("a") as file:
                    file.write(json.dumps(rows[-1]._asdict()) + "\n")
                print(f"{name}, seed {seed}: {row.test:.4f}", flush=True)
    return rows


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Mean ± standard deviation."""
    return form.format(statistics.mean(values)) + (f" ± {form.format(statistics.stdev(values))}" if values[1:] else "")


def table(arguments: argparse.Namespace, rows: list[Row]) -> Iterator[str]:
    """Markdown."""
    info = versions()
    about = {
        "finetune": "Digits",
        "transfer": "CIFAR-10 as JPEG, a ResNet-8 of half the width: the first five classes, then the last five",
    }
    yield f"{about[arguments.kind]}; {arguments.seeds} seeds, one split; mean ± standard deviation."
    yield f"{info['cpu']}, {torch.get_num_threads()} threads, torch {info['torch']}."
    yield from (
        "",
        "| network | test top-1, % | nonzero parameters | epochs | removed weights exactly 0 |",
        "|---" * 5 + "|",
    )
    for name in FINETUNE if arguments.kind == "finetune" else TRANSFER:
        own = [row for row in rows if row.method == name]
        zeros = "yes" if all(row.zeros for row in own) else "NO"
        cells = [name, spread([100 * row.test for row in own]), f"{statistics.mean(r.parameters for r in own):,.0f}"]
        yield "| " + " | ".join([*cells, str(own[0].epochs), zeros]) + " |"


def main() -> None:
    """Train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["finetune", "transfer"])
    parser.add_argument("--images", type=Path, help="of `transfer`: CIFAR-10 as a folder or archive of images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="one line of JSON for each model")
    parser.add_argument("--write", type=Path, help="the table, in Markdown")
    arguments = parser.parse_args()
    if arguments.kind == "transfer" and arguments.images is None:
        parser.error("transfer needs --images")
    text = "\n".join(table(arguments, rows_of(arguments))) + "\n"
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
