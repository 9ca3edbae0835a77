"""How long a pass takes, in figures that one can believe: forms take turns, medians, threads and load told."""

import contextlib
import copy
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

    from epsd.compute.devices import Machine

Clock = Callable[[], float]
"""Seconds."""


def clock_for(threads: int, device: "torch.device") -> Clock:
    """What passes on so many threads, some of them on `device`, are timed by.

    One thread: by the time that this process had a processor, which is what a pass takes where nobody else wants it; on
    a busy machine the clock on the wall would tell of the others. Threads that wait for each other or for a GPU: that.
    """
    return time.process_time if threads == 1 and device.type == "cpu" else time.perf_counter


Pass = Callable[[], object]
"""One forward pass, done when it returns."""

ENOUGH = 2.0
"""Seconds of passes after which fewer turns than asked for are enough, but never fewer than LEAST."""
LEAST = 3


_NAME = re.compile(r"(?P<form>\w+)_(?P<setting>batch\d+_(?:one_thread|all_threads))_(?P<what>ms|times_\w+)")
"""How a figure is named: `onnx_batch1_one_thread_ms`, `onnx_batch1_one_thread_times_dense_torch`."""


def setting(batch: int, threads: int) -> str:
    """The middle part of a figure's name."""
    return f"batch{batch}_{'one_thread' if threads == 1 else 'all_threads'}"


def parts(name: str) -> tuple[str, str, str] | None:
    """Form, setting and what of a figure's name; None for another name."""
    found = _NAME.fullmatch(name)
    return None if found is None else (found["form"], found["setting"], found["what"])


def in_words(setting: str) -> str:
    """`batch32_one_thread` is "32 images, one thread"."""
    batch, _, threads = setting.removeprefix("batch").partition("_")
    return f"{batch} image{'s' * (batch != '1')}, {threads.replace('_', ' ')}"


class Timing(NamedTuple):
    """`milliseconds`: the median by form. `turns`: passes of each that it is the median of."""

    milliseconds: dict[str, float]
    turns: int


def interleaved(passes: Mapping[str, Pass], repeats: int, clock: Clock = time.perf_counter) -> Timing:
    """Time one pass of every form, in turns, so that a busy moment of the machine hits all of them alike.

    A pass that is not timed goes before each that is: it warms the caches, and gives the threads of the form before
    time to come to rest. Every turn begins with another form, so that none keeps step with what else runs.
    """
    times: dict[str, list[float]] = {name: [] for name in passes}
    begun, names = time.perf_counter(), list(passes)
    for turn in range(repeats):
        if turn >= LEAST and time.perf_counter() - begun > ENOUGH:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            passes[name]()
            start = clock()
            passes[name]()
            times[name].append(clock() - start)
    turns = min(map(len, times.values()), default=0)
    return Timing({name: 1000 * statistics.median(seconds) for name, seconds in times.items()}, turns)


def sweep(
    passes: Callable[[int, int], Mapping[str, Pass]], batches: Sequence[int], machine: "Machine", repeats: int
) -> dict[str, float]:
    """Every form on one thread and on all those of `machine`, in batches of each size; {} where `repeats` is 0.

    passes : threads and batch size -> a pass of every form. A form whose name begins with `dense_` is a twin: the
    figures say how many times as fast as each twin the other forms are.

    Also in the figures: `turns`, the fewest that any median is of; `threads`; and `load_of_others` in [0, 1].
    """
    if not repeats:
        return {}
    load, figures, turns = others_load(), dict[str, float](), []
    for count in dict.fromkeys((1, machine.threads)):
        for batch in batches:
            with threads(count):
                found = interleaved(passes(count, batch), repeats, clock_for(count, machine.device))
            figures |= _named(found.milliseconds, setting(batch, count))
            turns.append(found.turns)
    return figures | {"turns": min(turns), "threads": machine.threads, "load_of_others": load()}


def _named(milliseconds: Mapping[str, float], setting: str) -> dict[str, float]:
    figures = {f"{form}_{setting}_ms": value for form, value in milliseconds.items()}
    twins = [form for form in milliseconds if form.startswith("dense_")]
    for form in milliseconds.keys() - set(twins):
        figures |= {f"{form}_{setting}_times_{twin}": milliseconds[twin] / milliseconds[form] for twin in twins}
    return dict(sorted(figures.items()))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on so many threads meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def others_load() -> Callable[[], float]:
    """Call now; call what comes back later: the share of all processors' time that other processes took in between."""
    import psutil

    def spent() -> tuple[float, float, float]:
        every, mine = psutil.cpu_times(), psutil.Process().cpu_times()
        return sum(every[:8]), every.idle + getattr(every, "iowait", 0.0), mine.user + mine.system

    before = spent()

    def load() -> float:
        everything, idle, mine = (now - then for now, then in zip(spent(), before, strict=True))
        return min(1.0, max(0.0, (everything - idle - mine) / everything)) if everything > 0 else 0.0

    return load


def in_torch(module: "nn.Module", images: Any) -> Pass:
    """A pass of `module` in evaluation mode, where it is, without gradients, done when its device has done it.

    `images`: what it takes, a tensor or a list of tensors.
    """
    import torch

    device = next(module.parameters()).device
    given = images.to(device) if isinstance(images, torch.Tensor) else [image.to(device) for image in images]
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, int)
    module.eval()

    @torch.inference_mode()
    def one() -> None:
        module(given)
        wait()

    return one


def filled(model: "nn.Module") -> "nn.Module":
    """A copy of `model` in which small numbers stand for the zeros of its prunable weights: its dense twin."""
    import torch

    from epsd.masks import prunable

    dense = copy.deepcopy(model)
    with torch.no_grad():
        for weight in prunable(dense).values():
            weight[weight == 0] = 0.01
    return dense
