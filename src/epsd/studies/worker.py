"""One of several processes of a study. Started by `epsd.studies.run`; reads its job (JSON) from stdin.

Takes groups of cells that nobody is at until none is left. What became of each cell is in the study's folder.
"""

import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from types import FrameType

import torch

from epsd.project.runtime import no_telemetry, note, stops_arrive
from epsd.studies import plan
from epsd.studies.run import INTERRUPTED, Stopped
from epsd.studies.work import Place, Session, work
from epsd.types import EpsdError

WATCH_EVERY = 1.0
"""Seconds between two looks at the study's main process: nobody trains on unseen after it."""


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Run the job on stdin; the exit status says how it ended."""
    job = json.loads(sys.stdin.read())
    no_telemetry()
    warnings.simplefilter("ignore")  # of a cell's own choices: layers left without weights, and the like
    torch.set_num_threads(job["threads"])
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_watch, args=(job["parent"],), daemon=True).start()
    try:
        with stops_arrive(Stopped):
            study = plan.load(Path(job["file"]))
            work(study, Place(study.study.name), Session(**job["session"]))
    except Stopped:
        return INTERRUPTED
    except EpsdError as error:
        note(f"study: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
