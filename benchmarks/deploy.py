"""How fast networks are in the forms in which they are deployed, and what asking them costs.

    python benchmarks/deploy.py [--networks digits cifar ...] [--variants dense zeros half quarter] [--batches 1 32]
        [--repeats 20] [--parts speed channels asking] [--write FILE]

speed : torch eager (fp32, the layout that is fastest there), ONNX fp32 and ONNX int8 of bare networks with random
    weights, on one thread and on all; medians of passes in turns (`epsd.compute.timing`).
channels : ResNet-18 cut to a quarter of its multiply-adds before training, beside the dense one: a step of its
    training, its ONNX files, a Faster R-CNN around it; and every `round_to`. On one thread.
asking : `epsd predict` of one image, and `mlflow models serve` until it answers: seconds and most memory, of a model
    that torch runs (before) and of the ONNX file (after).

A row is one line of NETWORKS or VARIANTS: a network by the architecture of a preset, or what is made of it.
"""

import argparse
import copy
import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from epsd.architectures import ARCHITECTURES, built
from epsd.compute import timing
from epsd.compute.devices import Machine, pick_memory_format
from epsd.compute.speed import lay_out_
from epsd.detectors import DETECTORS, Picture
from epsd.evaluation.deploy import export, quantise
from epsd.files.onnx_file import CARD, FP32, INT8, OnnxFile
from epsd.masks import prunable
from epsd.project.params import load
from epsd.project.runtime import versions
from epsd.pruning import widths
from epsd.pruning.channels import ChannelError, Structure, cut
from epsd.registry import choose, settings_of
from page import options, show


class Network(NamedTuple):
    """Of the presets that share it. `architecture`: as in params.yaml. `shape`: (C, H, W)."""

    presets: str
    architecture: dict[str, Any]
    classes: int
    shape: tuple[int, int, int]


def _resnet(depth: int, **settings: Any) -> dict[str, Any]:
    return {"name": "resnet", "depth": depth, **settings}


NETWORKS = {
    "digits": Network("digits", _resnet(8), 10, (1, 8, 8)),
    "cifar-quick": Network("cifar10-quick", _resnet(20), 10, (3, 32, 32)),
    "cifar-resnet18": Network("cifar10- and cifar100-resnet18", _resnet(18, stem="cifar"), 10, (3, 32, 32)),
    "cifar-vgg19": Network("cifar10- and cifar100-vgg19", {"name": "vgg", "depth": 19}, 10, (3, 32, 32)),
    "tiny-imagenet": Network("tiny-imagenet-resnet18", _resnet(18, stem="tiny_imagenet"), 200, (3, 64, 64)),
    "cub": Network("cub200-resnet18", _resnet(18, stem="imagenet"), 200, (3, 224, 224)),
    "imagenet": Network("imagenet-resnet50", _resnet(50, stem="imagenet"), 1000, (3, 224, 224)),
}


def _dense(network: Network) -> nn.Module:
    return built(network.architecture, network.classes, network.shape)


def _zeros(network: Network) -> nn.Module:
    """95 % of the weights are zero, wherever they are."""
    model = _dense(network)
    with torch.no_grad():
        for weight in prunable(model).values():
            weight[torch.rand_like(weight) < 0.95] = 0
    return model


def _narrow(network: Network, width: float) -> nn.Module:
    """Every layer so much narrower."""
    return _dense(network._replace(architecture={**network.architecture, "width": width}))


VARIANTS: dict[str, tuple[str, Callable[[Network], nn.Module]]] = {
    "dense": ("dense", _dense),
    "zeros": ("95 % zeros", _zeros),
    "half": ("half as wide", partial(_narrow, width=0.5)),
    "quarter": ("a quarter as wide", partial(_narrow, width=0.25)),
}
"""Name -> what a reader is told, and how it is made of a network."""
NARROW = ("half", "quarter")


