"""Recording, registering, promoting and finding models in a real store."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from epsd.evaluation.servable import asking
from epsd.project import runtime
from epsd.tracking import models, registered, track
from epsd.tracking.addresses import tracking_uri
from epsd.tracking.store import Store
from handed_on import asked, model_folder, servable


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models."""
    return [model_folder(tmp_path_factory.mktemp("models") / str(seed), seed) for seed in range(2)]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A project of its own."""
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "dvc.yaml").touch()
    shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    runtime._said.clear()
    return tmp_path


def evaluated(folder: Path | None, name: str = "digits-epsd", run_id: str | None = None, top1: float = 0.9) -> Any:
    """A session as evaluate has it; the tracker, and the version that it was given."""
    with track(
        "evaluate", experiment="epsd", name=name, run_id=run_id, params={"a": 1}, tags={"kind": "pipeline"}
    ) as t:
        t.metrics({"test/top1": top1, "model/sparsity": 0.95})
        return t, t.model(folder) if folder else None


def client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri())


def test_an_evaluated_model_is_registered_once_and_a_candidate(folders: list[Path]) -> None:
    tracker, version = evaluated(folders[0])
    assert version == "1"
    _, again = evaluated(folders[0], run_id=tracker.run_id)
    assert again == "1"
    _, other = evaluated(folders[1], run_id=tracker.run_id, top1=0.95)
    assert other == "2"
    found = client().get_model_version_by_alias("epsd", "candidate")
    assert (str(found.version), found.run_id, found.tags["test/top1"]) == ("2", tracker.run_id, "0.9500")
    run = client().get_run(tracker.run_id)
    assert len(run.outputs.model_outputs) == 2
    model = client().get_logged_model(found.source.removeprefix("models:/"))
    assert {metric.key: metric.value for metric in model.metrics} == {"test/top1": 0.95, "model/sparsity": 0.95}
    assert model.params == {"a": "1"}


def test_what_is_found_again_is_the_model(folders: list[Path]) -> None:
    tracker, _ = evaluated(folders[1])
    images = torch.randint(0, 256, (3, 1, 4, 4)).float().numpy()
    for wanted in ("candidate", tracker.run_id, tracker.run_id[:6], "digits-epsd"):
        folder = registered.fetch(wanted)
        assert folder != folders[1]
        assert asked(folder)(images) == pytest.approx(asking(servable(1))(images), abs=1e-6)
        assert models._words(folder)["run_id"] == tracker.run_id


def test_a_run_is_promoted_by_id_beginning_or_name(folders: list[Path]) -> None:
    first, _ = evaluated(folders[0], "first")
    second, _ = evaluated(folders[1], "second")
    for wanted, number in {first.run_id: "1", second.run_id[:7]: "2", "first": "1", "candidate": "2"}.items():
        assert registered.promote(wanted).number == number
        assert str(client().get_model_version_by_alias("epsd", "champion").version) == number


def test_a_mistake_lists_the_recent_runs(folders: list[Path]) -> None:
    for kind in ("search", "trial", "study", "analysis"):  # whatever trained no model to serve
        with track("tune", experiment="epsd", name=kind, params={}, tags={"kind": kind}):
            pass
    with pytest.raises(registered.RegistryError, match="There are no runs yet"):
        registered.promote("anything")
    with pytest.raises(registered.RegistryError, match="there is no champion yet"):
        registered.fetch("champion")
    tracker, _ = evaluated(folders[0], "the-run")
    with pytest.raises(registered.RegistryError, match=f"no run 'zz'.* {tracker.run_id[:8]} \\(the-run\\)"):
        registered.promote("zz")
    for short in ("", tracker.run_id[:3]):
        with pytest.raises(registered.RegistryError, match=f"no run '{short}'"):
            registered.promote(short)
    bare, _ = evaluated(None, "bare")
    with pytest.raises(registered.RegistryError, match="'bare' has no registered model: `dvc repro evaluate`"):
        registered.promote("bare")
    twin, _ = evaluated(folders[1], "the-run")
    with pytest.raises(registered.RegistryError) as several:
        registered.promote("the-run")
    assert twin.run_id[:8] in str(several.value) and tracker.run_id[:8] in str(several.value)
    assert bare.run_id[:8] not in str(several.value).split("Recent")[0]
    assert "\n" not in str(several.value)


def test_a_store_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MAX_RETRIES": "0", "TIMEOUT": "2"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(registered.RegistryError, match=r"^http://127\.0\.0\.1:9: ") as error:
        registered.promote("candidate")
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_model_waits_while_the_store_is_away(
    folders: list[Path], project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(folders[0], project / "model"))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_connect", lambda self: 1 / 0)
        _, version = evaluated(copy)
    assert version is None
    assert "cannot be used" in capsys.readouterr().err
    shutil.rmtree(copy)
    later, _ = evaluated(None, "later")
    found = client().get_model_version_by_alias("epsd", "candidate")
    assert found.run_id != later.run_id
    assert client().get_run(found.run_id).data.metrics["test/top1"] == 0.9
    assert (registered.fetch("candidate") / "data" / "onnx" / "model.onnx").is_file()
    assert not list(Path(".epsd/spool").glob("*.jsonl"))


def test_a_version_has_an_address(folders: list[Path]) -> None:
    first, _ = evaluated(folders[0], "first")
    second, _ = evaluated(folders[1], "second")
    for address, tracker in {"models:/epsd/1": first, "models:/epsd@candidate": second}.items():
        assert models._words(registered.fetch(address))["run_id"] == tracker.run_id
    assert registered.promote("models:/epsd/1").run_id == first.run_id
    assert models._words(registered.fetch("models:/epsd@champion"))["run_id"] == first.run_id
    with pytest.raises(registered.RegistryError, match=r"models:/other/1: no address .* Valid: models:/NAME@ALIAS"):
        registered.fetch("models:/other/1")
    with pytest.raises(registered.RegistryError, match="there is no champion of epsd-detector yet"):
        registered.fetch("models:/epsd-detector@champion")
    with pytest.raises(registered.RegistryError, match="'first' has no registered model epsd-detector: `dvc repro det"):
        registered.fetch("first", "epsd-detector")
