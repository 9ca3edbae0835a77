"""`python -m epsd.tuning`: the same as `epsd tune`."""

import sys

from epsd.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
