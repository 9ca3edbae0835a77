"""The pages of the MLflow UI that a user opens, in a real browser. Pictures of them go to $EPSD_SCREENSHOTS."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from epsd.figures import style as figures
from epsd.tracking import pages, track, ui_address
from handed_on import model_folder
from tracking_server import free_port, serving

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]
EPOCHS = 8


class Site(NamedTuple):
    """A running `mlflow ui`, and what is in its store."""

    address: str
    home: str
    runs: dict[str, str]
    folder: Path


def params(score: str) -> dict[str, object]:
    return {"prune.score.name": score, "objective.name": "cskd", "prune.sparsity": 0.95, "seed": 0}


def record(score: str, folder: Path) -> str:
    """A run as the stages leave it: curves, results, a figure, a description."""
    history: dict[str, list[float]] = {"train/top1": [], "val/top1": [], "train/cross_entropy": [], "val/nll": []}
    name, said = f"digits-{score}-cskd-s0.95-seed0", f"`{score}` removed 95 % of its weights before training."
    tags = {"kind": "pipeline", "method": f"{score}+cskd"}
    with track("train", experiment="epsd", name=name, params=params(score), tags=tags, description=said) as run:
        for epoch in range(1, EPOCHS + 1):
            top1, loss = 1 - 0.9**epoch, 2.3 * 0.8**epoch
            values = dict(zip(history, (top1, top1 - 0.05, loss, loss + 0.1), strict=True))
            run.metrics({**values, "train/loss": loss + 0.2, "train/distillation": 0.2}, step=epoch)
            for key, value in values.items():
                history[key].append(value)
        run.metrics({"cost/seconds": 12.5, "test/top1": 0.9725 if score == "epsd" else 0.9310, "test/ece": 0.03})
        run.metrics({"test/balanced_accuracy": 0.97, "test/macro_f1": 0.96})
        run.metrics({"model/compression": 17.2, "detect/map50": 0.9612, "deploy/int8_top1": 0.97})
        run.metrics({f"latency/{form}_batch1_one_thread_ms": 0.3 for form in ("torch", "onnx", "int8")})
        figures.save(figures.curves(figures.history_panels(history)), folder / "curves.png")
        run.artifact(folder / "curves.png")
        if score == "epsd":
            run.model(model_folder(folder / "made"))
    return str(run.run_id)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Site]:
    """Two runs, one with a registered model, served as `make ui` serves them."""
    folder = tmp_path_factory.mktemp("ui")
    shutil.copy(empty_store, folder)
    (folder / "dvc.yaml").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("DVC_ROOT", raising=False)
        runs = {score: record(score, folder) for score in ("epsd", "random")}
        port = free_port()
        home = ui_address(port)
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", str(folder / "mlruns")]
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), *store]
    address = f"http://127.0.0.1:{port}"
    with serving(command, address, folder / "log"):
        yield Site(address, home, runs, folder)


def opened(site: Site, url: str, name: str, height: int = 1000, seconds: int = 30, width: int = 1600) -> str:
    """The page as the browser shows it, as HTML; its picture is kept as NAME.png."""
    picture = Path(os.environ.get("EPSD_SCREENSHOTS") or site.folder).resolve() / f"{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    calm = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *calm,
        f"--user-data-dir={site.folder / 'browser'}", f"--window-size={width},{height}",
        f"--virtual-time-budget={seconds * 1000}", "--dump-dom", f"--screenshot={picture}", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 20_000
    return html.unescape(done.stdout)


def text(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", page, flags=re.S))


def test_the_table_of_runs_has_the_columns_that_matter(site: Site) -> None:
    page = opened(site, site.home, "runs", width=3000)
    shown = set(re.findall(r'col-id="([^"]+)"', page))
    # columns beyond the window's edge are not drawn: parameters come last
    assert {column for column in pages.COLUMNS if column.startswith("metrics.")} <= shown
    assert "params.`prune.score.name`" in shown or "params.`objective.name`" in shown
    assert "attributes.`Source`" not in shown and "attributes.`Dataset`" not in shown
    said = text(page)
    assert "epsd-cskd-" in said and "random-cskd-" in said and "0.9725" in said
    assert "Error loading shared view" not in said


def test_train_and_validation_are_in_one_chart(site: Site) -> None:
    page = opened(site, f"{site.home}&compareRunsMode=CHART", "charts", height=2600, seconds=120)
    said = text(page)
    assert "Results" in said and "Curves" in said
    assert "(train/top1)" in said and "(val/top1)" in said  # two lines of one chart are named by run and metric
    assert "(train/cross_entropy)" in said and "(val/nll)" in said
    assert page.count('class="scatterlayer') >= 4 and page.count('class="barlayer') >= 5  # drawn


def test_runs_side_by_side(site: Site) -> None:
    chosen = json.dumps(list(site.runs.values()), separators=(",", ":"))
    said = text(opened(site, f'{site.address}/#/compare-runs?runs={chosen}&experiments=["1"]', "compare", height=1600))
    assert "Comparing 2 Runs" in said
    for expected in ("prune.score.name", "epsd", "random", "test/top1", "0.973", "0.931"):
        assert expected in said, expected


def test_a_run_says_what_it_was(site: Site) -> None:
    said = text(opened(site, f"{site.address}/#/experiments/1/runs/{site.runs['epsd']}", "run", height=1600))
    assert "removed 95 % of its weights before training" in said
    assert "Registered models" in said and "detect/map50" in said and "prune.score.name" in said


def test_a_figure_is_shown(site: Site) -> None:
    url = f"{site.address}/#/experiments/1/runs/{site.runs['epsd']}/artifacts/curves.png"
    page = opened(site, url, "figure")
    assert "curves.png" in text(page)
    assert re.search(r'<img[^>]+src="blob:', page), "the picture is not drawn"


def test_the_model_has_a_page(site: Site) -> None:
    said = text(opened(site, f"{site.address}/#/models/epsd/versions/1", "model"))
    assert "Version 1" in said and "candidate" in said
    assert "inputs" in said.lower() and "outputs" in said.lower()  # its signature


def test_runs_are_found_by_what_they_are(site: Site) -> None:
    """The language of the UI's search field."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{site.folder}/mlflow.db")
    for query in (
        "params.\"prune.score.name\" = 'epsd'",
        "params.`prune.score.name` = 'epsd'",
        "tags.method LIKE 'epsd%'",
    ):
        (run,) = client.search_runs(["1"], query)
        assert run.info.run_id == site.runs["epsd"]
    query = "metrics.`test/top1` > 0.9 and tags.kind = 'pipeline' and params.`prune.sparsity` = '0.95'"
    assert {run.info.run_id for run in client.search_runs(["1"], query)} == set(site.runs.values())
