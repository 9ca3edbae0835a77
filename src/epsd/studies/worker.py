"""One of several processes of a study. Started by `epsd.studies.run`; reads its job (JSON) from stdin.

Takes groups of cells that nobody is at until none is left. What became of each cell is in the study's folder.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

from epsd.project.processes import Stopped, not_outliving, stops
from epsd.project.runtime import no_telemetry, note
from epsd.studies import plan
from epsd.studies.work import Place, Session, work
from epsd.types import EpsdError

LEAVE_WITHIN = 10.0
"""Seconds for a clean end after that of the study's main process: nobody trains on unseen after it."""


def main() -> int:
    """Run the job on stdin; the exit status says how it ended."""
    job = json.loads(sys.stdin.read())
    no_telemetry()
    warnings.simplefilter("ignore")  # of a cell's own choices: layers left without weights, and the like
    torch.set_num_threads(job["threads"])
    try:
        with stops(), not_outliving(leave_within=LEAVE_WITHIN):
            study = plan.load(Path(job["file"]))
            work(study, Place(study.study.name), Session(**job["session"]))
    except Stopped as stop:
        return stop.status
    except EpsdError as error:
        note(f"study: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
