"""One life of a process: how it is asked to stop, whom it does not outlive, those that it starts, its last line."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from epsd.project.runtime import note
from epsd.types import EpsdError

Child = subprocess.Popen[str]

STARTER = "EPSD_STARTER"
"""Set in the processes that `start` begins: the PID of the one that waits for them."""

WATCH_EVERY = 0.5
LEAVE_WITHIN = 1.0
"""Seconds between two looks at the ancestors; seconds for a clean end before the hard one."""

_LOOK_EVERY = 0.05
_A_MOMENT = 0.01
"""Seconds between two looks at children; seconds after which a stop that was dropped comes again."""

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHELLS = {"sh", "dash", "bash", "zsh", "fish", "ksh", "tcsh", "csh", "ash", "busybox"}
_USER_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST}


# --- asked to stop --------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """A signal asked the process to end. No `Exception`: it passes every `except Exception` on its way out."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.status = 128 + signum

    def __str__(self) -> str:
        return "interrupted" if self.signum == signal.SIGINT else f"stopped by {signal.Signals(self.signum).name}"


@contextlib.contextmanager
def stops() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP leave the block as `Stopped`, through its `finally` blocks, where not ignored so far.

    Once: further ones do not disturb the way out, but for SIGINT, with which a person insists. Python prints and drops
    what is raised while a destructor or the callback of a weak reference happens to run, and the request would be
    gone; here the signal comes once more, a moment later. For the main thread.
    """
    owner, asked, later = os.getpid(), threading.Event(), list[threading.Timer]()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker has no story to finish
            os._exit(128 + signum)
        if signum == signal.SIGINT or not asked.is_set():
            asked.set()
            raise Stopped(signum)

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, Stopped):
            asked.clear()
            later.append(threading.Timer(_A_MOMENT, os.kill, (owner, unraisable.exc_value.signum)))
            later[-1].start()
        else:
            hook(unraisable)

    heard = [number for number in _ASKING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
    finally:
        for timer in later:
            timer.cancel()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Hold back SIGINT, SIGTERM and SIGHUP until the block is done; a second one gets through at once.

    For what must not be left half-way, such as a database's transaction: an exception that a signal's handler raises
    inside it would leave its lock with a connection that nobody has any more. Outside the main thread, where no
    handler runs, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        if len(came) > 1:
            before[signal.Signals(number)](number, frame)

    before = {number: handler for number in _ASKING if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if len(came) == 1:
            before[signal.Signals(came[0][0])](*came[0])


# --- who lives ------------------------------------------------------------------------------------------------------


def identity() -> dict[str, Any]:
    """This process, as others can look it up: the start time tells it from a later one with its number."""
    import psutil

    return {"pid": os.getpid(), "pid.started": psutil.Process().create_time()}


def gone(pid: int, started: float | None = None) -> bool:
    """Whether the process of this number (and start) has ended.

    A zombie has: where no init reaps, it would stand for its process for ever.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        other = started is not None and abs(process.create_time() - started) > 2
        return bool(other or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def started() -> bool:
    """True in a process that `start` began."""
    return STARTER in os.environ


@contextlib.contextmanager
def not_outliving(last_words: str = "", leave_within: float = LEAVE_WITHIN) -> Iterator[None]:
    """End this process soon after the one that started it is gone: nobody may train on unseen.

    Two nets: the kernel's signal on the death of the direct parent (Linux), and a thread that looks at every ancestor
    up to the first that is no shell, because a shell between them outlives a killed dvc. SIGTERM comes first, the hard
    end `leave_within` seconds later, as a long operation in C holds signals back.
    """
    parent = int(os.environ.get(STARTER, os.getppid()))
    ancestors, done = _ancestors(), threading.Event()
    _ask_kernel()

    def watch() -> None:
        while os.getppid() == parent and not any(gone(*ancestor) for ancestor in ancestors):
            if done.wait(WATCH_EVERY):
                return
        with contextlib.suppress(OSError):  # the terminal may be gone as well
            if last_words:
                note(last_words)
        os.kill(os.getpid(), signal.SIGTERM)
        if not done.wait(leave_within):
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _ancestors() -> list[tuple[int, float]]:
    """The parent, and its parents as long as they are shells, each with its start."""
    import psutil

    found = []
    for process in psutil.Process().parents():
        found.append((process.pid, process.create_time()))
        if process.name().lstrip("-") not in _SHELLS:
            break
    return found


def _ask_kernel() -> None:
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


# --- those that it starts -------------------------------------------------------------------------------------------


def start(command: Sequence[str], environment: Mapping[str, str], job: Any = None) -> Child:
    """Begin a process that can tell who waits for it; with a `job`, which it reads as JSON from stdin.

    One with a job has a session of its own: a terminal's Ctrl-C comes to the one that started it alone.
    """
    mine = {**environment, STARTER: str(os.getpid())}
    pipe = None if job is None else subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, env=mine, text=True, start_new_session=job is not None)
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError), child.stdin:
            json.dump(job, child.stdin)
    return child


def wait(children: Sequence[Child], seconds: float, *, for_all: bool = True) -> None:
    """Until all have ended, or with `for_all` False until one has failed, but no longer."""
    deadline = time.monotonic() + seconds
    while None in (statuses := [child.poll() for child in children]) and time.monotonic() < deadline:
        if any(statuses) and not for_all:
            return
        time.sleep(_LOOK_EVERY)


def end(children: Sequence[Child], leave_within: float) -> None:
    """Ask them to end; insist after so many seconds, or when this process is asked to stop meanwhile."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    try:
        wait(children, leave_within)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()


# --- its last line --------------------------------------------------------------------------------------------------


_NO_ROOM = ("failed to map segment", "annot allocate memory")


def one_line(error: Exception) -> str | None:
    """The message for a mistake or shortage that the user can mend; None for anything else."""
    if isinstance(error, EpsdError):
        return str(error)
    if isinstance(error, ImportError | OSError) and any(words in str(error) for words in _NO_ROOM):
        return f"not enough memory ({' '.join(str(error).split())[:160]})."
    if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
        return f"{error.filename or 'file'}: {error.strerror}."
    if os.strerror(errno.ENOSPC) in str(error):  # libraries wrap the system's error in their own
        return f"{os.strerror(errno.ENOSPC)} ({error})."
    from epsd.compute import distributed  # not above: commands that train nothing start without torch
    from epsd.compute.shortage import is_shortage

    if is_shortage(error):
        return f"out of memory on the device: lower the batch size. ({str(error).split('. ')[0]})"
    return "another process is gone, or the connection to it." if distributed.lost(error) else None
