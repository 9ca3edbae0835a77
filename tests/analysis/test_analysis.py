"""`epsd analyse` and what it measures: against hand-made numbers, and once as a user runs it, without a test split."""

import copy
import functools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

import warm
from conftest import ROOT
from epsd import cli
from epsd.analysis import AnalysisError, distillation, features, landscape, overlap, report, trainability
from epsd.analysis.measuring import with_score
from epsd.evaluation import metrics
from epsd.losses import cross_entropy, kl_divergence
from epsd.masks import Mask, prunable
from epsd.objectives import OBJECTIVES
from epsd.project import artifacts
from epsd.project.params import load, override, parse, read_yaml
from epsd.scores import SCORES
from epsd.types import Batch, BatchNeeds
from toys import ToyBatches, convnet


def random_mask(model: nn.Module, sparsity: float, seed: int = 0) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    return Mask.from_scores(
        {name: torch.rand(p.shape, generator=generator) for name, p in prunable(model).items()}, sparsity
    )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- overlap of masks -----------------------------------------------------------------------------------------------


def test_overlap_is_counted() -> None:
    one = Mask({"fc": torch.tensor([True, True, False, False])})
    other = Mask({"fc": torch.tensor([True, False, True, True])})
    assert overlap.measured([one, other]).tolist() == [[1, 0.25], [0.25, 1]]


def test_overlap_by_chance_is_that_of_random_masks() -> None:
    """Two layers of other densities, against the mean over draws."""
    shapes, counts = {"a": 4000, "b": 1000}, ((400, 700), (1500, 100))
    masks = [
        Mask({name: torch.arange(size) < kept for (name, size), kept in zip(shapes.items(), some, strict=True)})
        for some in counts
    ]
    drawn = [masks[0].shuffled(seed).jaccard(masks[1].shuffled(1000 + seed)) for seed in range(30)]
    expected = overlap.expected(masks)
    assert expected[0, 1] == pytest.approx(sum(drawn) / 30, rel=0.05)
    assert expected[0, 1] == expected[1, 0]
    same = [masks[0].shuffled(seed).jaccard(masks[0].shuffled(1000 + seed)) for seed in range(30)]
    assert expected[0, 0] == pytest.approx(sum(same) / 30, rel=0.05)


def test_overlap_of_one_density_everywhere() -> None:
    flat = Mask({"a": torch.arange(1000) < 100, "b": torch.arange(500) < 50})
    assert overlap.expected([flat])[0, 0] == pytest.approx(overlap.uniform(0.1)) == pytest.approx(0.1 / 1.9)


# --- trainability ---------------------------------------------------------------------------------------------------


def test_gradient_norm_is_of_the_masked_network_without_the_removed_weights() -> None:
    model, data = convnet(), ToyBatches()
    mask = random_mask(model, 0.5)
    found = trainability.gradient_norms(model, mask, data, OBJECTIVES["cross_entropy"]())
    by_hand, norms = copy.deepcopy(model), []
    mask.apply_(by_hand)
    for batch in list(data.epoch(0))[1:]:
        by_hand.zero_grad()
        cross_entropy(by_hand(batch.images), batch.labels).backward()
        left = [p.grad * mask.keep[name] if name in mask.keep else p.grad for name, p in by_hand.named_parameters()]
        norms.append(float(torch.cat([gradient.flatten() for gradient in left]).norm()))
    assert len(norms) == 3
    assert found["grad_norm"] == pytest.approx(sum(norms) / 3, rel=1e-4)
    assert found["grad_norm_ce"] == found["grad_norm"]


@pytest.mark.parametrize("name", ["cskd", "pskd", "dlb"])
def test_the_objectives_own_gradient_is_live_and_the_network_stays_as_it_is(name: str) -> None:
    model = convnet()
    before, random = state(model), torch.get_rng_state()
    found = trainability.gradient_norms(model, random_mask(model, 0.5), ToyBatches(), OBJECTIVES[name]())
    assert found["grad_norm"] != pytest.approx(found["grad_norm_ce"], rel=1e-3)
    assert untouched(model, before) and model.training
    assert torch.equal(torch.get_rng_state(), random)


# --- distillation ---------------------------------------------------------------------------------------------------


