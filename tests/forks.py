"""Processes that begin in a moment: they fork from one that has imported what takes seconds."""

import multiprocessing
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "epsd.compute.devices", "epsd.tracking.store"])


def in_processes(*calls: tuple[Any, ...]) -> list[int | None]:
    """Function and arguments of each, all at once; how they ended: 0, an exit status, the negative of a signal."""
    started = [FORKS.Process(target=target, args=arguments) for target, *arguments in calls]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]
