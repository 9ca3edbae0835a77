"""`python -m epsd.tracking [PORT]` prints the address of the runs in a local `mlflow ui`."""

import sys

from epsd.tracking import ui_address

if __name__ == "__main__":
    print(ui_address(*map(int, sys.argv[1:2])))
