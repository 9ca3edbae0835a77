"""Starts the processes of one stage on this machine and ends them together: torchrun's part, in one clear line.

On several machines the user's own torchrun starts them; the stage takes part in either.
"""

import math
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from epsd.compute import distributed
from epsd.project.processes import Stopped, end, start, wait
from epsd.types import EpsdError

LOST = 75
"""Status of a process that ended because another one was gone."""

_LEAVE_WITHIN = 10.0
_OTHERS_FAIL_WITHIN = 3.0
"""Seconds for a clean end after SIGTERM; for the others to notice that one is gone."""


class LaunchError(EpsdError):
    """A process of the stage was killed, or the processes lost each other."""


def wanted(processes: int | str, device: str) -> int:
    """Processes to start here: the number itself, or one per GPU ("auto"), or one on the CPU."""
    if processes != "auto":
        return int(processes)
    return max(1, torch.cuda.device_count()) if distributed.on_gpus(device) else 1


def run(command: Sequence[str], processes: int) -> int:
    """Run `command` as so many processes of one group; the status of the first that failed, 0 where none did.

    When one fails, or a signal ends the wait, the others are ended too. Raises LaunchError where a process was
    killed and could not tell why itself.
    """
    with tempfile.TemporaryDirectory(prefix="epsd-", ignore_cleanup_errors=True) as folder:
        meeting = Path(folder) / "rendezvous"
        children = [start(command, _environment(rank, processes, meeting)) for rank in range(processes)]
        try:
            wait(children, math.inf, for_all=False)
            wait(children, _OTHERS_FAIL_WITHIN)  # after a failure, for those that end by themselves
            return _status([child.returncode for child in children])
        except Stopped as stop:
            if stop.signum == signal.SIGINT:  # of a terminal: the children have it too
                wait(children, _OTHERS_FAIL_WITHIN)
            raise
        finally:
            end(children, _LEAVE_WITHIN)


def _environment(rank: int, processes: int, meeting: Path) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    usual = {"OMP_NUM_THREADS": str(threads)}
    if sys.platform == "linux":
        usual["GLOO_SOCKET_IFNAME"] = "lo"  # they are on one machine, whose name need not resolve
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    mine = {name: str(value) for name, value in ranks.items()}
    return {**usual, **os.environ, **mine, distributed.RENDEZVOUS: str(meeting)}


def _status(statuses: list[int | None]) -> int:
    """Of all. None: of a process that has not ended."""
    ended = [status for status in statuses if status is not None]
    told = [status for status in ended if 0 < status < 128 and status != LOST]
    killed = [abs(status) % 128 for status in ended if status < 0 or status >= 128]
    if told:
        return told[0]
    if killed:
        raise LaunchError(f"one of the processes was ended by {signal.Signals(killed[0]).name}, so all of them end.")
    if LOST in ended:
        raise LaunchError("the processes lost each other: a connection between them broke.")
    return 0
