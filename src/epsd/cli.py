"""`epsd ...`: what make, dvc and mlflow do not cover. Thin: each command calls one module, imported when it is run."""

import argparse
import sys
from collections.abc import Callable, Sequence

Command = Callable[[argparse.Namespace], None]


def preset(arguments: argparse.Namespace) -> None:
    """List, show or apply a preset."""
    from epsd import presets

    if arguments.list or arguments.name is None:
        for name in presets.names():
            print(f"{name:24}{presets.summary(name)}")
    elif arguments.apply:
        copy = presets.apply(arguments.name)
        print(f"params.yaml is now the preset '{arguments.name}'." + (f" What was there: {copy}" if copy else ""))
        print("Next: dvc repro")
    else:
        print(presets.find(arguments.name).read_text(encoding="utf-8"), end="")


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    top = argparse.ArgumentParser(prog="epsd", description="Early pruning with self-distillation.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("preset", help="parameter files for the field's benchmarks: list, show, apply")
    one.add_argument("name", nargs="?", metavar="NAME", help="the preset to show or apply")
    one.add_argument("--list", action="store_true", help="one line for each (also without NAME)")
    one.add_argument("--apply", action="store_true", help="make it the current params.yaml; a copy is kept")
    one.set_defaults(command=preset)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. A user's mistake ends with one line on stderr and status 1 (2: unknown arguments)."""
    arguments = parser().parse_args(argv)
    from epsd.types import EpsdError  # after the usage has been dealt with: it brings torch

    command: Command = arguments.command
    try:
        command(arguments)
    except EpsdError as error:
        print(f"epsd: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `epsd preset NAME | head`
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
