import base64
import json
import zlib

import pytest

from epsd.tracking import pages, track
from epsd.tracking.addresses import tracking_uri


def test_the_packed_view_is_what_the_ui_unpacks():
    head, _, body = pages.packed(pages.view()).partition(";")
    assert head == "deflate"
    assert zlib.decompress(base64.b64decode(body)).decode() == pages.view()
    assert len(pages.tags()[pages.TAG]) < 5000


def test_every_chart_is_in_a_section_and_has_its_own_id():
    view = json.loads(pages.view())
    sections = {section["uuid"] for section in view["compareRunSections"]}
    ids = [chart["uuid"] for chart in view["compareRunCharts"]]
    assert len(set(ids)) == len(ids)
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} <= sections


@pytest.fixture
def client(tmp_path, monkeypatch, empty_store):
    import shutil

    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path)
    (tmp_path / "dvc.yaml").touch()
    return MlflowClient(tracking_uri=tracking_uri())


def session():
    with track("train", experiment="mine", name="a run"):
        pass


def test_a_new_experiment_has_the_view(client):
    session()
    assert pages.tags().items() <= client.get_experiment_by_name("mine").tags.items()


def test_an_old_view_is_renewed_and_what_a_user_set_stays(client):
    number = client.create_experiment("mine", tags={pages.TAG: "old", "mlflow.sharedViewState.theirs": "theirs"})
    client.set_experiment_tag(number, "mlflow.experimentKind", "genai_development")
    session()
    tags = client.get_experiment(number).tags
    assert tags[pages.TAG] == pages.tags()[pages.TAG]
    assert tags["mlflow.sharedViewState.theirs"] == "theirs"
    assert tags["mlflow.experimentKind"] == "genai_development"