# --- speed ----------------------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace) -> Iterator[str]:
    """One table per batch size and number of threads."""
    measured: dict[tuple[str, str], dict[str, float]] = {}
    for name, variant in itertools.product(arguments.networks, arguments.variants):
        if variant in NARROW and "width" not in settings_of(ARCHITECTURES[NETWORKS[name].architecture["name"]]):
            continue  # a network whose author gave it no width
        measured[name, variant] = timed(NETWORKS[name], VARIANTS[variant][1], arguments)
        print(f"{name}, {variant}: {measured[name, variant]}", file=sys.stderr, flush=True)
    settings = list(dict.fromkeys(part[1] for row in measured.values() for key in row if (part := timing.parts(key))))
    for setting in settings:
        yield f"### {timing.in_words(setting)}, ms"
        yield ""
        yield "| network | | eager | ONNX fp32 | ONNX int8 | fp32, times eager | int8, times eager | MB, fp32 / int8 |"
        yield "|---|---|---:|---:|---:|---:|---:|---:|"
        yield from (row(name, variant, figures, setting) for (name, variant), figures in measured.items())
        yield ""
    turns = min(figures["turns"] for figures in measured.values())
    load = max(figures["load_of_others"] for figures in measured.values())
    yield f"Medians of at least {turns:.0f} passes. Other processes had up to {load:.0%} of the machine meanwhile."
    yield ""


def row(name: str, variant: str, figures: Mapping[str, float], setting: str) -> str:
    """A line of the table."""
    eager, onnx, int8 = (figures[f"{form}_{setting}_ms"] for form in ("torch", "onnx", "int8"))
    sizes = " / ".join(f"{figures[size] / 1e6:.3g}" for size in ("onnx_bytes", "int8_bytes"))
    times = f"{eager / onnx:.2f} | {eager / int8:.2f}"
    return f"| {name} | {VARIANTS[variant][0]} | {eager:.3g} | {onnx:.3g} | {int8:.3g} | {times} | {sizes} |"


