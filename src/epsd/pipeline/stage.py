"""Runs one stage of dvc.yaml: checks params.yaml, locks the folder, ends cleanly, says what happened in two lines.

`python stages/NAME.py --quiet` (or EPSD_QUIET=1): only the second line, no progress bar.

Also `python -m epsd.pipeline.stage`: check params.yaml and every name chosen in it, and do nothing else; with
`--reread`, have DVC run `prepare` again where the images that it read have changed since.
"""

import argparse
import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from epsd.compute import distributed
from epsd.compute.devices import Machine, open_machine, pick_device, pick_precision, seed_everything
from epsd.compute.shortage import is_shortage
from epsd.pipeline import changes, launch
from epsd.pipeline.describe import method
from epsd.project import artifacts
from epsd.project.params import DEFAULT_PATH, Params, load
from epsd.project.runtime import STATE, counted, hush, located, no_telemetry, note, quiet, stops_arrive
from epsd.registry import ParamsError, choose
from epsd.tracking import tracking_uri
from epsd.types import EpsdError

Main = Callable[[Params, Machine], str | None]
"""The body of a stage. What it returns, if anything, is shown in the line that closes the stage."""

LOCK_PATIENCE = 10.0
"""Seconds to wait for the folder: a stage whose dvc was killed needs up to two to notice and leave."""

WATCH_EVERY = 0.5
LEAVE_WITHIN = 1.0
"""Seconds between two looks at the ancestors; seconds for a clean end before the hard one."""

_KEPT = {"prepare": "artifacts/data and artifacts/voc"}
"""Where a stage leaves its results, where that is not artifacts/NAME."""

SHARED = ("prune", "train", "detect")
"""The stages that several processes can share; each has a `batch_size` in its section."""

_AGAIN = "`dvc repro` goes on from here."
_SHELLS = {"sh", "dash", "bash", "zsh", "fish", "ksh", "tcsh", "csh", "ash", "busybox"}
_USER_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST}


class Terminated(BaseException):
    """A signal asked the process to end. No `Exception`: it passes every `except Exception` on its way out."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def run_stage(name: str, main: Main) -> None:
    """Run `main(params, machine)` as the stage `name` of the pipeline in the current folder.

    A user's mistake, a full disk or an unwritable folder ends the process with one line on stderr and status 1; a
    signal with one line and 128 + its number; anything unexpected keeps its traceback.
    """
    _use_this_copy()
    no_telemetry()
    if name not in SHARED and distributed.told_rank():
        return  # torchrun started several, this stage needs one
    _arguments(name)
    started = time.monotonic()
    try:
        with _signals(), _orphan_watch(name):
            params = load(DEFAULT_PATH)
            check(params)
            processes = _processes(name, params)
            if processes > 1 and distributed.told() == 1:
                sys.exit(launch.run([sys.executable, *sys.orig_argv[1:]], processes))
            machine = _joined(params, processes)
            with _folder_lock(name) if distributed.is_main() else contextlib.nullcontext():
                if not quiet():
                    _say(f"{name}: {describe(params, name)}, on {machine.device.type}{_times(processes)}")
                seed_everything(params.seed)
                result = main(params, machine)
        seconds = time.monotonic() - started
        _say(f"{name}: {result or 'done'} ({seconds:.1f} s, in {_KEPT.get(name, f'artifacts/{name}')})")
        distributed.stop()
    except KeyboardInterrupt:
        _leave(name, f"interrupted. {_AGAIN}", 130)
    except Terminated as stop:
        _leave(name, f"stopped by {signal.Signals(stop.signum).name}. {_AGAIN}", 128 + stop.signum)
    except Exception as error:
        line = one_line(error)
        if line is None and distributed.first_to_fail():
            raise
        _leave(name, line or "", launch.LOST if distributed.lost(error) else 1)


def _processes(name: str, params: Params) -> int:
    """How many processes share this stage. ParallelError where they cannot."""
    told = distributed.told()
    processes = told if told > 1 else launch.wanted(params.launch.processes, params.device)
    if name not in SHARED or processes == 1:
        return 1
    distributed.check_batch(getattr(params, name).batch_size, f"{name}.batch_size", processes)
    if told == 1:
        distributed.check_devices(params.device, processes)
    return processes


def _joined(params: Params, processes: int) -> Machine:
    """The machine of this process, which from here on works with the others."""
    if processes > 1:
        distributed.start(params.device, params.launch.sync_batchnorm)
    if not distributed.is_main():
        hush()
        warnings.simplefilter("ignore")
    return open_machine(params.device, params.threads, params.data.workers)


def _times(processes: int) -> str:
    return f" in {processes} processes" if processes > 1 else ""


def _say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


def _arguments(name: str) -> None:
    parser = argparse.ArgumentParser(description=f"The stage {name} of dvc.yaml, by the params.yaml of this folder.")
    parser.add_argument("--quiet", action="store_true", help="only the line with the result, no progress bar")
    if parser.parse_args().quiet:
        hush()


def _use_this_copy() -> None:
    """In a queued experiment's copy, run the copy's own `src`, not the one that the environment has installed.

    An editable install points at the main folder, whose code may have changed since the experiment was queued.
    """
    here = Path.cwd() / "src"
    mine = here / "epsd" / "pipeline" / "stage.py"
    if not mine.is_file() or mine.samefile(__file__) or os.environ.get("EPSD_COPY") == str(here):
        return
    path = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "EPSD_COPY": str(here)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def check(params: Params) -> None:
    """Check every chosen name and its settings, what this machine can compute in, and where runs go, so that a mistake
    fails before any work. Builds nothing heavy.

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
    except EpsdError as error:
        findings.append(str(error))
    if findings:
        raise ParamsError(" ".join(findings))


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
        located(variant.root): digest
        for index, variant in made.items()
        if hasattr(variant, "root") and (digest := _digest(index))
    }


