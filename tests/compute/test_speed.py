"""How fast a step runs must not change what it computes: every kernel of the update, and compilation."""

import copy
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from epsd.compute import speed
from epsd.compute.speed import AccelerationError, align_, compiled, optimiser, pick_update
from epsd.masks import Mask, prunable
from epsd.objectives import OBJECTIVES
from epsd.project.recipes import Recipe
from epsd.training.fit import fit
from epsd.training.record import Record
from epsd.training.updates import MaskHolder
from toys import ToyBatches, convnet

CPU = torch.device("cpu")
RECIPE = {"epochs": 3, "lr": 0.1, "schedule": "cosine", "precision": "fp32"}


def trained(model: nn.Module, **settings: object) -> dict[str, torch.Tensor]:
    mask = Mask.from_scores({name: p.detach().abs() for name, p in prunable(model).items()}, 0.5)
    history: list[Record] = fit(
        model, ToyBatches(), objective=OBJECTIVES["dlb"](), mask=mask, recipe=Recipe(**RECIPE, **settings)
    )
    assert len(history) == 3
    return model.state_dict()


@pytest.mark.parametrize("update", ["fused", "foreach"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_every_kernel_makes_the_same_update(update: str, layout: str) -> None:
    loop = trained(convnet(), update="loop", memory_format=layout)
    other = trained(convnet(), update=update, memory_format=layout)
    for name, value in loop.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_automatic_update_is_fused_where_torch_has_the_kernel() -> None:
    assert pick_update("auto", CPU) == "fused"
    assert pick_update("auto", torch.device("xpu")) == "foreach"
    with pytest.raises(AccelerationError, match=r"train\.update: torch has no fused kernel for xpu"):
        pick_update("fused", torch.device("xpu"))


def test_a_restored_momentum_lies_as_its_weight() -> None:
    """A fused kernel walks both in memory order: with other strides it would add the momentum of another weight."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    made = optimiser("sgd", model.parameters(), "fused", lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    made.step()
    state = copy.deepcopy(made.state_dict())
    for entry in state["state"].values():
        entry["momentum_buffer"] = entry["momentum_buffer"].contiguous()
    before = made.state[model.weight]["momentum_buffer"].clone()
    made.load_state_dict(state)
    align_(made)
    restored = made.state[model.weight]["momentum_buffer"]
    assert restored.stride() == model.weight.stride()
    assert torch.equal(restored, before)


def test_the_mask_lies_as_the_weights() -> None:
    model = convnet().to(memory_format=torch.channels_last)
    mask = Mask.from_scores({name: torch.randn_like(p) for name, p in prunable(model).items()}, 0.5)
    for foreach in (True, False):
        MaskHolder(mask, model, foreach=foreach).weights_()
        assert all(not p[~mask.keep[name]].any() for name, p in prunable(model).items())
        assert all(p[mask.keep[name]].all() for name, p in prunable(model).items())


def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.compile traces and guards as ever, but runs the traced graph without building kernels."""
    modes, real = [], torch.compile

    def compile(model: nn.Module, *, mode: str) -> object:
        modes.append(mode)
        return real(model, backend="aot_eager")

    monkeypatch.setattr(speed.torch, "compile", compile)
    return modes


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_compiled_training_is_the_same_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Same weights to rounding under the same names; a checkpoint of one is a checkpoint of the other."""
    plain, fast, resumed = convnet(), convnet(), convnet()
    fit(plain, ToyBatches(), objective=OBJECTIVES[name](), recipe=Recipe(**RECIPE), validation=ToyBatches())
    modes = interpreted(monkeypatch)

    def stop(record: Record) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    common = {"recipe": Recipe(**RECIPE, compile="kernels"), "checkpoint": tmp_path / "last.safetensors", "mark": "m"}
    with pytest.raises(KeyboardInterrupt):
        fit(fast, ToyBatches(), objective=OBJECTIVES[name](), validation=ToyBatches(), on_epoch=stop, **common)
    common["recipe"] = Recipe(**RECIPE, compile="none")
    fit(resumed, ToyBatches(), objective=OBJECTIVES[name](), validation=ToyBatches(), **common)
    assert modes == ["default"]
    assert list(fast.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile builds C++ on the CPU: needs g++")
def test_compiled_for_real() -> None:
    plain, fast = trained(convnet()), trained(convnet(), compile="kernels")
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-3, atol=1e-4)


def test_compilation_that_cannot_be_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convnet()
    assert compiled(model, "auto", CPU) is model
    assert compiled(model, "none", CPU) is model
    with pytest.raises(AccelerationError, match="CUDA graphs need a CUDA device, this is cpu"):
        compiled(model, "graphs", CPU)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AccelerationError, match="needs the package triton"):
        compiled(model, "kernels", torch.device("cuda"))


TAKE_AND_FREE = """
import resource
import torch
from epsd.compute.speed import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        held = [torch.ones(10 * 2**20 + 1024 * number) for number in range(4)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
print(faults(), faults())
assert keep_freed_memory()
print(faults(), faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than GNU's")
def test_freed_memory_is_kept_and_used_again() -> None:
    """Every page that is taken anew costs a fault."""
    done = subprocess.run([sys.executable, "-c", TAKE_AND_FREE], capture_output=True, text=True, check=True)
    before, after = (int(line.split()[-1]) for line in done.stdout.splitlines())
    assert 4 * after < before


def test_training_a_step_does_not_import_the_compiler():
    """It takes a second of every stage's start, and nothing there is compiled."""
    code = """
import sys, torch
from epsd.compute.speed import optimiser
from epsd.compute.devices import determinism
determinism()
model = torch.nn.Linear(3, 2)
optimiser = optimiser("adamw", model.parameters(), "fused", lr=0.1)
optimiser.load_state_dict(optimiser.state_dict())
optimiser.zero_grad()
model(torch.ones(1, 3)).sum().backward()
optimiser.step()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("update", ["fused", "foreach", "loop"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_update_is_that_of_torch(name, update):
    own = {"sgd": {"momentum": 0.9, "nesterov": True}, "adamw": {"betas": (0.9, 0.99)}}[name]
    settings = {"lr": 0.1, "weight_decay": 0.01, **own}
    models = [torch.nn.Linear(5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    theirs = kind(models[1].parameters(), fused=update == "fused", foreach=update == "foreach", **settings)
    mine = optimiser(name, models[0].parameters(), update, **settings)
    for model, made in zip(models, (mine, theirs), strict=True):
        for _ in range(3):
            made.zero_grad()
            model(torch.ones(2, 5)).square().sum().backward()
            made.step()
    for mine, their in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, their)
        assert mine.grad is not None
        assert mine.grad.requires_grad is False
