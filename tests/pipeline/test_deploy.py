"""Which files are deployed: int8 where it is worth it, and why not where it is not."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from epsd.architectures import built, narrowed
from epsd.architectures.resnet import ResNet
from epsd.compute import timing
from epsd.data.prepared import Prepared
from epsd.datasets.digits import Digits
from epsd.evaluation import deploy as made_of
from epsd.evaluation import evaluate as evaluation
from epsd.files import onnx_file
from epsd.pipeline import deploy
from epsd.preparing.write import prepare
from epsd.project import artifacts
from epsd.project.params import EvaluateParams

Deploy = Callable[..., tuple[deploy.Deployed, list[str]]]


class Made:
    """Digits prepared, a network that has learnt something, and its ONNX file, which takes seconds to make."""

    def __init__(self, folder: Path) -> None:
        prepare(Digits()(), folder / "data", limit=12, validation=0.2, test=0.3)
        self.data = Prepared.load(folder / "data")
        torch.manual_seed(0)
        self.network = ResNet(depth=8, width=0.5)(10, (1, 8, 8))
        optimiser = torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9)
        for epoch in range(8):
            for batch in self.data.batches("train", batch_size=16, shuffle=True).epoch(epoch):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(self.network(batch.images), batch.labels).backward()
                optimiser.step()
        self.network.eval()
        data = self.data
        self.card: dict[str, Any] = {"class_names": data.class_names, "image_shape": data.image_shape}
        self.card |= {"mean": data.mean, "std": data.std}
        self.weights = folder / "model.safetensors"
        artifacts.save_model(self.network, self.weights, self.card)
        deploy.export(self.network, self.card, self.weights, folder / "model.onnx")
        self.onnx = folder / "model.onnx"

    def subject(self) -> deploy.Subject:
        answers = evaluation.predict(self.network, self.data.batches("test", batch_size=16))
        return deploy.Subject(self.network, self.card, self.weights, self.data, answers)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deploy:
    """`deployed` with some settings and, by form, milliseconds that every pass takes."""

    def export(network: Any, card: Any, weights: Any, path: Path) -> None:
        shutil.copy(made.onnx, path)

    monkeypatch.setattr(deploy, "export", export)

    def deployed(times: Mapping[str, float] | None = None, **settings: Any) -> tuple[deploy.Deployed, list[str]]:
        if times:
            given = timing.Timing({"torch": 8.0, "dense_torch": 8.0, "onnx": 4.0, "dense_onnx": 4.0, **times}, 3)
            monkeypatch.setattr(timing, "interleaved", lambda *arguments: given)
        params = EvaluateParams(
            batch_size=16, ece_bins=5, latency_batch_sizes=[1, 4], **{"latency_repeats": 1, **settings}
        )
        found = deploy.deployed(made.subject(), params, tmp_path / "onnx")
        return found, sorted(path.name for path in (tmp_path / "onnx").iterdir())

    return deployed


def export_settings(**settings: Any) -> dict[str, Any]:
    return {"export": {"calibration": 40, **settings}}


def test_int8_is_kept_where_it_is_faster_and_loses_little(run: Deploy) -> None:
    found, files = run({"int8": 2.0}, **export_settings(max_drop=0.5))
    assert files == ["model.int8.onnx", "model.onnx"] and found.figures["deploy"]["int8_kept"] == 1
    assert found.said == "ONNX 2.0 times as fast as dense torch; int8 kept"
    latency = found.figures["latency"]
    assert latency["int8_batch4_one_thread_times_dense_torch"] == 4
    assert latency["int8_batch1_one_thread_times_dense_onnx"] == 2
    assert "dense_onnx_batch1_one_thread_times_dense_torch" not in latency


def test_int8_that_is_slower_is_left_out_and_still_reported(run: Deploy) -> None:
    found, files = run({"int8": 5.0}, **export_settings(max_drop=0.5))
    assert files == ["model.onnx"] and found.figures["deploy"]["int8_kept"] == 0
    assert found.said.endswith("int8 left out: 0.80 times as fast as fp32")
    assert {"int8_top1", "int8_agreement", "int8_bytes"} <= found.figures["deploy"].keys()


def test_int8_that_loses_too_much_on_validation_is_left_out(run: Deploy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_of, "quantise", spoilt)
    found, left = run({"int8": 5.0}, **export_settings())
    drop = found.figures["deploy"]["int8_validation_drop"]
    assert left == ["model.onnx"] and drop > 0.01
    assert found.said.endswith(f"int8 left out: 0.80 times as fast as fp32 and {drop:.4f} of top-1 lost on validation")


def spoilt(source: Path, path: Path, images: Any, bits: int) -> None:
    """A file that always names the class after the right one."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    last = next(node for node in reversed(model.graph.node) if node.op_type == "Gemm")
    for tensor in model.graph.initializer:
        if tensor.name in last.input:
            tensor.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(tensor), 1, axis=0), tensor.name))
    onnx_file.save(model, path, {entry.key: entry.value for entry in model.metadata_props if entry.key != "digest"})


@pytest.mark.parametrize("repeats, reason", [(0, "not timed"), (1, "times as fast as fp32")])
def test_int8_can_be_asked_for_whatever_it_costs(repeats: int, reason: str, run: Deploy) -> None:
    found, left = run({"int8": 9.0}, latency_repeats=repeats, **export_settings(int8=True))
    assert left == ["model.int8.onnx", "model.onnx"] and reason in found.said and "int8 kept" in found.said
    assert bool(found.figures["latency"]) == bool(repeats)


def test_int8_is_not_made_where_nobody_wants_it(run: Deploy) -> None:
    found, left = run(**export_settings(int8=False))
    assert left == ["model.onnx"] and "int8" not in found.said
    assert not any("int8" in name for part in found.figures.values() for name in part)


def test_without_onnx_torch_is_timed_alone(run: Deploy) -> None:
    found, left = run(**export_settings(onnx=False))
    assert left == [] and found.said == "" and found.figures["deploy"] == {}
    assert found.figures["latency"]["torch_batch4_one_thread_ms"] > 0


def test_a_network_that_cannot_be_exported_is_one_line(
    run: Deploy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(deploy, "export", refuse)
    found, left = run()
    assert left == [] and found.said == ""
    line = "evaluate: no ONNX file: torch cannot export this network (RuntimeError: no such operator).\n"
    assert capsys.readouterr().err == line


def test_the_dense_twin_of_a_narrow_network_is_as_wide_as_its_architecture(made: Made) -> None:
    choice: dict[str, Any] = {"name": "resnet", "depth": 8, "width": 1.0}
    network = built({**choice, "width": 0.25}, 10, (1, 8, 8))
    card = {**made.card, "architecture": choice, "num_classes": 10}
    card["shapes"] = narrowed(network, choice, 10, (1, 8, 8))
    twin = made.subject()._replace(network=network, card=card).dense()
    wide = built(choice, 10, (1, 8, 8))
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in wide.named_parameters()}
    assert not twin.training


def test_figures_are_numbers_that_json_holds(run: Deploy) -> None:
    found, _ = run(**export_settings())
    assert json.loads(json.dumps(found.figures, allow_nan=False)) == found.figures
    assert found.figures["deploy"]["onnx_agreement"] == 1
    assert 0 <= found.figures["latency"]["load_of_others"] <= 1
