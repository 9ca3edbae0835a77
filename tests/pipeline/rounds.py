"""Every stage, one after another, in this process and folder: `python rounds.py STAGES_FOLDER STAGE ...`."""

import runpy
import sys
from pathlib import Path

from epsd.compute.devices import determinism, open_machine, seed_everything
from epsd.project.params import load
from epsd.project.runtime import hush

if __name__ == "__main__":
    hush()
    determinism()
    params = load()
    for name in sys.argv[2:]:
        seed_everything(params.seed)
        runpy.run_path(str(Path(sys.argv[1]) / f"{name}.py"))["main"](params, open_machine("cpu", 1))
