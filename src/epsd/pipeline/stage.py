"""Runs one stage of dvc.yaml: checks params.yaml, locks the folder, ends cleanly, says what happened in two lines.

`python stages/NAME.py --quiet` (or EPSD_QUIET=1): only the second line, no progress bar.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from epsd.compute import distributed
from epsd.compute.devices import Machine, crowded, open_machine, pick_device, pick_precision, seed_everything
from epsd.files.digests import digest_of
from epsd.pipeline import changes, launch, weights
from epsd.pipeline.describe import is_dense, method, stays
from epsd.project import artifacts, processes, progress
from epsd.project.params import DEFAULT_PATH, Params, load
from epsd.project.runtime import STATE, counted, hush, located, no_telemetry, note, quiet, say_once
from epsd.registry import ParamsError, choose, foreign
from epsd.tracking import tracking_uri
from epsd.types import EpsdError

if TYPE_CHECKING:
    from epsd.data.prepared import Prepared

Main = Callable[[Params, Machine], str | None]
"""The body of a stage. What it returns, if anything, is shown in the line that closes the stage."""

LOCK_PATIENCE = 10.0
"""Seconds to wait for the folder: a stage whose dvc was killed needs up to two to notice and leave."""

_KEPT = {"prepare": "artifacts/data and artifacts/voc"}
"""Where a stage leaves its results, where that is not artifacts/NAME."""

SHARED = ("prune", "train", "detect")
"""The stages that several processes can share; each has a `batch_size` in its section."""

_AGAIN = "`dvc repro` goes on from here."


def run_stage(name: str, main: Main) -> None:
    """Run `main(params, machine)` as the stage `name` of the pipeline in the current folder.

    A user's mistake, a full disk or an unwritable folder ends the process with one line on stderr and status 1; a
    signal with one line and 128 + its number; anything unexpected keeps its traceback.
    """
    no_telemetry()
    if name not in SHARED and distributed.told_rank():
        return  # torchrun started several, this stage needs one
    _arguments(name)
    progress.lines = distributed.told_rank() in (None, 0)
    started = time.monotonic()
    try:
        with processes.stops(), _watched(name):
            params = check(load(DEFAULT_PATH))
            count = _processes(name, params)
            if count > 1 and distributed.told() == 1:
                sys.exit(launch.run([sys.executable, *sys.orig_argv[1:]], count))
            machine = _joined(params, count)
            with _folder_lock(name) if distributed.is_main() else contextlib.nullcontext():
                if not quiet():
                    several = f" in {count} processes" if count > 1 else ""
                    _say(f"{name}: {describe(params, name)}, on {machine.device.type}{several}")
                    if count == 1 and machine.device.type == "cpu" and (line := crowded(machine.threads)):
                        note(f"{name}: {line}")
                seed_everything(params.seed)
                result = main(params, machine)
        seconds = time.monotonic() - started
        _say(f"{name}: {result or 'done'} ({seconds:.1f} s, in {_KEPT.get(name, f'artifacts/{name}')})")
        distributed.stop()
    except processes.Stopped as stop:
        _leave(name, f"{stop}. {_AGAIN}", stop.status)
    except Exception as error:
        line = processes.one_line(error)
        if line is None and distributed.first_to_fail():
            raise
        _leave(name, line or "", launch.LOST if distributed.lost(error) else 1)


def _processes(name: str, params: Params) -> int:
    """How many processes share this stage. ParallelError where they cannot."""
    told = distributed.told()
    count = told if told > 1 else launch.wanted(params.launch.processes, params.device)
    if name not in SHARED or count == 1:
        return 1
    distributed.check_batch(getattr(params, name).batch_size, f"{name}.batch_size", count)
    if told == 1:
        distributed.check_devices(params.device, count)
    return count


def _joined(params: Params, count: int) -> Machine:
    """The machine of this process, which from here on works with the others."""
    if count > 1:
        distributed.start(params.device, params.launch.sync_batchnorm)
    if not distributed.is_main():
        hush()
        warnings.simplefilter("ignore")
    return open_machine(params.device, params.threads, params.data.workers)


def _watched(name: str) -> contextlib.AbstractContextManager[None]:
    """Under DVC no stage outlives dvc, and one of several processes not the one that started it."""
    if "DVC_STAGE" not in os.environ and not processes.started():
        return contextlib.nullcontext()
    return processes.not_outliving("" if distributed.told_rank() else f"{name}: dvc is gone, stopping.")


def _say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


def _arguments(name: str) -> None:
    parser = argparse.ArgumentParser(description=f"The stage {name} of dvc.yaml, by the params.yaml of this folder.")
    parser.add_argument("--quiet", action="store_true", help="only the line with the result, no progress bar")
    if parser.parse_args().quiet:
        hush()


def check(params: Params) -> Params:
    """Check every chosen name and its settings, what this machine can compute in, and where runs go, so that a mistake
    fails before any work. Builds nothing heavy.

    Returns `params` without the settings that belong to another variant than the chosen one; a note names them.
    Raises ParamsError with all findings, each with the valid choices, in one line.
    """
    findings = []
    for where, registry, choice in _choices(params):
        try:
            choose(registry, choice, where)
        except ParamsError as error:
            findings.append(str(error))
    try:
        device = pick_device(params.device)
        for section in ("prune", "train", "detect"):
            pick_precision(getattr(params, section).precision, device, f"{section}.precision")
        tracking_uri()
        if params.prune.rescale and params.start.weights is not None:
            raise ParamsError("prune.rescale: is for weights drawn by seed, not for those of start.weights: use false.")
        if params.prune.rescale and params.detect.beside == "dense":
            raise ParamsError("detect.beside: dense would begin with weights that prune.rescale changed: use random.")
    except EpsdError as error:
        findings.append(str(error))
    if findings:
        raise ParamsError(" ".join(findings))
    return _own_settings(params)


def _own_settings(params: Params) -> Params:
    for where, registry, choice in _choices(params):
        if others := foreign(registry, choice):
            say_once(f"{where}: left out, as not of {choice['name']}: {', '.join(others)}.")
            kept = {key: value for key, value in choice.items() if key not in others}
            section, _, key = where.partition(".")
            whole = getattr(params, section).model_copy(update={key: kept}) if key else kept
            params = params.model_copy(update={section: whole})
    return params


def _choices(params: Params) -> Iterator[tuple[str, Mapping[str, type[Any]], Mapping[str, Any]]]:
    """(dotted key, registry, choice) of every choice in params.yaml."""
    from epsd.architectures import ARCHITECTURES
    from epsd.datasets import DATASETS, DEVKITS
    from epsd.detectors import DETECTORS
    from epsd.objectives import OBJECTIVES
    from epsd.scores import SCORES

    yield "dataset", DATASETS, params.dataset
    yield "architecture", ARCHITECTURES, params.architecture
    yield "objective", OBJECTIVES, params.objective
    yield "prune.score", SCORES, params.prune.score
    yield "voc", DEVKITS, params.voc
    yield "detect.detector", DETECTORS, params.detect.detector


def images_read(params: Params) -> dict[Path, str]:
    """The folders and archives that params.yaml has images read from -> digest of what `prepare` made of them."""
    from epsd.datasets import DATASETS, DEVKITS

    dataset, devkit = choose(DATASETS, params.dataset, "dataset"), choose(DEVKITS, params.voc, "voc")
    made = {artifacts.DATA_INDEX: dataset, artifacts.VOC_INDEX: devkit}
    return {
        located(place): digest
        for index, variant in made.items()
        for place in (getattr(variant, "root", None), getattr(variant, "labels", None))
        if place and (digest := _digest(index))
    }


def check_start(params: Params) -> None:
    """That the weights which prune and detect begin with can be had, before any work. Raises ArtifactError by key."""
    for key, wanted in {"start.weights": params.start.weights, "detect.backbone": params.detect.backbone}.items():
        if wanted is not None:
            weights.start_of(wanted, key)


def check_training(params: Params, data: "Prepared") -> None:
    """What `train` would refuse, before prune works for it. Raises MaskError (train.freeze), TrainingError."""
    from epsd.architectures import built
    from epsd.training.groups import Freeze
    from epsd.training.result import check_judged

    check_judged(params.train, data.sizes["validation"] > 0)
    if params.train.freeze:
        with torch.random.fork_rng(devices=[]):
            model = built(params.architecture, data.num_classes, data.image_shape)
        Freeze(model, params.train.freeze, params.train.freeze_epochs)


def start_read(params: Params) -> dict[str, str]:
    """The weights that prune began with -> digest of what it made of them."""
    if params.start.weights is None or not artifacts.INITIAL.is_file():
        return {}
    return {params.start.weights: digest_of(artifacts.INITIAL)}


def _digest(index: Path) -> str | None:
    """Of what was made; None where that is missing or damaged, so that DVC makes it anew."""
    with contextlib.suppress(EpsdError, KeyError):
        return str(artifacts.read_json(index)["digest"])
    return None


def warn_of_detection(params: Params, model: nn.Module) -> None:
    """Say now, not after the training, that this network cannot carry a detector, or has too few stages to freeze."""
    from epsd.architectures import ARCHITECTURES

    if params.voc["name"] == "none":
        return
    with torch.random.fork_rng(devices=[]):
        try:
            nodes = choose(ARCHITECTURES, params.architecture, "architecture").feature_nodes(model)
        except EpsdError as error:
            note(f"detect will not run: {error} `dvc repro evaluate` runs all but that stage.")
            return
    if (frozen := params.detect.frozen_stages) > len(nodes):
        note(f"detect will not run: detect.frozen_stages is {frozen}, the network has {len(nodes)}.")


def describe(params: Params, name: str) -> str:
    """What the stage does and on what data, in a few words."""
    data, scenes, network = params.data_title, params.scenes_title, params.architecture["name"]
    objective, sparsity = params.objective["name"], f"sparsity {params.prune.sparsity:g}"
    if params.prune.structure == "channels":
        sparsity = stays(params.prune) + (f", {sparsity}" if params.prune.sparsity else "")
    removed = "stays dense" if is_dense(params) else f"to {sparsity} by {method(params)} under {objective}"
    if params.start.mask == "keep":
        removed, sparsity = f"keeps the mask of {params.start.weights}", "its own sparsity"
    epochs = "" if params.detect.epochs == "auto" else f", {counted(params.detect.epochs, 'epoch')}"
    doing = {
        "prepare": f"reading {data}, and {scenes} for detection",
        "prune": f"{network} on {data} {removed}",
        "train": f"{network} at {sparsity} on {data} by {objective}, {counted(params.train.epochs, 'epoch')}",
        "evaluate": f"{network} on the test images of {data}",
        "detect": f"{params.detect.detector['name']} around {network} on {scenes}{epochs}",
    }
    if scenes == "none":
        doing |= {"prepare": f"reading {data}", "detect": "nothing to detect"}
    return f"{doing.get(name, f'{network} on {data}')}, seed {params.seed}"


def _leave(name: str, line: str, status: int) -> None:
    """End with one line, which of several processes only one tells: the first, or the one that started them."""
    told_elsewhere = processes.started() and (status >= 128 or status == launch.LOST)
    if line and not told_elsewhere and distributed.first_to_fail():
        note(f"{name}: {line}")
    if distributed.world() > 1:  # others may wait for this process, and its exit for them
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def _folder_lock(name: str) -> Iterator[None]:
    """One stage at a time per folder. A queued experiment runs in its own copy, so it may run beside others."""
    from filelock import FileLock, Timeout

    folder = Path(STATE)
    holder = folder / "stage.pid"
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / "stage.lock")
    try:
        lock.acquire(timeout=LOCK_PATIENCE)
    except Timeout:
        raise EpsdError(
            f"another stage is running in {Path.cwd()} ({_read(holder)}). Wait for it, or run in another folder."
        ) from None
    try:
        with artifacts.writing(holder):
            holder.write_text(f"{name}, PID {os.getpid()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8")
    return "PID unknown"


def reread(params: Params) -> int:
    """Have DVC run `prepare` again where the images that it read have changed since, and `prune` where the weights have
    that it began with; its status.
    """
    found = {
        "prepare": changes.changed(images_read(params)),
        "prune": changes.changed(start_read(params), weights.content_of),
    }
    status = 0
    for name, roots in found.items():
        if roots and not status:
            note(f"{name}: changed since the last reading, so it is read again: {', '.join(map(str, roots))}")
            status = subprocess.run([sys.executable, "-m", "dvc", "repro", "-s", "-f", name], check=False).returncode
    return status