def test_divergences_are_those_of_the_pairs() -> None:
    model, data = convnet(), ToyBatches()
    before = state(model)
    probe = distillation.Probe(data, data, torch.device("cpu"))
    first = probe(model)
    assert untouched(model, before) and model.training
    assert set(first) == {"kl_same_class", "kl_views"}
    model.eval()
    for needs, key in ((BatchNeeds("same_class"), "kl_same_class"), (BatchNeeds("view"), "kl_views")):
        pairs = [(model(batch.images), model(batch.partner)) for batch in data.epoch(0, needs)]
        images, partners = (torch.cat(part) for part in zip(*pairs, strict=True))
        target, given = (partners, images) if key == "kl_same_class" else (images, partners)
        assert first[key] == pytest.approx(kl_divergence(target.double(), given.double(), 1.0).item(), rel=1e-5)
        assert first[key] > 0


def test_epochs_are_compared_with_the_one_before() -> None:
    model, data = convnet(), ToyBatches()
    probe = distillation.Probe(data, data, torch.device("cpu"))
    probe(model)
    assert probe(model)["kl_epochs"] == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        model[-1].weight.mul_(3)
    assert probe(model)["kl_epochs"] > 1e-4
    assert probe(model)["kl_epochs"] == pytest.approx(0, abs=1e-9)


def test_every_objective_that_distils_has_its_divergence() -> None:
    assert set(distillation.CREATED_FOR) == set(OBJECTIVES) - {"cross_entropy"}
    assert set(distillation.CREATED_FOR.values()) == set(distillation.QUANTITIES)


# --- calibration ----------------------------------------------------------------------------------------------------


def test_brier_score() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]]).clamp(min=1e-30).log()
    expected = ((0.3**2 + 0.2**2 + 0.1**2) + (0.5**2 + 0.5**2 + 1)) / 2
    assert metrics.brier(logits, torch.tensor([0, 2])) == pytest.approx(expected)
    assert metrics.brier(torch.tensor([[99.0, 0.0]]), torch.tensor([0])) == pytest.approx(0, abs=1e-12)
    assert metrics.brier(torch.tensor([[99.0, 0.0]]), torch.tensor([1])) == pytest.approx(2)


# --- landscape ------------------------------------------------------------------------------------------------------


def batch() -> Batch:
    return next(ToyBatches(size=24, batch_size=24).epoch(0))


def test_directions_are_masked_and_as_long_as_the_filters() -> None:
    model = convnet()
    mask = random_mask(model, 0.7)
    mask.apply_(model)
    found = landscape.direction(model, mask, seed=3)
    assert found.keys() == mask.keep.keys()
    for name, keep in mask.keep.items():
        assert not found[name][~keep].any()
        norms = model.get_parameter(name).detach().flatten(1).norm(dim=1)
        assert torch.allclose(found[name].flatten(1).norm(dim=1), norms, atol=1e-6)


