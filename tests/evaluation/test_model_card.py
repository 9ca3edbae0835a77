"""The model card says what the files say."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from epsd.data.prepared import Prepared
from epsd.evaluation import model_card
from epsd.evaluation.evaluate import ClassRow
from epsd.pipeline import describe, stage
from epsd.project.artifacts import Run
from epsd.project.params import DEFAULT_PATH, load

REPORT = {
    "test": {"top1": 0.9861, "top5": 1.0, "nll": 0.12, "ece": 0.0916},
    "model": {
        "sparsity": 0.95,
        "parameters": 77754,
        "parameters_nonzero": 4520,
        "compression": 17.2,
        "gflops_dense": 1,
    },
}
SUBJECT = model_card.Subject(
    params={
        "seed": 3,
        "architecture": {"name": "resnet", "depth": 8},
        "objective": {"name": "cskd"},
        "prune": {"score": {"name": "snip"}, "sparsity": 0.95, "scope": "global", "control": "none"},
        "train": {"epochs": 60, "batch_size": 64, "lr": 0.1, "clip_norm": None},
        "detect": {"epochs": 4},
    },
    data={
        "source": "some digits",
        "digest": "0123456789abcdef0123",
        "sizes": {"train": 12, "test": 5},
        "class_names": [f"class{i}" for i in range(30)],
        "image_shape": [3, 20, 30],
    },
    story="A small network.",
    run=Run("abc", "digits-snip"),
    report=REPORT,
    classes=[
        ClassRow("class0", 3, 0.5, 1.0, 0.6),
        ClassRow("class1", 2, 1.0, 1.0, 1.0),
        ClassRow("class2", 0, "", "", ""),
    ],
)


def test_every_part_is_there() -> None:
    text = model_card.model_card(SUBJECT)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert titles == ["digits-snip", "Data", "Method", "Metrics", "Limits", "How to use it", "Parameters"]
    for words in (
        "A small network.",
        "some digits, digest `0123456789abcdef`",
        "12 train, 5 test, of 3x20x30 pixels",
        "class19, ...",
        "snip; sparsity 0.95, scope global",
        "| top-1 accuracy | 0.9861 |",
        "| of these not zero | 4,520 |",
        "Weakest classes, by recall: class0 50.0% of 3, class1 100.0% of 2.",
        "One training, seed 3",
        "epsd promote abc",
        "Images of 20x30 are taken as they are",
        "train.clip_norm: null",
    ):
        assert words in text, words
    assert "class20" not in text and "detect.epochs" not in text and "EPSD (Chen" not in text


def test_forms_and_their_latency_are_told_with_the_machine() -> None:
    deployed = {"onnx_top1": 0.98, "onnx_agreement": 1.0, "onnx_bytes": 317201, "int8_top1": 0.97}
    deployed |= {"int8_agreement": 0.9931, "int8_bytes": 102908, "int8_kept": 0.0}
    latency = {"turns": 50, "threads": 2, "load_of_others": 0.25}
    for setting, factor in (("batch1_one_thread", 1), ("batch32_all_threads", 20)):
        for form, ms in (("torch", 0.4), ("onnx", 0.1), ("dense_torch", 0.42), ("dense_onnx", 0.09)):
            latency[f"{form}_{setting}_ms"] = ms * factor
        for form, ms in (("torch", 0.4), ("onnx", 0.1)):
            latency[f"{form}_{setting}_times_dense_torch"] = 0.42 / ms
            latency[f"{form}_{setting}_times_dense_onnx"] = 0.09 / ms
    model = {**REPORT["model"], "bytes_dense": 318472}
    report = {**REPORT, "model": model, "deploy": deployed, "latency": latency}
    told = SUBJECT._replace(report=report, deployed="int8 left out: slow", machine="A fast one x2")
    text = model_card.model_card(told).partition("## Deployed")[2].partition("##")[0]
    for words in (
        "int8 left out: slow.",
        "| torch | 0.9861 | | 318,472 |",
        "| ONNX int8 | 0.9700 | 99.31% | 102,908 |",
        "| ms of a pass | 1 image, one thread | 32 images, all threads |",
        "| ONNX fp32 | 0.1 (4.20, 0.90) | 2 (4.20, 0.90) |",
        "| dense twin, torch | 0.42 | 8.4 |",
        "Medians of at least 50 passes, in turns, on A fast one x2; all threads are\n2.",
        "Other processes had 25% of the machine",
    ):
        assert words in text, words
    assert "Deployed" not in model_card.model_card(SUBJECT), "nothing was exported or timed"


def test_the_method_is_named_where_it_is_epsd() -> None:
    params = {**SUBJECT.params, "prune": {**SUBJECT.params["prune"], "score": {"name": "epsd", "steps": 3}}}
    assert "EPSD (Chen et al., AAAI 2024)" in model_card.model_card(SUBJECT._replace(params=params))


def test_a_dense_network_and_a_control_are_called_so() -> None:
    def card(**changed: object) -> str:
        params = {**SUBJECT.params, "prune": {**SUBJECT.params["prune"], "score": {"name": "epsd"}, **changed}}
        return model_card.model_card(SUBJECT._replace(params=params))

    dense = card(sparsity=0.0).partition("## Parameters")[0]
    assert "The dense network, for comparison: no weight is removed." in dense
    assert not any(word in dense for word in ("epsd;", "EPSD (", "sparsity 0", "Zeros"))
    control = card(control="shuffled")
    assert "scope global, rescaled" in card(rescale=True) and "rescaled" not in card(rescale=False)
    assert "A control (shuffled)" in control and "EPSD (" not in control and "epsd; sparsity 0.95" in control
    report = {**REPORT, "model": {**REPORT["model"], "sparsity": 0.0}}
    assert model_card.results(report, 359).endswith("ECE 0.0916; dense, 77,754 parameters.")


def test_a_narrow_network_is_not_called_dense() -> None:
    cut = {"score": {"name": "epsd"}, "structure": "channels", "sparsity": 0.0, "macs": 0.25, "allocation": "cost"}
    params = {**SUBJECT.params, "prune": {**SUBJECT.params["prune"], **cut}}
    report = {**REPORT, "model": {**REPORT["model"], "sparsity": 0.0, "macs": 0.2476}}
    text = model_card.model_card(SUBJECT._replace(params=params, report=report)).partition("## Parameters")[0]
    assert "channels are removed before training" in text and "dense network" not in text and "Zeros" not in text
    assert "epsd; macs 0.25, allocation cost, sparsity 0" in text and "| 0.248 |" in text
    assert model_card.results(report, 359).endswith("; cut to 24.8% of its multiply-adds, 77,754 parameters.")


@pytest.mark.parametrize(
    "changed, method, words",
    [
        ({}, "epsd", "). `epsd` removed 95.0% of its weights before training. `cskd` trained it for"),
        ({"sparsity": 0.0, "control": "shuffled"}, "dense", "). Dense: it keeps all of its weights. `cskd` trained"),
        ({"rescale": True}, "epsd", "In each layer they were scaled to the mean square it began with. `cskd` trained"),
        ({"control": "shuffled"}, "epsd-shuffled", "A control: 95.0% of its weights were removed before training, in"),
        ({"control": "reinitialised"}, "epsd-reinitialised", "A control: `epsd` removed 95.0% of its weights before"),
    ],
)
def test_a_run_says_what_it_is(changed: dict[str, object], method: str, words: str, root: Path) -> None:
    params = load(root / DEFAULT_PATH)
    params = params.model_copy(update={"prune": params.prune.model_copy(update=changed)})
    sizes = {"train": 12}
    data = cast(Prepared, SimpleNamespace(num_classes=3, image_shape=(1, 8, 8), sizes=sizes, digest="d"))
    assert words in describe.story(params, data)
    assert describe.tags(params, data)["method"] == f"{method}+cskd"
    said = "resnet on digits stays dense" if method == "dense" else f"to sparsity 0.95 by {method} under cskd"
    assert said in stage.describe(params, "prune")


def test_results_in_a_sentence() -> None:
    assert model_card.results(REPORT, 359).startswith("Top-1 accuracy 0.9861 on 359 test images, ECE 0.0916; 95.00% of")


def test_names_are_no_markup() -> None:
    name = "<img src=x onerror=alert(1)>\n# a [link](b) `c` *d*"
    data = {**SUBJECT.data, "class_names": [name, "b"], "source": name}
    params = {
        **SUBJECT.params,
        "architecture": {"name": "timm_zoo", "model": name},
        "dataset": {"root": "```\n" + name},
    }
    subject = SUBJECT._replace(
        data=data, params=params, run=Run("abc", name), classes=[ClassRow(name, 3, 0.5, 1.0, 0.6)]
    )
    text = model_card.model_card(subject)
    told, _, rest = text.partition("````yaml")
    assert "<img" not in told and "\n# a" not in told and "[link]" not in told
    assert told.count("&lt;img src=x onerror=alert(1)&gt; \\# a \\[link\\](b) \\`c\\` \\*d\\*") == 5
    assert rest.count("````") == 1
