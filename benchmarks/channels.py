"""Which networks can be cut before training, and what came of a study of narrow ones.

    python benchmarks/channels.py zoo [NAME ...] [--share 0.5]
    python benchmarks/channels.py study .epsd/studies/channels-digits [--write FILE]

zoo : every network is scored by the gates of EPSD (one step ahead), cut, and compared with the whole network whose
    removed channels are gated off; then it goes forward and backward.
study : accuracy, size and latency of the methods of presets/studies/channels-*.yaml, as far as they are trained.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from epsd.architectures import built
from epsd.comparison.statistics import Difference, corrected, difference, summarise
from epsd.compute import timing
from epsd.evaluation.deploy import export
from epsd.files.onnx_file import CARD, FP32, OnnxFile
from epsd.losses import supervised
from epsd.project.params import read_yaml
from epsd.project.runtime import versions
from epsd.pruning import widths
from epsd.pruning.channels import Structure, cut
from epsd.pruning.metagradients import mask_gradient
from epsd.pruning.scoring import scoring
from epsd.types import Batch, EpsdError

CLASSES = 10


class Subject(NamedTuple):
    """`choice`: as in params.yaml. `side`: pixels."""

    choice: dict[str, Any]
    side: int = 64


def _ours(depth: int, side: int = 32, **settings: Any) -> Subject:
    return Subject({"name": "resnet", "depth": depth, **settings}, side)


def _zoo(package: str, model: str, side: int = 64) -> Subject:
    return Subject({"name": f"{package}_zoo", "model": model}, side)


ZOO = {
    "resnet8": _ours(8),
    "resnet18": _ours(18, stem="cifar"),
    "resnet50": _ours(50, stem="tiny_imagenet", side=64),
    "resnet20, padding": _ours(20, shortcut="padding"),
    "vgg19": Subject({"name": "vgg", "depth": 19}, 32),
    **{name: _zoo("torchvision", name) for name in (
        "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "densenet121", "regnet_y_400mf",
        "resnext50_32x4d", "googlenet", "shufflenet_v2_x1_0",
    )},
    "vit_b_16": _zoo("torchvision", "vit_b_16", 224),
    **{name: _zoo("timm", name) for name in (
        "resnet26", "efficientnet_lite0", "convnext_atto", "mobilenetv4_conv_small", "nf_resnet50",
    )},
    "vit_tiny_patch16_224": _zoo("timm", "vit_tiny_patch16_224", 224),
}  # fmt: skip


class Found(NamedTuple):
    """Of one network: groups cut, what was left whole, share of the multiply-adds, |gated - cut| by mode, seconds.

    `normed`: groups over which a LayerNorm runs, so that the gated network is another one than the cut.
    """

    groups: int
    whole: str
    share: float
    difference: dict[str, float]
    normed: list[str]
    seconds: float


def examined(subject: Subject, share: float, images: int = 4) -> Found:
    """Score, cut and compare one network; then forward and backward. Raises EpsdError for one that cannot be cut."""
    torch.manual_seed(0)
    shape = (3, subject.side, subject.side)
    began, model = time.process_time(), steady(built(subject.choice, CLASSES, shape))
    structure = Structure(model, shape)
    kept = widths.chosen(structure, gates(model, structure, shape, images), macs=share)
    narrow = cut(model, shape, kept)
    normed = [name for name, group in structure.groups.items() if group.normed]
    plain = {name: kept[name] if name not in normed else torch.arange(structure.groups[name].size) for name in kept}
    pair = gated(model, structure, plain), narrow if not normed else cut(model, shape, plain)
    drawn = torch.randn(images, *shape)
    difference = {mode: apart(*pair, drawn, training=mode == "train") for mode in ("train", "eval")}
    narrow.train()(drawn).logsumexp(1).sum().backward()
    lost = [name for name, weight in narrow.named_parameters() if weight.grad is None]
    assert not lost, f"no gradient reaches {lost}"
    macs = structure.macs({name: len(channels) for name, channels in kept.items()}) / structure.macs(structure.dense())
    return Found(len(kept), structure.left_whole(), macs, difference, normed, time.process_time() - began)


def steady(model: nn.Module) -> nn.Module:
    """The same in every pass: nothing is dropped by lot; norms have statistics and scales of their own."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if "drop_prob" in vars(module) or type(module).__name__ == "StochasticDepth":
            vars(module).update(drop_prob=0.0, p=0.0)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    for weight in model.parameters():
        if weight.detach().eq(weight.detach().flatten()[0]).all():  # a head of zeros or a small scale hides what is cut
            nn.init.normal_(weight, 1.0, 0.1)
    return model