def test_networks_of_one_mask_get_the_same_direction_and_another_seed_another() -> None:
    model, scaled = convnet(), convnet()
    mask = random_mask(model, 0.5)
    mask.apply_(model)
    with torch.no_grad():
        scaled.load_state_dict(
            {name: 2 * tensor if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
        )
    one, other = landscape.direction(model, mask, 0), landscape.direction(scaled, mask, 0)
    assert all(torch.allclose(2 * one[name], other[name], atol=1e-6) for name in one)
    again = landscape.direction(model, mask, 1)
    assert not any(torch.allclose(one[name], again[name]) for name in one)


def test_slice_is_the_loss_of_the_moved_weights_by_the_statistics_of_the_batch() -> None:
    model, drawn = convnet(), batch()
    mask = random_mask(model, 0.5)
    mask.apply_(model)
    model[1].running_mean.fill_(7.0)  # of other weights: it must not matter
    before = state(model)
    found = landscape.surface(model, mask, drawn.images, drawn.labels, points=3, seed=5)
    assert untouched(model, before) and model.training
    places = landscape.coordinates(3)
    assert places == [-1, 0, 1]
    across, down = (landscape.direction(model, mask, landscape.mix(5, axis)) for axis in ("x", "y"))
    for row, y in enumerate(places):
        for column, x in enumerate(places):
            moved = copy.deepcopy(model).train()
            with torch.no_grad():
                for name in across:
                    moved.get_parameter(name).add_(x * across[name] + y * down[name])
            assert found[row, column] == pytest.approx(
                cross_entropy(moved(drawn.images), drawn.labels).item(), rel=1e-4
            )


def test_rise_is_the_mean_near_the_middle_less_the_middle() -> None:
    places = torch.tensor(landscape.coordinates(9), dtype=torch.float64)
    bowl = 2 + places[:, None] ** 2 + places[None, :] ** 2
    near = [r2 for r2 in (bowl - 2).flatten().tolist() if 0 < r2 <= 0.25]
    assert landscape.rise(bowl) == pytest.approx(sum(near) / len(near))
    assert landscape.rise(torch.full((9, 9), 2.0)) == 0


# --- features -------------------------------------------------------------------------------------------------------


def test_features_are_what_the_classifier_is_given() -> None:
    model, data = convnet(), ToyBatches()
    found = features.penultimate(model, data)
    drawn = list(data.epoch(0))
    model.eval()
    expected = torch.cat([model[:-1](one.images) for one in drawn]).detach()
    assert torch.allclose(found.values, expected, atol=1e-6)
    labels = torch.cat([one.labels for one in drawn])
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.right, torch.cat([model(one.images) for one in drawn]).argmax(1) == labels)
    assert not any(module._forward_hooks for module in model.modules())


def test_separation_and_plane_tell_tight_classes_from_none() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 8, generator=generator)
    none = features.Features(noise, labels, labels >= 0)
    tight = features.Features(20 * torch.eye(8)[labels] + noise, labels, labels >= 0)
    assert features.separation(none) < 1 < 5 < features.separation(tight)
    plane = features.project(tight)
    assert plane.method == "t-SNE" and plane.points.shape == (60, 2)
    points = torch.from_numpy(plane.points)
    distance = torch.cdist(points, points).fill_diagonal_(float("inf"))
    assert torch.equal(labels[distance.argmin(1)], labels)


def test_few_images_are_placed_by_their_principal_components() -> None:
    some = features.Features(torch.randn(6, 4), torch.arange(6) % 2, torch.ones(6, dtype=torch.bool))
    assert features.project(some).method == "PCA"
    assert features.project(some._replace(values=torch.randn(6, 1))).points.shape == (6, 2)


# --- the command ----------------------------------------------------------------------------------------------------


def test_another_score_keeps_the_settings_that_both_have() -> None:
    params = load(ROOT / "params.yaml")
    assert with_score(params, "epsd").prune.score == params.prune.score
    prospr = with_score(params, "prospr")
    assert prospr.prune.score == {**params.prune.score, "name": "prospr"}
    assert with_score(params, "random").prune.score == {"name": "random"}
    assert prospr.objective == params.objective and prospr.prune.sparsity == params.prune.sparsity
    assert not prospr.prune.compare


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with params.yaml and the digits prepared; whoever reads the test split there fails."""
    from epsd.datasets.digits import Digits
    from epsd.preparing.write import prepare

    folder = tmp_path_factory.mktemp("analysis")
    tree = read_yaml(ROOT / "params.yaml")
    small = {"train.epochs": 3, "train.batch_size": 16, "prune.batch_size": 16, "architecture.width": 0.5}
    small |= {"data.limit": 20, "data.validation": 0.2}
    for key, value in (small | {"prune.sparsity": 0.8, "prune.score.steps": 1, "threads": 1}).items():
        override(tree, key, value)
    (folder / "params.yaml").write_text(json.dumps(parse(tree).model_dump()))
    (folder / "dvc.yaml").touch()
    prepare(Digits()(), folder / artifacts.DATA, limit=20, validation=0.2, test=0.2, dataset={"name": "digits"})
    for kind in ("images", "labels"):
        (folder / artifacts.DATA / f"test_{kind}.npy").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("EPSD_QUIET", "1")
        patch.delenv("DVC_ROOT", raising=False)
        yield folder


@pytest.fixture(scope="module")
def done(project: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One analysis with two methods and two seeds, and what it printed."""
    import contextlib
    import io

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = cli.main(["analyse", "--with", "random,epsd", "--epochs", "2", "--seeds", "2", "--points", "3"])
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    return SimpleNamespace(status=status, out=said.getvalue(), folder=project / "artifacts" / "analysis")


