"""What a person asks before the work, and when something is odd: what is here, what works, what is stale and next."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from epsd.compute import timing
from epsd.compute.devices import devices
from epsd.files.digests import DamagedFile
from epsd.files.onnx_file import FP32, INT8, OnnxFile
from epsd.pipeline.place import onnx_at
from epsd.project import artifacts
from epsd.project.runtime import PACKAGES, brief, state_folder, versions
from epsd.tracking.addresses import shown, tracking_uri
from epsd.types import EpsdError

LITTLE = 2 * 2**30
"""Bytes of free space below which a set-up or a training may end for want of it: the packages alone take 6 GB."""


class Finding(NamedTuple):
    """`about` one thing, `said` in one line; `fine` unless somebody should look."""

    about: str
    said: str
    fine: bool = True


def findings() -> Iterator[Finding]:
    """One line for each thing, as they are found. Raises nothing: what fails is a finding."""
    checks: dict[str, Callable[[], Finding]] = {
        "versions": _versions, "device": _device, "space": _space, "runs": _runs, "forms": _forms, "stages": _stages,
    }  # fmt: skip
    for about, check in checks.items():
        try:
            yield check()
        except Exception as error:  # of torch, MLflow, DVC, the system: each is what the reader wants to know
            yield Finding(about, brief(error), fine=False)


def _versions() -> Finding:
    found = versions()
    return Finding("versions", ", ".join(f"{name} {found[name]}" for name in ("python", *PACKAGES)))


def _device() -> Finding:
    found = versions()
    names = [found.get("gpu", ""), f"{found['cpu']}, {found['threads']} threads"]
    return Finding("device", f"{', '.join(devices())}: {'; '.join(filter(None, names))}")


def _space() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    return Finding("space", f"{free / 2**30:,.1f} GiB free in {Path.cwd()}", fine=free >= LITTLE)


def _runs() -> Finding:
    uri = tracking_uri()
    waiting = len(list(state_folder("spool").glob("*.jsonl")))
    kept = f"; {waiting} kept in .epsd/spool until it can take them" if waiting else ""
    place = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not place.exists():
        return Finding("runs", f"{shown(uri)}: the first training makes it{kept}")
    from epsd.tracking.store import connection

    found = connection().search_experiments(max_results=1000)
    return Finding("runs", f"{shown(uri)}: answers, {len(found)} experiments{kept}", fine=not waiting)


def _forms() -> Finding:
    """The deployed network of this folder, timed now: medians of passes of one image on one thread, in turns."""
    onnx = onnx_at(artifacts.SERVED_MODEL)
    if onnx is None:
        return Finding("forms", "no deployed network here yet: dvc repro")
    files = {name: onnx.with_name(name) for name in (FP32, INT8) if onnx.with_name(name).is_file()}
    try:
        opened = {name: OnnxFile(path, threads=1) for name, path in files.items()}
    except DamagedFile as damage:
        return Finding("forms", f"{damage} dvc repro makes it again.", fine=False)
    image = np.zeros((1, *opened[FP32].card["image_shape"]), dtype=np.float32)
    timed = timing.interleaved({name: partial(file, image) for name, file in opened.items()}, 50)
    told = (
        f"{name} {timed.milliseconds[name]:.3g} ms ({path.stat().st_size / 1e3:,.0f} kB)"
        for name, path in files.items()
    )
    return Finding("forms", f"one image, one thread: {', '.join(told)}")


def _stages() -> Finding:
    stale = stale_stages()
    return Finding("stages", f"stale: {', '.join(stale)}. dvc repro runs them" if stale else "all up to date")


def stale_stages() -> list[str]:
    """Stages that `dvc repro` would run, in its order. Raises EpsdError with what DVC says."""
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EpsdError(f"dvc status: {brief(RuntimeError(done.stderr or done.stdout))}")
    changes: dict[str, list[object]] = json.loads(done.stdout or "{}")
    return [stage for stage, why in changes.items() if why != ["always changed"]]


# --- what is next ---------------------------------------------------------------------------------------------------


def next_steps() -> Iterator[tuple[str, str]]:
    """Commands that make sense in this folder as it is, each with what it does; the first is the one to take."""
    if not Path("dvc.yaml").is_file() or not Path("params.yaml").is_file():
        yield "cd PROJECT", "this folder has no dvc.yaml and params.yaml"
        return
    if not artifacts.DATA_INDEX.is_file():
        yield "dvc repro", "prepare, prune, train, evaluate, detect: nothing has run here yet"
        yield "epsd preset --list", "other parameters to begin with"
        return
    if stale := stale_stages():
        yield "dvc repro", f"stale: {', '.join(stale)}"
    if not artifacts.METRICS.is_file():
        return
    yield "make ui", "the recorded runs in the browser"
    yield "epsd predict IMAGE", "ask the network that was trained here"
    if artifacts.DETECTOR.is_file():
        yield "epsd detect IMAGE", "ask the detector about a picture"
    yield "epsd export --to FOLDER", "files to deploy, with a script that needs neither torch nor epsd"
    yield "epsd compare", "all recorded runs as a table"
    if Path("mlruns/optuna.journal").is_file():
        yield "epsd tune --apply", "write the best trial of the last search into params.yaml"
    else:
        yield "epsd tune", "search for better parameters"
