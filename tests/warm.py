"""Python processes that begin in a moment: forked from one that has imported what other people's packages take.

`warm.python()` stands where a test would say `sys.executable`: a command that runs a script or a module (`-m`) like
Python does. Its process imports `epsd` itself, so a copy of the project runs its own code; torch, MLflow and the others
are there already, which is most of what a stage of few images costs. Anything else (`-c`, a hash seed) becomes Python.

The command stays, with its PID and its parent, for the process that works: it hands signals on, ends as that one ends,
and that one is killed with it. Whoever asks for a parent's PID there is told the command's. The working process is the
leader of a session of its own: a test that signals a whole group of processes wants `sys.executable`.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import filelock

PLACE = "WARM_PYTHON"
"""The environment's name for the folder of command and socket, which all workers of a session share."""

_IDLE = 600.0
"""Seconds without work after which the process that forks ends: whoever would have ended it is gone."""

PACKAGES = """
    torch torch._dynamo torch.distributed torch.export torch.onnx torchvision torchvision.models torchvision.ops
    torchvision.transforms.v2 numpy pandas scipy.stats sklearn.datasets PIL.Image matplotlib.pyplot fontTools.ttLib
    mlflow mlflow.pyfunc mlflow.pytorch mlflow.onnx mlflow.models mlflow.tracking.client
    mlflow.store.tracking.sqlalchemy_store mlflow.store.model_registry.sqlalchemy_store optuna optuna.storages.journal
    onnx onnxscript onnxscript.optimizer onnxscript.rewriter rich.progress rich.table pydantic ruamel.yaml
    safetensors.torch psutil requests plotly torch_pruning faster_coco_eval dvc.cli dvc.repo
"""
"""Not onnxruntime: it starts a thread, which a forked process has not."""

CLIENT = '''#!{python} -SI
"""Runs a script or a module in a process forked from `tests/warm.py`; hands signals on and ends as it ends."""
import json, os, signal, socket, sys

if sys.argv[1:2] in ([], ["-c"]) or (sys.argv[1][0] == "-" and sys.argv[1] != "-m") or "PYTHONHASHSEED" in os.environ:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
asking = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
heard = [number for number in asking if signal.getsignal(number) is not signal.SIG_IGN]
signal.pthread_sigmask(signal.SIG_BLOCK, asking)
link = socket.socket(socket.AF_UNIX)
try:
    link.connect({address!r})
except OSError:  # it has ended
    signal.pthread_sigmask(signal.SIG_UNBLOCK, asking)
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
told = {{"pid": os.getpid(), "arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd(),
        "ignored": [number for number in asking if number not in heard]}}
socket.send_fds(link, [b"."], [0, 1, 2])
answers = link.makefile("rw")
print(json.dumps(told), file=answers, flush=True)
pid = int(answers.readline())
for number in heard:
    signal.signal(number, lambda number, frame: os.kill(pid, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, asking)
status = int(answers.readline() or 1)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
'''


def python() -> str:
    """The command. Where processes are no matter of fork alone it is Python itself."""
    if not sys.platform.startswith("linux"):
        return sys.executable
    folder = Path(os.environ[PLACE])
    command, address = folder / "python", folder / "socket"
    with filelock.FileLock(folder / "lock"):
        if not command.exists():
            _start(folder, address)
            command.write_text(CLIENT.format(python=sys.executable, address=str(address)))
            command.chmod(0o755)
    return str(command)


def _start(folder: Path, address: Path) -> None:
    """Begin the process that forks, and wait until it listens. It ends soon after `folder` is gone."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, __file__, str(address)], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log,
        stderr=log, start_new_session=True,
    )  # fmt: skip
    while not address.exists():
        assert server.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)


# --- the process that forks -----------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Fork a process for everyone who asks. Returns in the forked ones only."""
    for name in PACKAGES.split():
        with contextlib.suppress(ImportError):  # an optional one
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    woken.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    working: dict[int, socket.socket] = {}
    looking = selectors.DefaultSelector()
    for one in (listener, woken):
        looking.register(one, selectors.EVENT_READ)
    last = time.monotonic()
    while Path(address).exists() and (working or time.monotonic() - last < _IDLE):
        for key, _ in looking.select(1):
            if key.fileobj is woken:
                with contextlib.suppress(BlockingIOError):
                    woken.recv(1024)
            elif key.fileobj is listener:
                link, _ = listener.accept()
                request, streams = _asked(link)
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    for one in (listener, wake, woken, link, *working.values()):
                        one.close()
                    looking.close()
                    return _become(request, streams)
                link.sendall(b"%d\n" % pid)
                for stream in streams:
                    os.close(stream)
                working[pid], last = link, time.monotonic()
                looking.register(link, selectors.EVENT_READ, pid)
            elif key.data in working:  # whoever asked is gone
                looking.unregister(key.fileobj)
                working.pop(key.data).close()
                os.kill(key.data, signal.SIGKILL)
        _tell(working, looking)
    for pid in working:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _asked(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    _, streams, _, _ = socket.recv_fds(link, 1, 3)
    with link.makefile("r") as lines:
        return json.loads(lines.readline()), streams


def _tell(working: dict[int, socket.socket], looking: selectors.BaseSelector) -> None:
    """Of those that have ended, how."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if (link := working.pop(ended[0], None)) is not None:
                with contextlib.suppress(OSError):
                    link.sendall(b"%d\n" % os.waitstatus_to_exitcode(ended[1]))
                looking.unregister(link)
                link.close()


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Make this process what Python would have started as."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    before, mine = str(Path(__file__).parent), request["environment"].get("PYTHONPATH", "")
    sys.path[:] = [*filter(None, mine.split(os.pathsep)), *(path for path in sys.path if path != before)]
    here = Path(request["environment"][PLACE]) / "python" if PLACE in request["environment"] else None
    sys.executable = str(here) if here is not None and here.exists() else sys.executable
    sys.orig_argv = [sys.executable, *request["arguments"]]
    last = [1]

    def parent() -> int:
        """Of a killed command the last one: its process is being killed, too, and is no orphan that ends in order."""
        last[0] = _parent(request["pid"]) or last[0]
        return last[0]

    parent()
    os.getppid = parent
    _begin_anew(request["environment"])


def _parent(pid: int) -> int | None:
    """Of the process `pid`, None where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _begin_anew(environment: dict[str, str]) -> None:
    """What a process of its own would have found for itself: random states, and threads."""
    import numpy
    import torch

    random.seed()
    numpy.random.seed()
    torch.seed()
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1))


def run(arguments: list[str]) -> None:
    """As `python SCRIPT ...` or `python -m MODULE ...`."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _end(status: int) -> None:
    """As Python ends, but for taking every module apart: they are another process's."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
    try:
        run(sys.orig_argv[1:])
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        _end(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        _end(1)
    _end(0)
