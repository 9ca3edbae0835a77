"""What a person sees while a stage works: one progress bar on a terminal, nothing per step elsewhere."""

import sys
from io import StringIO
from typing import TYPE_CHECKING, Self

from epsd.project.runtime import watched

if TYPE_CHECKING:
    from rich.table import Table


def drawn(table: "Table") -> str:
    """A table of rich as text: for the terminal that it is printed on, else plain and 120 characters wide."""
    from rich.console import Console

    text, tty = StringIO(), sys.stdout.isatty()
    Console(file=text, width=None if tty else 120, no_color=not tty, force_terminal=tty).print(table)
    return text.getvalue().rstrip()


class Progress:
    """A bar over `total` steps with a text that says how it goes. Silent when quiet or when stderr is no terminal.

    `shown` False: silent in any case. `time_left`: estimated from the last half minute, so not for steps that take
    longer.
    """

    def __init__(self, title: str, total: int, done: int = 0, *, time_left: bool = True, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *([TimeRemainingColumn()] if time_left else []),
            TextColumn("{task.fields[text]}"),
        )
        self._bar = Bar(*columns, console=Console(stderr=True), disable=not (shown and watched()), transient=True)
        self._task = self._bar.add_task(title, total=total, completed=done, text="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, count: int = 1) -> None:
        """`count` more steps are done."""
        self._bar.advance(self._task, count)

    def say(self, text: str) -> None:
        """Replace the text beside the bar."""
        self._bar.update(self._task, text=text)
