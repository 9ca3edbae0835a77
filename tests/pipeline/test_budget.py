"""`prune.macs: auto`: the network keeps to what its file may take, and what cannot be is said before any work."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import shipped
from epsd.data.prepared import Prepared
from epsd.files.onnx_file import FP32
from epsd.pipeline import budget, deploy
from epsd.pipeline.budget import Budget
from epsd.pipeline.describe import run_name, story
from epsd.pipeline.prune import pruned
from epsd.pipeline.stage import describe
from epsd.pipeline.train import card
from epsd.project import artifacts
from epsd.project.params import Params, ParamsError
from epsd.pruning.channels import ChannelError

AUTO = {"data.limit": 12, "prune.batch_size": 32, "threads": 1,
        "prune.structure": "channels", "prune.macs": "auto", "prune.sparsity": 0.0, "prune.compare": False}  # fmt: skip


def params(**changes: Any) -> Params:
    return shipped(changes)


@pytest.fixture
def data(few_digits: Prepared) -> Prepared:
    return few_digits


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a multiply-add takes a microsecond, exactly, and a file holds nothing but its weights."""

    def measured(self: Budget, kept: Any) -> budget.Costs:
        sizes = {name: len(channels) for name, channels in kept.items()}
        taken = {"latency_ms": self._structure.macs(sizes) / 1000, "bytes": 4.0 * sum(sizes.values())}
        return {name: taken[name] for name in self._asked}

    monkeypatch.setattr(Budget, "_measured", measured)


def test_the_file_is_no_larger_than_asked(data: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The very file that `evaluate` writes, to the byte."""
    mine = params(**AUTO, **{"prune.bytes": 200_000, "prune.round_to": 32})
    found = pruned(mine, data)
    assert 150_000 < found.report["bytes"] <= found.report["bytes_asked"] == 200_000 < found.report["bytes_whole"]
    about = card(mine, data, found.mask, found.model)
    artifacts.save_model(found.model, tmp_path / "model.safetensors", about)
    deploy.export(found.model.eval(), about, tmp_path / "model.safetensors", tmp_path / FP32)
    assert (tmp_path / FP32).stat().st_size == found.report["bytes"]
    assert "where 200,000 bytes are allowed" in capsys.readouterr().err


@pytest.mark.usefixtures("weighed")
@pytest.mark.parametrize("allocation", ["uniform", "cost", "random"])
def test_most_of_a_budget_is_used_by_every_allocation(allocation: str, data: Prepared) -> None:
    whole = Budget(params(**AUTO, **{"prune.latency_ms": 1e5}), data, *_network(data))._whole["latency_ms"]
    mine = params(**AUTO, **{"prune.latency_ms": whole / 3, "prune.allocation": allocation, "prune.round_to": 4})
    found = pruned(mine, data)
    report = found.report
    assert 0.9 * whole / 3 <= report["latency_ms"] <= report["latency_ms_asked"] == whole / 3
    assert report["macs"] == pytest.approx(report["latency_ms"] / whole)
    assert report["networks_measured"] < 12
    again = {**AUTO, "prune.macs": report["macs_found"], "prune.allocation": allocation, "prune.round_to": 4}
    same = pruned(params(**again), data)
    assert all(torch.equal(kept, same.channels[name]) for name, kept in found.channels.items())


@pytest.mark.usefixtures("weighed")
def test_both_budgets_are_kept(data: Prepared) -> None:
    report = pruned(params(**AUTO, **{"prune.latency_ms": 1e5, "prune.bytes": 400}), data).report
    assert report["bytes"] <= 400 and report["latency_ms"] < report["latency_ms_whole"]


@pytest.mark.usefixtures("weighed")
def test_what_cannot_be_met_is_said_before_anything_is_scored(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epsd.pruning.prune.gates", None)
    with pytest.raises(ChannelError, match=r"prune\.latency_ms: 0\.0001 cannot be met: the narrowest network, with 8"):
        pruned(params(**AUTO, **{"prune.latency_ms": 0.0001}), data)


@pytest.mark.usefixtures("weighed")
def test_a_budget_that_asks_for_nothing_is_said(data: Prepared, capsys: pytest.CaptureFixture[str]) -> None:
    report = pruned(params(**AUTO, **{"prune.latency_ms": 1e5}), data).report
    assert report["macs"] == 1.0
    assert "prune.latency_ms: 100000 asks for nothing: the whole network takes" in capsys.readouterr().err


def test_a_network_that_cannot_be_exported_is_said(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epsd.pipeline.deploy.export", functools.partial(int, "no"))
    with pytest.raises(ChannelError, match="torch cannot export this network"):
        pruned(params(**AUTO, **{"prune.bytes": 1000}), data)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prune.macs": "auto"}, "needs latency_ms, bytes or both"),
        ({"prune.latency_ms": 1.0}, "latency_ms: needs structure: channels and macs: auto"),
        ({"prune.bytes": 1000, "prune.macs": "auto", "prune.structure": "weights"}, "bytes: needs structure: channels"),
        ({"prune.macs": "some"}, r"prune\.macs"),
        ({"prune.bytes": 0, "prune.macs": "auto"}, r"prune\.bytes"),
        ({"prune.round_to": 6}, r"prune\.round_to.*should be 4, or .*multiple of 8"),
        ({"prune.round_to": 12}, r"prune\.round_to.*multiple of 8"),  # kernels are slower there than on a dense network
    ],
)
def test_half_a_budget_is_a_mistake(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ParamsError, match=told):
        params(**{"prune.structure": "channels", **changes})


def test_runs_say_what_they_were_allowed(data: Prepared) -> None:
    mine = params(**AUTO, **{"prune.latency_ms": 0.25, "prune.bytes": 100_000})
    assert "latency_ms0.25-bytes100000" in run_name(mine)
    assert "cut to what 0.25 ms for an image and 100,000 bytes of ONNX allow before" in story(mine, data)
    assert "to what 0.25 ms for an image" in describe(mine, "prune")


def _network(data: Prepared) -> tuple[Any, Any]:
    from epsd.pipeline.prune import initial
    from epsd.pruning.channels import Structure

    model = initial(params(**AUTO, **{"prune.latency_ms": 1.0}), data)
    return model, Structure(model, data.image_shape)
