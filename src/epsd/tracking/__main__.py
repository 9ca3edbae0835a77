"""`python -m epsd.tracking [PORT]` prints the address of the runs in a local `mlflow ui`.

Before it is started, as before `mlflow models serve`: a project that was moved is set right here.
"""

import sys

from epsd.project.runtime import note
from epsd.tracking import ui_address
from epsd.types import EpsdError

if __name__ == "__main__":
    try:
        print(ui_address(*map(int, sys.argv[1:2])))
    except EpsdError as error:
        note(str(error))
        sys.exit(1)
