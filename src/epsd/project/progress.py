"""What a person sees while a stage works: one progress bar on a terminal, a line now and then elsewhere."""

import sys
from io import StringIO
from time import monotonic
from typing import TYPE_CHECKING, Self

from epsd.project.runtime import note, quiet, watched

if TYPE_CHECKING:
    from rich.table import Table


def drawn(table: "Table") -> str:
    """A table of rich as text: for the terminal that it is printed on, else plain and 120 characters wide."""
    from rich.console import Console

    text, tty = StringIO(), sys.stdout.isatty()
    Console(file=text, width=None if tty else 120, no_color=not tty, force_terminal=tty).print(table)
    return text.getvalue().rstrip()


EVERY = 30.0
"""Seconds between two lines where nobody watches a bar."""

lines = False
"""Whether such lines are written: by the process of a stage, not by the library, a search or a study."""


class Progress:
    """A bar over `total` steps with a text that says how it goes. Where stderr is no terminal a stage tells the same in
    a line from time to time, everything else nothing; nobody tells anything when quiet.

    `shown` False: silent in any case. `time_left`: estimated from the last half minute, so not for steps that take
    longer. `after`: epochs that were done before, which is said once.
    """

    def __init__(
        self, title: str, total: int, done: int = 0, *, time_left: bool = True, shown: bool = True, after: int = 0
    ) -> None:
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
        watching = shown and watched()
        self._bar = Bar(*columns, console=Console(stderr=True), disable=not watching, transient=True)
        self._task = self._bar.add_task(title, total=total, completed=done, text="")
        self._tells, self._first, self._now = shown and lines and not watching and not quiet(), done, done
        self._start = self._last = monotonic()
        if after and (watching or self._tells):
            note(f"{title}: going on after epoch {after}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, count: int = 1) -> None:
        """`count` more steps are done."""
        self._bar.advance(self._task, count)
        self._now += count
        if self._tells and monotonic() - self._last >= EVERY:
            self._line()

    def say(self, text: str) -> None:
        """Replace the text beside the bar."""
        self._bar.update(self._task, text=text)

    def _line(self) -> None:
        task, self._last = self._bar.tasks[self._task], monotonic()
        share = self._now / (task.total or 1)
        left = (self._last - self._start) * ((task.total or 0) - self._now) / max(1, self._now - self._first)
        note(", ".join(filter(None, [f"{task.description}: {share:.0%}", task.fields["text"], f"{left:,.0f} s left"])))