def timed(network: Network, make: Callable[[Network], nn.Module], arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds by form and setting, and bytes."""
    torch.manual_seed(0)
    model = make(network)
    with torch.no_grad():
        model(torch.randn(16, *network.shape))  # so that statistics are not those of a network at its start
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        files = {"onnx": Path(folder) / FP32, "int8": Path(folder) / INT8}
        export(model, torch.randn(2, *network.shape), ("batch",), files["onnx"], {CARD: "{}"})
        images = np.random.default_rng(0).standard_normal((32, *network.shape), dtype=np.float32)
        quantise(files["onnx"], files["int8"], images)
        lay_out_(model, pick_memory_format("auto", model, torch.device("cpu")))
        session = cache(OnnxFile)

        def passes(threads: int, batch: int) -> dict[str, timing.Pass]:
            given = np.random.default_rng(1).standard_normal((batch, *network.shape), dtype=np.float32)
            asked = {form: partial(session(file, threads), given) for form, file in files.items()}
            return {"torch": timing.in_torch(model, torch.from_numpy(given)), **asked}

        machine = Machine(threads=torch.get_num_threads())
        sizes = {f"{form}_bytes": float(file.stat().st_size) for form, file in files.items()}
        return sizes | timing.sweep(passes, arguments.batches, machine, arguments.repeats)


# --- channels -------------------------------------------------------------------------------------------------------


def channels(arguments: argparse.Namespace) -> Iterator[str]:
    """What a quarter of the multiply-adds takes, and the widths that `prune.round_to` offers."""
    share, network, repeats = arguments.macs, NETWORKS["cifar-resnet18"], arguments.repeats
    kinds: dict[str, tuple[str, Callable[[nn.Module, Path], timing.Pass]]] = {
        "step": ("training step, fp32, 32 images", lambda model, _: _step(model, network)),
        "fp32": ("ONNX fp32, 32 images", lambda model, folder: _asked(model, network, folder, FP32, 32)),
        "int8": ("ONNX int8, 32 images", lambda model, folder: _asked(model, network, folder, INT8, 32)),
        "fp32-1": ("ONNX fp32, 1 image", lambda model, folder: _asked(model, network, folder, FP32, 1)),
        "int8-1": ("ONNX int8, 1 image", lambda model, folder: _asked(model, network, folder, INT8, 1)),
        "detector": (
            "Faster R-CNN training step, 8 pictures of 64 px",
            lambda model, _: _detector(model, network, True),
        ),
        "found": ("Faster R-CNN answer in torch, 1 picture", lambda model, _: _detector(model, network, False)),
    }
    yield f"### ResNet-18, 32 px, {share:.0%} of the multiply-adds, ms"
    yield ""
    yield "| | dense | cut | times as fast |"
    yield "|---|---:|---:|---:|"
    with tempfile.TemporaryDirectory() as folder, timing.threads(1):
        found: dict[str, float] = {}
        forms = {"dense": _dense(network), "cut": _cut(network, share)}
        for kind, (words, make) in kinds.items():
            passes = {form: make(model, Path(folder) / form) for form, model in forms.items()}
            taken = timing.interleaved(passes, repeats, time.process_time).milliseconds
            found |= {f"{kind} {form}": value for form, value in taken.items()}
            yield f"| {words} | {taken['dense']:.3g} | {taken['cut']:.3g} | {taken['dense'] / taken['cut']:.2f} |"
        yield ""
        ratios = [f"{found[f'fp32{n} dense'] / found[f'int8{n} cut']:.1f} times ({words})" for n, words in _SIZES]
        yield f"ONNX int8 of the cut network against ONNX fp32 of the dense one: {', '.join(ratios)}."
        yield ""
        yield from _rounding(arguments, Path(folder))
    yield f"Medians of {timing.LEAST} to {repeats} passes in turns, of processor time, on one thread."
    yield ""


_SIZES = (("", "32 images"), ("-1", "1 image"))


def _rounding(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Times as fast as the dense network, by what widths are multiples of."""
    yield "### By `prune.round_to`, times as fast as the dense network: ONNX fp32 / int8 / training step, 32 images"
    yield ""
    yield f"| network | share | {' | '.join(map(str, arguments.round_to))} |"
    yield "|---|---:|" + "---:|" * len(arguments.round_to)
    repeats = arguments.repeats
    for name in ("cifar-quick", "cifar-resnet18"):
        for share in (0.5, arguments.macs):
            network, cells = NETWORKS[name], []
            dense = _dense(network)
            for round_to in arguments.round_to:
                try:
                    forms = {"dense": dense, "cut": _cut(network, share, round_to)}
                except ChannelError:
                    cells.append("too coarse")
                    continue
                places = {"dense": folder / f"{name} dense", "cut": folder / f"{name} {share} {round_to}"}
                cells.append(" / ".join(_times(forms, network, places, kind, repeats) for kind in (FP32, INT8, "")))
            yield f"| {name} | {share:.0%} | {' | '.join(cells)} |"
    yield ""


def _times(
    forms: Mapping[str, nn.Module], network: Network, places: Mapping[str, Path], kind: str, repeats: int
) -> str:
    """How many times as fast as the dense network the cut one is: as an ONNX file of that name, "" a training step."""
    passes = {
        form: _asked(model, network, places[form], kind, 32) if kind else _step(model, network)
        for form, model in forms.items()
    }
    taken = timing.interleaved(passes, repeats, time.process_time).milliseconds
    return f"{taken['dense'] / taken['cut']:.2f}"


def _cut(network: Network, share: float, round_to: int = 8) -> nn.Module:
    """By uniform widths; which channels stay makes nothing faster. Raises ChannelError: `round_to` is too coarse."""
    torch.manual_seed(0)
    model = _dense(network)
    structure = Structure(model, network.shape)
    lots = {name: torch.rand(group.size) for name, group in structure.groups.items()}
    return cut(model, network.shape, widths.chosen(structure, lots, macs=share, round_to=round_to))


def _step(model: nn.Module, network: Network, batch: int = 32) -> timing.Pass:
    """Forward, backward and update, laid out as `train` does it."""
    model = copy.deepcopy(model)
    lay_out_(model, layout := pick_memory_format("auto", model, torch.device("cpu")))
    images = torch.randn(batch, *network.shape).contiguous(memory_format=layout)
    labels, optimiser = torch.arange(batch) % network.classes, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def one() -> None:
        optimiser.zero_grad()
        loss: torch.Tensor = nn.functional.cross_entropy(model.train()(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return one


def _asked(model: nn.Module, network: Network, folder: Path, name: str, batch: int) -> timing.Pass:
    """The ONNX file of that form in `folder`, which is made where it is not there."""
    images = np.random.default_rng(0).standard_normal((32, *network.shape), dtype=np.float32)
    if not (folder / FP32).is_file():
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.train()(torch.randn(16, *network.shape))  # so that statistics are not those of a network at its start
        export(model.eval(), torch.randn(2, *network.shape), ("batch",), folder / FP32, {CARD: "{}"})
        quantise(folder / FP32, folder / INT8, images)
    return partial(OnnxFile(folder / name, threads=1), images[:batch])


def _detector(model: nn.Module, network: Network, training: bool) -> timing.Pass:
    """A step of training on eight pictures of 64 px with four boxes each, or an answer to one."""
    params = load(Path(__file__).parents[1] / "params.yaml")
    nodes = choose(ARCHITECTURES, network.architecture, "architecture").feature_nodes(model)
    build = choose(DETECTORS, params.detect.detector, "detect.detector")
    detector = build(copy.deepcopy(model), nodes, Picture(64, 64, [0.5] * 3, [0.25] * 3), 10)
    pictures = list(torch.rand(8 if training else 1, 3, 64, 64))
    if not training:
        return timing.in_torch(detector, pictures)
    corners = torch.tensor([[4.0, 4.0], [34.0, 6.0], [8.0, 36.0], [36.0, 38.0]])
    target = {"boxes": torch.cat([corners, corners + 20], 1), "labels": torch.tensor([1, 2, 3, 4])}
    optimiser = torch.optim.SGD(detector.parameters(), 1e-4, momentum=0.9)

    def one() -> None:
        optimiser.zero_grad()
        losses: dict[str, torch.Tensor] = detector.train()(pictures, [target] * len(pictures))
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return one


# --- asking ---------------------------------------------------------------------------------------------------------


def asking(arguments: argparse.Namespace) -> Iterator[str]:
    """Seconds and most memory of a process that is asked once, and of a server until it answers."""
    with tempfile.TemporaryDirectory() as folder:
        models = made(Path(folder))
        yield "| | seconds | of these the processor's | most memory, MiB |"
        yield "|---|---:|---:|---:|"
        for words, model in models.items():
            runs = [predict(Path(folder), model) for _ in range(arguments.repeats_of_asking)]
            yield told(f"`epsd predict photo.png`, {words}", runs)
        for words, model in models.items():
            if (model / "MLmodel").is_file():
                yield told(f"`mlflow models serve` until it answers, {words}", [serve(Path(folder), model)])
    yield ""


class Spent(NamedTuple):
    """Seconds on the clock, seconds of the processor, MiB."""

    clock: float
    processor: float
    memory: float


def told(words: str, runs: list[Spent]) -> str:
    """The quickest of some runs, which others disturbed least."""
    best = Spent(*(min(values) for values in zip(*runs, strict=True)))
    return f"| {words} | {best.clock:.2f} | {best.processor:.2f} | {best.memory:,.0f} |"


def made(folder: Path) -> dict[str, Path]:
    """The digits' network by the form in which it is kept; written as `evaluate` writes it."""
    from PIL import Image

    from epsd.evaluation.intake import Intake
    from epsd.evaluation.servable import Servable
    from epsd.files.onnx_file import SCRIPT
    from epsd.pipeline import deploy
    from epsd.project import artifacts
    from epsd.tracking import models

    network = NETWORKS["digits"]
    names = [str(digit) for digit in range(network.classes)]
    card = {"architecture": network.architecture, "num_classes": network.classes, "class_names": names}
    card |= {"image_shape": network.shape, "mean": [0.3], "std": [0.35]}
    model, weights = _dense(network).eval(), folder / "weights" / "model.safetensors"
    artifacts.save_model(model, weights, card)
    deploy.export(model, card, weights, folder / "onnx" / FP32)
    Image.new("L", (8, 8), 90).save(folder / "photo.png")
    images = np.zeros((2, *network.shape), dtype=np.float32)
    about = {"class_names": names, "card": json.dumps(card)}
    contents = models.Contents(images, images, network.classes, about, [], [], folder / "onnx", SCRIPT)
    module = Servable(model, Intake.of(card))
    models.write(folder / "after", module, contents)
    models.write(folder / "before", module, contents._replace(onnx=None))
    return {
        "torch, from weights": weights.parent,
        "torch, exported (before)": folder / "before",
        "ONNX (after)": folder / "after",
    }


def predict(folder: Path, model: Path) -> Spent:
    """One question. Its memory as the kernel tells at its end: `ru_maxrss` counts the process that started it, too."""
    told, asked = folder / "memory", ["predict", "--model", str(model), str(folder / "photo.png")]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", ASKED.format(told=str(told)), *asked], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"epsd {' '.join(asked)}: failed")
    return Spent(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, int(told.read_text()) / 1024)


ASKED = """
import atexit, runpy
def tell():
    with open("/proc/self/status") as status, open({told!r}, "w") as file:
        file.write(next(line for line in status if line.startswith("VmHWM:")).split()[1])
atexit.register(tell)
runpy.run_module("epsd.cli", run_name="__main__", alter_sys=True)
"""


def serve(folder: Path, model: Path) -> Spent:
    """A server, from its start to its first answer; the memory of all its processes then."""
    import psutil

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        answer(port, time.monotonic() + 120)
        seconds = time.perf_counter() - start
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        spent = [one.cpu_times() for one in family]
        memory = sum(one.memory_info().rss for one in family) / 2**20
        return Spent(seconds, sum(one.user + one.system for one in spent), memory)
    finally:
        for one in reversed(psutil.Process(server.pid).children(recursive=True)):
            one.kill()
        server.kill()
        server.wait()
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime >= before.ru_utime


def answer(port: int, deadline: float) -> None:
    """Ask until there is an answer."""
    body = json.dumps({"inputs": np.zeros((1, 1, 8, 8)).tolist()}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


PARTS = {"speed": speed, "channels": channels, "asking": asking}


def _said(arguments: argparse.Namespace) -> Iterator[str]:
    for part in arguments.parts:
        yield from (f"## {part}", "")
        yield from PARTS[part](arguments)


def main() -> None:
    """Print the tables line by line, and write them where asked."""
    parser = options(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["dense"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--repeats", type=int, default=20, help="passes of each form (fewer where they take long)")
    parser.add_argument("--macs", type=float, default=0.25, help="share that stays, of the part channels")
    parser.add_argument("--round-to", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--repeats-of-asking", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    found = versions()
    head = f"On {found['cpu']}, {torch.get_num_threads()} threads in all, torch {found['torch']}, "
    show(
        itertools.chain([f"{head}onnxruntime {found.get('onnxruntime', '?')}.", ""], _said(arguments)), arguments.write
    )


if __name__ == "__main__":
    main()
