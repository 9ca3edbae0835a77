"""Imported first in a stage's script: a queued experiment's copy of the project runs its own `src`.

An editable install points at the main folder, whose code may have changed since the experiment was queued. Here, and
not where the stage runs, as torch and the others are not yet imported: Python begins anew with the copy's code.
"""

import os
import sys
from pathlib import Path


def begin_anew() -> None:
    """Run the script that was started with the code of its folder, where that has its own."""
    here = Path.cwd() / "src"
    mine = here / "epsd" / "__init__.py"
    if os.environ.get("EPSD_COPY") == str(here) or not Path(sys.argv[0]).resolve().is_relative_to(Path.cwd()):
        return  # it does, or another program imports a stage
    if not mine.is_file() or mine.samefile(Path(__file__).parents[1] / mine.name):
        return
    path = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "EPSD_COPY": str(here)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


begin_anew()
