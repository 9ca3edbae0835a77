"""`epsd report`: one page that needs no network and holds all that it names."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from epsd.cli import main
from epsd.figures import page
from epsd.figures.style import figure_of_size, save
from epsd.tracking import recording

PARAMS: dict[str, Any] = {
    "seed": 0, "prune.sparsity": 0.9, "prune.score.name": "epsd", "objective.name": "cskd",
    "prune.structure": "weights", "prune.macs": 0.25,
}  # fmt: skip
FORMS = {f"latency/{form}_batch1_one_thread_ms": ms for form, ms in (("torch", 0.4), ("onnx", 0.1))}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two runs, one of them with a hostile name of its score and a picture."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("DVC_ROOT", raising=False)
        patch.chdir(folder)
        (folder / "dvc.yaml").touch()
        save(figure_of_size(1, 1), folder / "density.png")
        for number, score in enumerate(("epsd", "<script>alert(1)</script>")):
            tags = {"kind": "pipeline", "data.digest": "d"}
            params = {**PARAMS, "prune.score.name": score}
            with recording.track("train", experiment="mine", name=f"run-{number}", params=params, tags=tags) as run:
                run.metrics({"test/top1": 0.9 - number / 10, "model/parameters_nonzero": 1000.0 + number, **FORMS})
                run.metrics({"deploy/onnx_top1": 0.9})
                for epoch in (1, 2):
                    run.metrics({"val/top1": epoch / 4, "val/nll": 1 / epoch}, step=epoch)
                run.artifact(folder / "density.png")
    return folder


class Reader(HTMLParser):
    """Tags that load something, and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "data")]


def test_the_page_is_whole_and_loads_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(project)
    assert main(["report", "mine"]) == 0
    assert capsys.readouterr().out.startswith("report.html: 2 runs, ")
    text = (project / "report.html").read_text()
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in Reader(text).loads)
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert text.count("data:image/png") == 3 + 2, "size, latency, curves; one picture of each run"
    targets = re.findall(r'href="#(\w+)"', text)
    assert len(targets) == 2 and all(f'id="{target}"' in text for target in targets)
    assert "share of multiply-adds" not in text, "no network is narrow"
    assert "<td>prune.score.name</td>" in text and "<td>prune.sparsity</td>" not in text, "what differs, and no more"
    assert "dvc repro" in text


def test_no_runs_are_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert main(["report", "mine", "--where", "seed=7", "--out", "none.html"]) == 1
    assert "no finished runs" in capsys.readouterr().err
    assert not (project / "none.html").exists()


def test_a_run_of_a_study_is_made_by_the_study() -> None:
    row = {"run_id": "r", "tags.git.commit": "c0ffee", "tags.study": "digits"}
    assert page.commands(row) == ["git checkout c0ffee", "epsd study digits"]
