"""Read the test split, once: accuracy, calibration, and what the network costs. Writes artifacts/evaluate/."""

import epsd.project.own_code  # noqa: F401, I001 (first, before torch: whose code runs, how threads wait)

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from epsd.compute.devices import Machine
from epsd.data.prepared import Prepared
from epsd.evaluation import evaluate as evaluation
from epsd.evaluation import metrics, model_card
from epsd.figures import style as figures
from epsd.files.onnx_file import FOLDER
from epsd.pipeline import deploy
from epsd.pipeline.describe import reopened, story
from epsd.pipeline.export import exported, trained_network
from epsd.pipeline.stage import run_stage
from epsd.project import artifacts
from epsd.project.params import Params
from epsd.project.runtime import versions


def main(params: Params, machine: Machine) -> str:
    """Load the trained network, evaluate it, save tables, figures and the model to hand on; add them to its run."""
    data = Prepared.load(artifacts.DATA, machine)
    card, run = artifacts.read_card(artifacts.MODEL_CARD), artifacts.read_run(artifacts.RUN)
    history = artifacts.read_history(run)
    model = trained_network(artifacts.MODEL, card).to(machine.device)

    settings = params.evaluate
    test = data.batches("test", batch_size=settings.batch_size)
    answers = evaluation.predict(model, test)
    result = evaluation.measure(*answers, settings.ece_bins)
    costs = deploy.measured(model, card, dense=artifacts.MODEL, compact=artifacts.SPARSE_MODEL)
    with tempfile.TemporaryDirectory() as elsewhere:
        folder = Path(elsewhere) / FOLDER
        files = deploy.deployed(deploy.Subject(model, card, artifacts.MODEL, data, answers), settings, folder)
        recalls = evaluation.recalls(evaluation.per_class_rows(result, data.class_names))
        report = {"test": result.metrics, "recall": recalls, "model": costs, **files.figures}
        artifacts.write_json(artifacts.METRICS, report)
        save_tables(result, data.class_names)
        save_figures(result, model, deploy.masked(model, card), data.class_names, history)
        about = subject(params, data, run, result, report)._replace(deployed=files.said)
        artifacts.write_text(artifacts.MODEL_README, model_card.model_card(about))
        exported(model, card, test, folder)
    version = log(params, report, data.sizes["test"])
    figures = f"test top-1 {result.metrics['top1']:.4f}, ECE {result.metrics['ece']:.4f}, "
    figures += f"sparsity {costs['sparsity']:.4f}, {costs['compression']:.1f} times fewer parameters"
    kept = f"model 'epsd' version {version} (candidate)" if version else ""
    return "; ".join(filter(None, [figures, files.said, kept]))


def save_tables(result: evaluation.Evaluation, names: list[str]) -> None:
    """Recall, precision and F1 by class, every prediction, and the reliability bins, as CSV."""
    header = ("class", *evaluation.ClassRow._fields[1:])
    artifacts.write_csv(artifacts.PER_CLASS, header, evaluation.per_class_rows(result, names))
    artifacts.write_csv(artifacts.CONFUSION, ("actual", "predicted"), evaluation.confusion_rows(result, names))
    artifacts.write_csv(artifacts.RELIABILITY, result.reliability._fields, evaluation.reliability_rows(result))


def save_figures(
    result: evaluation.Evaluation,
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    names: list[str],
    history: artifacts.Columns,
) -> None:
    """Confusion, reliability, density by layer and training curves, as PNG."""
    densities = metrics.densities(weights)
    overall = metrics.count_parameters(model, weights)
    figures.save(figures.confusion(result.confusion, names), artifacts.CONFUSION_FIGURE)
    figures.save(figures.reliability(result.reliability), artifacts.RELIABILITY_FIGURE)
    figures.save(figures.density_per_layer(densities, 1 - overall.sparsity), artifacts.DENSITY_FIGURE)
    figures.save(figures.curves(figures.history_panels(history)), artifacts.CURVES_FIGURE)


def subject(
    params: Params,
    data: Prepared,
    run: artifacts.Run,
    result: evaluation.Evaluation,
    report: Mapping[str, Mapping[str, float]],
) -> model_card.Subject:
    """What the model card is about."""
    rows = list(evaluation.per_class_rows(result, data.class_names))
    about = params.model_dump(), data.index, story(params, data), run, report, rows
    return model_card.Subject(*about, machine=versions()["cpu"])


def log(params: Params, report: Mapping[str, Mapping[str, float]], images: int) -> str | None:
    """Add everything to the run that `train` opened; headline figures at the artifact root, tables in a folder.

    Returns the version under which the model is registered, None while the store is away.
    """
    with reopened("evaluate", params, {"latency.note": deploy.LATENCY_NOTE}) as tracker:
        tracker.metrics({f"{group}/{name}": value for group, part in report.items() for name, value in part.items()})
        for figure in artifacts.EVALUATE_FIGURES:
            tracker.artifact(figure)
        for table in artifacts.EVALUATE_TABLES:
            tracker.artifact(table, folder="evaluate")
        tracker.artifact(artifacts.SPARSE_MODEL, folder="model")
        tracker.artifact(artifacts.MODEL_README)
        tracker.describe("Test", model_card.results(report, images))
        return tracker.model(artifacts.SERVED_MODEL)


if __name__ == "__main__":
    run_stage("evaluate", main)
