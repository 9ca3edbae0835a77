"""Timing in turns: how often, in which order, by which clock; how figures are named."""

import itertools
import time

import pytest
import torch

from epsd.compute import timing

CPU = torch.device("cpu")


def test_forms_take_turns_each_after_a_pass_of_its_own_and_the_median_counts() -> None:
    calls: list[str] = []
    seconds = {"quick": iter([0.001, 0.009, 0.003]), "slow": iter([0.02, 0.01, 0.03])}
    now = [0.0]

    def passing(name: str) -> timing.Pass:
        def one() -> None:
            calls.append(name)
            if len(calls) % 2 == 0:  # the second of each pair is the timed one
                now[0] += next(seconds[name])

        return one

    found = timing.interleaved({name: passing(name) for name in seconds}, 3, clock=lambda: now[0])
    assert found.milliseconds == pytest.approx({"quick": 3, "slow": 20}) and found.turns == 3
    turns = [calls[start : start + 4] for start in range(0, 12, 4)]
    assert turns == [[a, a, b, b] for a, b in (("quick", "slow"), ("slow", "quick"), ("quick", "slow"))]


def test_passes_that_take_long_are_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()
    monkeypatch.setattr(timing, "ENOUGH", 0.0)
    assert timing.interleaved({"net": lambda: next(count)}, 50).turns == timing.LEAST
    assert next(count) == 2 * timing.LEAST
    assert timing.interleaved({"net": lambda: None}, 1).turns == 1


def test_one_thread_is_timed_by_what_it_had_of_a_processor() -> None:
    """Waiting, as for a processor that others have, does not count there; on several threads it does."""
    waiting = {"net": lambda: time.sleep(0.02)}
    busy = timing.interleaved(waiting, 3, timing.clock_for(1, CPU)).milliseconds["net"]
    wall = timing.interleaved(waiting, 3, timing.clock_for(2, CPU)).milliseconds["net"]
    assert busy < 10 < 20 <= wall
    assert timing.clock_for(1, torch.device("cuda")) is time.perf_counter


def test_torch_has_its_threads_back() -> None:
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_the_load_is_that_of_others() -> None:
    load = timing.others_load()
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        pass
    assert 0 <= load() <= 1


def test_names_of_figures_are_read_back() -> None:
    name = f"dense_onnx_{timing.setting(32, 1)}_ms"
    assert timing.parts(name) == ("dense_onnx", "batch32_one_thread", "ms")
    assert timing.parts("int8_batch1_all_threads_times_dense_torch") == (
        "int8",
        "batch1_all_threads",
        "times_dense_torch",
    )
    assert timing.parts("turns") is None
    assert timing.in_words("batch32_one_thread") == "32 images, one thread"
    assert timing.in_words(timing.setting(1, 4)) == "1 image, all threads"