def gates(model: nn.Module, structure: Structure, shape: tuple[int, int, int], images: int) -> dict[str, Tensor]:
    """By EPSD's look-ahead of one step under cross entropy."""
    labels = torch.arange(images) % CLASSES
    drawn = [Batch(torch.randn(images, *shape), labels, torch.arange(images)) for _ in range(2)]
    with scoring(model):
        return structure.gates(mask_gradient(model, supervised, drawn, structure.consumers(), lr=0.01).gradient)


def gated(model: nn.Module, structure: Structure, kept: dict[str, Tensor]) -> nn.Module:
    """A copy whose consumers see nothing of the channels that go."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, group in structure.groups.items():
            open_ = torch.zeros(group.size).index_fill_(0, kept[name], 1.0)
            for part in group.seen:
                weight = copied.get_parameter(part.weight)
                runs = getattr(copied.get_submodule(part.weight.removesuffix(".weight")), "groups", 1)
                factor = torch.ones(weight.shape[part.dim] * (runs if part.dim == 1 else 1))
                factor[part.place] = open_[part.channel]
                if part.dim == 1:
                    weight.view(runs, -1, *weight.shape[1:]).mul_(factor.view(runs, 1, -1, *[1] * (weight.dim() - 2)))
                else:
                    weight.mul_(factor.view(-1, *[1] * (weight.dim() - 1)))
    return copied


def apart(whole: nn.Module, narrow: nn.Module, images: Tensor, *, training: bool) -> float:
    """Largest difference of logits in float64, relative to the largest logit (to 1 at least)."""
    with torch.no_grad():
        wanted, got = (copy.deepcopy(net).double().train(training)(images.double()) for net in (whole, narrow))
    return float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1))


def zoo(arguments: argparse.Namespace) -> Iterator[str]:
    """A line for each network."""
    yield f"| network | px | groups | share for {arguments.share:.0%} | gated - cut, train / eval | left out | s |"
    yield "|---|---:|---:|---:|---:|---|---:|"
    for name in arguments.names or ZOO:
        subject = ZOO[name]
        try:
            found = examined(subject, arguments.share)
        except EpsdError as error:
            yield f"| {name} | {subject.side} | | | | cannot be cut: {error} | |"
            continue
        left = [f"whole: {found.whole}"] if found.whole else []
        left += [f"{len(found.normed)} under a LayerNorm, cut but not compared"] if found.normed else []
        apart = " / ".join(f"{value:.0e}" for value in found.difference.values())
        yield (
            f"| {name} | {subject.side} | {found.groups} | {found.share:.1%} | {apart} | {'; '.join(left)} "
            f"| {found.seconds:.0f} |"
        )


# --- what a study found ---------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A method of the study: its finished models, as `epsd study` keeps them."""

    name: str
    results: list[dict[str, Any]]

    def top1(self) -> dict[int, float]:
        """By seed."""
        return {int(one["params"]["seed"]): one["metrics"]["test/top1"] for one in self.results}

    def mean(self, metric: str) -> float:
        """Over the seeds."""
        return statistics.fmean(one["metrics"][metric] for one in self.results)


STUDIES = Path(__file__).resolve().parent.parent / "presets" / "studies"


def rows(folder: Path) -> list[Row]:
    """In the order of the study file. Of two runs of a seed the later one counts."""
    kept = [json.loads(path.read_text())["result"] for path in (folder / "cells").glob("*.json")]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for result in sorted(kept, key=lambda result: result["began"]):
        found.setdefault(result["tags"]["variant"] or "dense", {})[result["params"]["seed"]] = result
    listed = [variant["name"] for variant in read_yaml(STUDIES / f"{folder.name}.yaml")["variants"]]
    return [Row(name, [of for _, of in sorted(found[name].items())]) for name in listed if name in found]


