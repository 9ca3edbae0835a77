"""What `auto` stands for is measured where that pays, kept, and leaves no trace in the training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from epsd.project.recipes import Recipe
from epsd.training import autotune, checkpoints
from epsd.training.autotune import Way, best, named, ways
from epsd.training.fit import fit
from toys import Killed, ToyBatches, convnet, stop_after

FP32, BF16 = (Way(kind, torch.channels_last, "none") for kind in (None, torch.bfloat16))
CPU = torch.device("cpu")


def trained(recipe: Recipe, **settings: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    torch.manual_seed(0)
    model = convnet()
    history = fit(model, ToyBatches(), recipe=recipe, **settings)
    return copy.deepcopy(model.state_dict()), history


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Measure even the shortest training."""
    monkeypatch.setattr(autotune, "LEAST", 0.0)
    monkeypatch.setattr(autotune, "SHARE", 1e9)
    return monkeypatch


def test_what_a_recipe_leaves_open() -> None:
    model = convnet()
    assert len(ways(Recipe(), model, CPU)) == 4
    assert len(ways(Recipe(precision="fp32"), model, CPU)) == 2
    assert ways(Recipe(precision="bf16", memory_format="contiguous"), model, CPU) == [
        Way(torch.bfloat16, torch.contiguous_format, "none")
    ]


@pytest.mark.parametrize("way", ways(Recipe(compile="kernels"), convnet(), CPU))
def test_a_way_is_known_by_its_name(way: Way) -> None:
    assert named(str(way)) == way


def test_noise_changes_nothing() -> None:
    assert best({FP32: 1.0, BF16: 0.96}) == FP32
    assert best({FP32: 1.0, BF16: 0.94}) == BF16
    assert best({BF16: 1.0, FP32: float("inf")}) == BF16


def test_short_trainings_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune._Bench, "__init__", lambda *_: pytest.fail("measured"))
    _, history = trained(Recipe(epochs=2))
    assert not any(name.startswith("time/step") for name in history[0])


@pytest.mark.parametrize("faster", ["fp32 contiguous", "bf16 channels_last", "fp32 channels_last"])
def test_the_fastest_way_is_taken_kept_and_recorded(faster: str, eager: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same bits as where it is asked for by name; a resumed training measures nothing and goes on in it."""
    eager.setattr(autotune._Bench, "seconds", lambda self, way: 0.1 if str(way) == faster else 1.0)
    weights, history = trained(Recipe(epochs=4, lr=0.02))
    assert {name: history[3][f"time/step {name}"] for name in ("fp32 contiguous", "bf16 channels_last")} == {
        name: 0.1 if name == faster else 1.0 for name in ("fp32 contiguous", "bf16 channels_last")
    }
    precision, layout = faster.split()
    asked, _ = trained(Recipe(epochs=4, lr=0.02, precision=precision, memory_format=layout))
    assert same(weights, asked)

    path = tmp_path / "last"
    with pytest.raises(Killed):
        trained(Recipe(epochs=4, lr=0.02), checkpoint=path, mark="m", on_epoch=stop_after(2))
    assert checkpoints.load(path, "m")["way"] == faster
    eager.setattr(autotune._Bench, "seconds", lambda self, way: pytest.fail("measured again"))
    resumed, again = trained(Recipe(epochs=4, lr=0.02), checkpoint=path, mark="m")
    assert same(resumed, weights)
    assert again[3].keys() == history[3].keys()


def test_measuring_leaves_no_trace(eager: pytest.MonkeyPatch) -> None:
    """Steps are really taken, on copies: whichever way wins, the weights are those of that way asked for by name."""
    taken: list[str] = []
    seconds = autotune._Bench.seconds

    def counted(self: Any, way: Way) -> float:
        taken.append(str(way))
        found = seconds(self, way)
        assert 0 < found < 60
        return found

    eager.setattr(autotune._Bench, "seconds", counted)
    weights, history = trained(Recipe(epochs=2, lr=0.02, precision="fp32"))
    times = {name.removeprefix("time/step "): s for name, s in history[0].items() if name.startswith("time/step")}
    assert taken == ["fp32 channels_last", *["fp32 channels_last", "fp32 contiguous"] * autotune.MOST]
    won = best({named(name): s for name, s in times.items()})
    layout = str(won).split()[1]
    asked, _ = trained(Recipe(epochs=2, lr=0.02, precision="fp32", memory_format=layout))
    assert same(weights, asked)


def test_what_does_not_fit_into_memory_is_never_taken(eager: pytest.MonkeyPatch) -> None:
    step = autotune._Bench._step

    def scarce(self: Any) -> None:
        if self._trial.way.precision is None:
            raise MemoryError
        step(self)

    eager.setattr(autotune._Bench, "_step", scarce)
    _, history = trained(Recipe(epochs=1, memory_format="contiguous", precision="auto"))
    assert history[0]["time/step fp32 contiguous"] == float("inf")