def _digest(index: Path) -> str | None:
    """Of what was made; None where that is missing or damaged, so that DVC makes it anew."""
    with contextlib.suppress(EpsdError, KeyError):
        return str(artifacts.read_json(index)["digest"])
    return None


def warn_of_detection(params: Params, model: nn.Module) -> None:
    """Say now, not after the training, that this network cannot carry a detector, or has too few stages to freeze."""
    from epsd.architectures import ARCHITECTURES

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
    data, scenes, network = params.dataset["name"], params.voc["name"], params.architecture["name"]
    objective, sparsity = params.objective["name"], f"sparsity {params.prune.sparsity:g}"
    if params.prune.structure == "channels":
        sparsity = f"{params.prune.macs:.1%} of its multiply-adds" + (f", {sparsity}" if params.prune.sparsity else "")
    removed = f"to {sparsity} by {method(params)} under {objective}" if method(params) != "dense" else "stays dense"
    train_epochs, detect_epochs = (counted(section.epochs, "epoch") for section in (params.train, params.detect))
    doing = {
        "prepare": f"reading {data}, and {scenes} for detection",
        "prune": f"{network} on {data} {removed}",
        "train": f"{network} at {sparsity} on {data} by {objective}, {train_epochs}",
        "evaluate": f"{network} on the test images of {data}",
        "detect": f"{params.detect.detector['name']} around {network} on {scenes}, {detect_epochs}",
    }
    return f"{doing.get(name, f'{network} on {data}')}, seed {params.seed}"


def one_line(error: Exception) -> str | None:
    """The message for a mistake or shortage that the user can mend; None for anything else."""
    if isinstance(error, EpsdError):
        return str(error)
    if is_shortage(error):
        return f"out of memory on the device: lower the batch size. ({str(error).split('. ')[0]})"
    if distributed.lost(error):
        return "another process is gone, or the connection to it."
    if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
        return f"{error.filename or 'file'}: {error.strerror}."
    if os.strerror(errno.ENOSPC) in str(error):  # libraries wrap the system's error in their own
        return f"{os.strerror(errno.ENOSPC)} ({error})."
    return None


def _leave(name: str, line: str, status: int) -> None:
    """End with one line, which of several processes only one tells: the first, or the one that started them."""
    told_elsewhere = launch.launched() and (status >= 128 or status == launch.LOST)
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
        holder.write_text(f"{name}, PID {os.getpid()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8")
    return "PID unknown"


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP leave through the `finally` blocks, once; further ones do not disturb the way out."""
    owner, seen = os.getpid(), threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker has no story to finish
            os._exit(128 + signum)
        if not seen.is_set():
            seen.set()
            raise Terminated(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with stops_arrive(KeyboardInterrupt, Terminated):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _orphan_watch(name: str) -> Iterator[None]:
    """Under DVC, end this process soon after dvc or the shell between is gone: nobody may train on unseen.

    One of several processes watches the one that started it in the same way.

    Two nets: the kernel's signal on the death of the direct parent (Linux), and a thread that looks at every
    ancestor up to dvc, because a shell between them outlives a killed dvc.
    """
    if "DVC_STAGE" not in os.environ and not launch.launched():
        yield
        return
    ancestors = _ancestors()
    _ask_kernel()
    done = threading.Event()
    threading.Thread(target=_watch, args=(name, ancestors, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _ancestors() -> list[Any]:
    """The parent, and its parents as long as they are shells: the last one is dvc."""
    import psutil

    found = []
    for process in psutil.Process().parents():
        found.append(process)
        if process.name().lstrip("-") not in _SHELLS:
            break
    return found


def _ask_kernel() -> None:
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


def _alive(process: Any) -> bool:
    """A zombie is dead: where no init reaps, it would stand for its process for ever."""
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _watch(name: str, ancestors: list[Any], done: threading.Event) -> None:
    parent = os.getppid()
    while not done.wait(WATCH_EVERY):
        if os.getppid() == parent and all(_alive(process) for process in ancestors):
            continue
        with contextlib.suppress(OSError):  # the terminal may be gone as well
            if not distributed.told_rank():
                note(f"{name}: dvc is gone, stopping.")
        os.kill(os.getpid(), signal.SIGTERM)
        if not done.wait(LEAVE_WITHIN):
            os._exit(128 + signal.SIGTERM)
        return


def _check_only() -> int:
    parser = argparse.ArgumentParser(description="Check params.yaml and every name chosen in it.")
    parser.add_argument("--reread", action="store_true", help="run prepare again where its images have changed")
    reread = parser.parse_args().reread
    try:
        params = load(DEFAULT_PATH)
        check(params)
        found = changes.changed(images_read(params)) if reread else []
    except EpsdError as error:
        note(str(error))
        return 1
    if not found:
        return 0
    note(f"prepare: changed since the last reading, so it is read again: {', '.join(map(str, found))}")
    return subprocess.run([sys.executable, "-m", "dvc", "repro", "-s", "-f", "prepare"], check=False).returncode


if __name__ == "__main__":
    sys.exit(_check_only())