def milliseconds(table: list[Row], project: Path) -> dict[str, dict[int, float]]:
    """By row and number of images: the ONNX file of its first model, all rows in turns, on one thread."""
    with tempfile.TemporaryDirectory() as folder, timing.threads(1):
        for row in table:
            card = json.loads(
                (project / "mlruns" / row.results[0]["run_id"] / "artifacts/model/model.json").read_text()
            )
            shape = tuple(card["image_shape"])
            model = built(card["architecture"], card["num_classes"], shape, card.get("shapes")).eval()
            export(model, torch.randn(2, *shape), ("batch",), Path(folder) / row.name / FP32, {CARD: "{}"})
        files = {row.name: OnnxFile(Path(folder) / row.name / FP32, threads=1) for row in table}
        found: dict[str, dict[int, float]] = {name: {} for name in files}
        for batch in (1, 32):
            images = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
            passes = {name: partial(file, images) for name, file in files.items()}
            for name, taken in timing.interleaved(passes, 300, time.process_time).milliseconds.items():
                found[name][batch] = taken
    return found


def study(arguments: argparse.Namespace) -> Iterator[str]:
    """A table of a study such as presets/studies/channels-digits.yaml: dense, then methods at three shares each."""
    table = rows(arguments.folder)
    times = {} if arguments.untimed else milliseconds(table, arguments.folder.parents[2])
    dense = table[0]
    others = {row.name: table[place] for row in table if (place := _width_at(table, row)) >= 0}
    pairs = {name: difference(row.top1(), others[name].top1()) for row in table if (name := row.name) in others}
    tested = dict(zip(pairs, corrected(list(pairs.values())), strict=True))
    yield f"{sum(len(row.results) for row in table)} models. {_DEFINED}"
    yield ""
    heads = ("", "multiply-adds", "parameters not zero", "ONNX fp32, ms: 1 / 32 images", "seeds", "test top-1")
    yield f"| {' | '.join((*heads, 'minus its width row'))} |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for row in table:
        mean, deviation, count = summarise(list(row.top1().values()))
        spread = f" ± {deviation:.4f}" if count > 1 else ""
        share = row.mean("model/gflops_dense") / dense.mean("model/gflops_dense")
        taken = " / ".join(f"{value:.3g}" for value in times[row.name].values()) if times else ""
        yield (
            f"| {row.name} | {share:.1%} | {row.mean('model/parameters_nonzero'):,.0f} | {taken} "
            f"| {count} | {mean:.4f}{spread} | {shown(tested[row.name]) if row.name in tested else ''} |"
        )


_DEFINED = (
    "p: two-sided t-test paired over seeds, Holm-corrected over all differences of the table. Equal latency: zeros "
    "make nothing faster, so what is unstructured and as fast is the network of the author's width whose ONNX latency "
    "is nearest that of the uniform one, with half of its weights zero."
)


def _width_at(table: list[Row], row: Row) -> int:
    """The place of the author's width at the row's share; -1 for that row itself and for the dense network.

    Rows come by threes, the shares falling; the author's widths are the rows whose name is `width` and a number.
    """
    place = table.index(row)
    widths_ = [n for n, other in enumerate(table) if other.name.startswith("width ") and "zeros" not in other.name]
    return -1 if place == 0 or place in widths_ else widths_[(place - 1) % 3]


def shown(one: Difference) -> str:
    """`+0.0123 (p 0.012)`, p corrected."""
    return f"{one.by:+.4f}" if math.isnan(one.corrected) else f"{one.by:+.4f} (p {one.corrected:.3f})"


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {"zoo": zoo, "study": study}


def main() -> None:
    """Print the table line by line, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    of_zoo, of_study = parts.add_parser("zoo"), parts.add_parser("study")
    of_zoo.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ZOO)}; none is all")
    of_zoo.add_argument("--share", type=float, default=0.5)
    of_study.add_argument("folder", type=Path, help="state folder of a study, .epsd/studies/NAME")
    of_study.add_argument("--untimed", action="store_true", help="accuracy and size alone")
    for each in (of_zoo, of_study):
        each.add_argument("--write", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = versions()
    lines = [f"On {found['cpu']}, torch {found['torch']}, onnxruntime {found.get('onnxruntime', '?')}.", ""]
    for line in PARTS[arguments.part](arguments):
        print(line, flush=True)
        lines.append(line)
    if arguments.write:
        arguments.write.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
