import random

import numpy as np
import pytest
import torch

from epsd.compute import devices
from epsd.compute.seeds import mix
from epsd.types import EpsdError


def draws() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seed_everything_repeats_all_three():
    devices.seed_everything(7)
    first = draws()
    devices.seed_everything(7)
    assert draws() == first
    devices.seed_everything(8)
    assert not set(draws()) & set(first)


def test_seed_everything_takes_what_mix_gives():
    devices.seed_everything(mix(0, "train"))
    devices.seed_everything(2**63 - 1)


def test_auto_takes_the_best_device_there_is(monkeypatch):
    monkeypatch.setattr(devices, "devices", lambda: ["mps", "cpu"])
    assert devices.pick_device("auto") == torch.device("mps")
    assert devices.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "CPU", ""])
def test_unknown_device_lists_those_of_the_machine(name):
    with pytest.raises(EpsdError, match=r"device: '.*' is not on this machine. Valid here: auto, .*cpu"):
        devices.pick_device(name)


def test_precision():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert devices.pick_precision("fp32", cpu) is None
    assert devices.pick_precision("fp32", cuda) is None
    assert devices.pick_precision("bf16", cpu) is torch.bfloat16
    assert devices.pick_precision("fp16", cuda) is torch.float16


def test_precision_auto_follows_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert devices.pick_precision("auto", torch.device("cuda")) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert devices.pick_precision("auto", torch.device("cuda")) is None


@pytest.mark.parametrize("avx, amx", [(False, False), (True, False), (False, True)])
def test_precision_auto_follows_the_processor(monkeypatch, avx, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert devices.pick_precision("auto", torch.device("cpu")) is (torch.bfloat16 if avx or amx else None)
    assert devices.pick_precision("auto", torch.device("mps")) is None


def test_memory_format():
    def pick(name):
        return devices.pick_memory_format(name, torch.nn.Conv2d(4, 8, 3, stride=2), torch.device("cpu"))

    assert pick("auto") is pick("channels_last") is torch.channels_last
    assert pick("contiguous") is torch.contiguous_format
    with pytest.raises(EpsdError, match=r"memory_format: unknown 'nhwc'. Valid: auto, channels_last, contiguous"):
        pick("nhwc")


def test_networks_whose_gradients_would_be_written_past_their_memory_are_laid_out_contiguous():
    cpu, narrow, wide = torch.device("cpu"), torch.nn.Conv2d(4, 8, 1, stride=2), torch.nn.Conv2d(16, 8, 1, stride=2)
    net = torch.nn.Sequential(wide, torch.nn.Sequential(narrow))
    assert devices.breaks_channels_last(net) == "1.0"
    assert devices.pick_memory_format("auto", net, cpu) is torch.contiguous_format
    assert devices.pick_memory_format("auto", wide, cpu) is torch.channels_last
    assert devices.pick_memory_format("channels_last", net, torch.device("cuda")) is torch.channels_last
    with pytest.raises(EpsdError, match=r"memory of '1.0', a 1x1 convolution .* Use auto or contiguous"):
        devices.pick_memory_format("channels_last", net, cpu)


@pytest.mark.parametrize("name, device", [("fp16", "cpu"), ("int8", "cpu"), ("half", "cuda")])
def test_precision_that_is_not_there(name, device):
    with pytest.raises(EpsdError, match="precision"):
        devices.pick_precision(name, torch.device(device))


def test_determinism_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    devices.determinism()
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        devices.determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("busy", "threads", "line"),
    [
        (0, 8, None),
        (4, 8, None),
        (60, 8, "keep 4.8 of 8 cores busy: threads: 3 may be faster than 8"),
        (60, 3, None),
        (100, 2, "keep 8.0 of 8 cores busy: threads: 1 may be faster than 2"),
        (100, 1, None),
    ],
)
def test_a_start_on_busy_cores_names_the_threads(monkeypatch, busy, threads, line):
    import psutil

    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: busy)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    found = devices.crowded(threads)
    assert found is None if line is None else line in found
