"""How the MLflow UI shows an experiment: columns of the table of runs, and charts with train and validation in one.

MLflow keeps a shared view of an experiment's page in a tag of the experiment; an address that names its key shows it.
The view is ours alone: what a user arranges is kept in the browser, and what a user shares has another key.
"""

import base64
import functools
import json
import zlib
from typing import Any

KEY = "epsd"
"""The view's key in the address of the page."""
TAG = f"mlflow.sharedViewState.{KEY}"
QUERY = f"workflowType=machine_learning&viewStateShareKey={KEY}"
"""What the address of the page ends in: the view, in MLflow's surroundings for training rather than for prompts."""

COLUMNS = (
    "params.`prune.sparsity`",
    "metrics.`test/top1`",
    "params.`prune.score.name`",
    "params.`objective.name`",
    "params.`seed`",
    "metrics.`test/balanced_accuracy`",
    "metrics.`test/macro_f1`",
    "metrics.`val/top1`",
    "metrics.`model/compression`",
    "metrics.`deploy/int8_top1`",
    "metrics.`latency/torch_batch1_one_thread_ms`",
    "metrics.`latency/onnx_batch1_one_thread_ms`",
    "metrics.`latency/int8_batch1_one_thread_ms`",
    "metrics.`detect/map50`",
    "metrics.`cost/seconds`",
    "tags.`kind`",
)
"""Columns of the table of runs, beside name and time; the others are a click away (Columns)."""

CURVES = {
    "Top-1, train and validation": ("train/top1", "val/top1"),
    "Cross entropy, train and validation": ("train/cross_entropy", "val/nll"),
    "Loss and its distillation term": ("train/loss", "train/distillation"),
    "Gradient norm": ("train/grad_norm",),
    "Learning rate": ("train/lr",),
    "Detection: training loss": ("detect/train_loss",),
}
"""Line charts over epochs: title and metrics."""

RESULTS = {
    "Test top-1": "test/top1",
    "Validation top-1": "val/top1",
    "Parameters / nonzero parameters": "model/compression",
    "Detection mAP@0.5": "detect/map50",
    "Calibration error (ECE)": "test/ece",
    "Training, seconds": "cost/seconds",
    "One image, one thread, ONNX fp32: ms": "latency/onnx_batch1_one_thread_ms",
}
"""Bar charts, one bar per run: title and metric."""

FOLDED = (
    "train",
    "val",
    "test",
    "model",
    "mask",
    "deploy",
    "latency",
    "cost",
    "time",
    "detect",
    "repeat",
    "Model metrics",
    "System metrics",
)
"""Sections that the UI makes of all other metrics by the first part of their names: there, but closed."""


KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tells MLflow that the experiment is of trained networks, not of prompts."""


@functools.cache
def tags() -> dict[str, str]:
    """The tags of an experiment that is shown so."""
    return {TAG: packed(view()), **KIND}


def packed(text: str) -> str:
    """As the UI itself packs a view: some databases hold 5,000 characters a tag."""
    return "deflate;" + base64.b64encode(zlib.compress(text.encode(), level=9)).decode()


def view() -> str:
    """The view as JSON, unpacked."""
    sections = [_section("Results"), _section("Curves"), *(_section(name, opened=False) for name in FOLDED)]
    charts = [_bar(title, metric) for title, metric in RESULTS.items()]
    charts.append(_scatter("Top-1 against sparsity", ("PARAM", "prune.sparsity"), "test/top1"))
    latency = "latency/onnx_batch1_one_thread_ms"
    charts.append(_scatter("Top-1 against ms of one image (ONNX fp32, one thread)", ("METRIC", latency), "test/top1"))
    charts += [_line(title, metrics) for title, metrics in CURVES.items()]
    state = {
        "selectedColumns": list(COLUMNS),
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,  # or the UI sorts the sections by name
        "hideEmptyCharts": True,
    }
    return json.dumps(state, separators=(",", ":"))


def _section(name: str, opened: bool = True) -> dict[str, Any]:
    return {
        "uuid": _id(name),
        "name": name,
        "display": opened,
        "isReordered": False,
        "deleted": False,
        "isGenerated": False,
    }


def _id(name: str) -> str:
    return f"epsd {name}"


def _chart(kind: str, title: str, section: str) -> dict[str, Any]:
    common = {"runsCountToCompare": 20, "deleted": False, "isGenerated": False}
    return {"uuid": _id(title), "type": kind, "displayName": title, "metricSectionId": _id(section), **common}


def _bar(title: str, metric: str) -> dict[str, Any]:
    return {**_chart("BAR", title, "Results"), "metricKey": metric}


def _scatter(title: str, across: tuple[str, str], metric: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": across[1], "type": across[0]}, "yaxis": {"key": metric, "type": "METRIC"}}
    return {**_chart("SCATTER", title, "Results"), **axes, "runsCountToCompare": 100}


def _line(title: str, metrics: tuple[str, ...]) -> dict[str, Any]:
    axes = {"xAxisKey": "step", "xAxisScaleType": "linear", "scaleType": "linear", "range": {}, "yAxisKey": "metric"}
    shape = {"lineSmoothness": 0, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True, "yAxisExpressions": []}
    chosen = {"metricKey": metrics[0], "selectedMetricKeys": list(metrics), "selectedXAxisMetricKey": ""}
    return {**_chart("LINE", title, "Curves"), **chosen, **axes, **shape}