def test_one_command_gives_every_measure_for_every_method_and_seed(done: SimpleNamespace) -> None:
    assert done.status == 0
    summary = pd.read_csv(done.folder / "summary.csv")
    assert summary[["method", "seed"]].values.tolist() == [["epsd", 0], ["random", 0], ["epsd", 1], ["random", 1]]
    once = {"landscape/rise", "features/separation"}  # of the first seed
    assert not summary.drop(columns=list(once)).isna().any().any()
    assert summary.loc[summary.seed == 0, list(once)].notna().all().all()
    assert (summary[summary.method == "epsd"]["mask/jaccard_epsd"] == 1).all()
    assert (summary[summary.method == "random"]["mask/jaccard_epsd"] < 0.5).all()
    assert summary["val/top1"].between(0, 1).all() and summary["calibration/brier"].between(0, 2).all()
    history = pd.read_csv(done.folder / "history.csv")
    assert len(history) == 2 * 2 * 2
    assert history[history.epoch == 1].kl_epochs.isna().all() and history[history.epoch == 2].kl_epochs.notna().all()
    last = history[history.epoch == 2].set_index(["method", "seed"])
    expected = summary.set_index(["method", "seed"])["distillation/kl_views"]
    assert last.kl_views.to_dict() == pytest.approx(expected.to_dict())


def test_layers_say_what_of_each_mask_is_in_effect_beside_random_erk(done: SimpleNamespace) -> None:
    layers, summary = (pd.read_csv(done.folder / f"{name}.csv") for name in ("layers", "summary"))
    assert (done.folder / "layers.png").stat().st_size > 0
    for (method, seed), mine in layers.groupby(["method", "seed"]):
        row = summary[(summary.method == method) & (summary.seed == seed)].iloc[0]
        assert row["mask/effective_sparsity"] == pytest.approx(1 - mine.on_path.sum() / mine.total.sum())
        assert row["mask/live_channels"] == pytest.approx(mine.live.sum() / mine.channels.sum())
        assert row["mask/gini"] == pytest.approx(mine.gini.mean())
        assert (mine.density == mine.kept / mine.total).all() and (mine.on_path <= mine.kept).all()
        assert (mine.random_erk_density * mine.total).sum() == pytest.approx(mine.kept.sum())


def test_table_and_markdown_agree_with_the_summary(done: SimpleNamespace) -> None:
    summary = pd.read_csv(done.folder / "summary.csv")
    top1 = f"{summary[summary.method == 'epsd']['val/top1'].mean():.4f}"
    markdown = (done.folder / "summary.md").read_text()
    (row,) = [line for line in markdown.splitlines() if "validation top-1" in line]
    assert row.startswith(f"| validation top-1 (share right) | {top1} ± ")
    assert "over 2 seeds" in markdown and "`cskd`" in markdown
    assert "validation top-1" in done.out and top1 in done.out
    assert "4 trainings of 2 epochs" in done.out


def test_slices_and_pairs_are_written(done: SimpleNamespace) -> None:
    slices = pd.read_csv(done.folder / "landscape.csv")
    assert len(slices) == 2 * 9 and set(slices.method) == {"epsd", "random"} and set(slices.seed) == {0}
    pairs = pd.read_csv(done.folder / "overlap.csv").set_index(["method", "other"])
    assert pairs.jaccard["epsd", "epsd"] == 1
    assert pairs.jaccard["epsd", "random"] == pytest.approx(pairs.expected["epsd", "random"], abs=0.05)


@pytest.mark.parametrize(
    "name", ["overlap", "layers", "trainability", "distillation", "calibration", "landscape", "features"]
)
def test_every_figure_has_content(done: SimpleNamespace, name: str) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(done.folder / f"{name}.png").convert("L"))
    assert (pixels < 200).mean() > 0.01
    assert len(np.unique(pixels)) > 30


def test_one_run_holds_figures_curves_and_pictures(done: SimpleNamespace, project: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, "tags.kind = 'analysis'")
    summary = pd.read_csv(done.folder / "summary.csv").groupby("method").mean()
    for method in ("epsd", "random"):
        for name in ("trainability/grad_norm", "calibration/ece", "calibration/brier", "landscape/rise"):
            assert run.data.metrics[f"{method}/{name}"] == pytest.approx(summary.loc[method, name])
        curve = client.get_metric_history(run.info.run_id, f"{method}/distillation/kl_same_class")
        assert sorted(point.step for point in curve) == [1, 2]
    assert run.info.status == "FINISHED"
    assert run.data.params["prune.sparsity"] == "0.8" and run.data.params["analyse.epochs"] == "2"
    assert run.data.tags["mlflow.source.name"] == "epsd analyse"
    listed = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert {"overlap.png", "landscape.png", "features.png", "analysis", "params.yaml"} <= listed


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["analyse", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def test_what_another_analysis_left_goes(
    done: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("landscape.csv", "features.png", "mine.csv", "summary.csv"):
        (tmp_path / name).write_text("old")
    short = ["analyse", "--with", "random", "--epochs", "1", "--points", "0"]
    monkeypatch.setattr(report.Report, "write", functools.partialmethod(report.Report.write, tmp_path))
    assert cli.main(short) == 0
    assert {"landscape.csv", "features.png"}.isdisjoint(path.name for path in tmp_path.iterdir())
    assert (tmp_path / "mine.csv").read_text() == "old" != (tmp_path / "summary.csv").read_text()


def test_no_method_pays_for_the_first_call(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def examine(*_: object, **__: object) -> None:
        calls.append("examine")
        raise AnalysisError("enough")

    monkeypatch.setattr("epsd.analysis.command.pruned", lambda *_: calls.append("warm up"))
    monkeypatch.setattr("epsd.analysis.command.examine", examine)
    assert cli.main(["analyse"]) == 1
    assert calls == ["warm up", "examine"]


def test_sigterm_ends_in_order(project: Path) -> None:
    command = [warm.python(), "-m", "epsd.cli", "analyse", "--with", "random", "--epochs", "500"]
    environment = {**os.environ, "EPSD_QUIET": "0", "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it is at work
        process.terminate()
        _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error.splitlines()[-1] == "analyse: stopped by SIGTERM; nothing was written."


def test_an_unknown_score_is_named_with_the_valid_ones(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["--with", "prospr,snipp"], capsys)
    assert "unknown 'snipp'" in line and "Did you mean 'snip'" in line
    assert all(name in line for name in SCORES)


def test_the_network_has_to_be_in_the_middle(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "odd" in refused(["--points", "4"], capsys)
    assert "odd" in refused(["--points", "-3"], capsys)


def test_no_validation_split_is_an_error_and_no_reason_to_read_the_test_split(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = artifacts.read_json(project / artifacts.DATA_INDEX)
    without = {**index, "sizes": {**index["sizes"], "validation": 0}}
    try:
        artifacts.write_json(project / artifacts.DATA_INDEX, without)
        assert "no validation split" in refused([], capsys)
    finally:
        artifacts.write_json(project / artifacts.DATA_INDEX, index)


def test_a_folder_that_cannot_be_written_is_found_before_any_work(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "in the way").write_text("")
    monkeypatch.setattr("epsd.analysis.command.FOLDER", Path("in the way"))
    assert "in the way: cannot be written" in refused([], capsys)


@pytest.mark.parametrize("note", [{"name": "cifar10"}, None])
def test_data_made_from_something_else_are_refused(
    note: dict[str, str] | None, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None: what `prepare` wrote before it noted where the images came from."""
    index = artifacts.read_json(project / artifacts.DATA_INDEX)
    settings = {key: value for key, value in index["settings"].items() if key != "dataset"}
    try:
        artifacts.write_json(
            project / artifacts.DATA_INDEX, {**index, "settings": settings | ({"dataset": note} if note else {})}
        )
        line = refused([], capsys)
        assert (
            f"made with dataset.name {note['name'] if note else 'unset'}, not digits. Run `dvc repro prepare`" in line
        )
    finally:
        artifacts.write_json(project / artifacts.DATA_INDEX, index)


def test_data_have_to_be_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    assert "dvc repro prepare" in refused([], capsys)
    (tmp_path / "params.yaml").unlink()
    assert "params.yaml" in refused([], capsys)
