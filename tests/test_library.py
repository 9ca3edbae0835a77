"""docs/library.md runs as it stands, and shows every public name at work."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import epsd
from conftest import ROOT
from epsd.architectures import built
from epsd.masks import Mask, prunable
from epsd.project import artifacts

PAGE = ROOT / "docs" / "library.md"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network of which 90 % was pruned, as `train` leaves it."""
    monkeypatch.chdir(tmp_path)
    choice = {"name": "resnet", "depth": 8, "width": 0.5}
    torch.manual_seed(0)
    net = built(choice, 3, (1, 8, 8))
    Mask.from_scores({name: weight.detach().abs() for name, weight in prunable(net).items()}, 0.9).apply_(net)
    card = {"architecture": choice, "num_classes": 3, "class_names": ["a", "b", "c"], "image_shape": [1, 8, 8]}
    artifacts.save_model(net, artifacts.MODEL, {**card, "mean": [0.3], "std": [0.4]})
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_as_it_stands(project: Path) -> None:
    text = re.sub(r"```.*", "", PAGE.read_text(encoding="utf-8"))
    test = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 80
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=failures.append)
    assert not failures, "".join(failures)


def test_every_public_name_is_shown_at_work() -> None:
    """In a line of code other than its import; and nothing is shown that is not public."""
    lines = re.findall(r"^(?:>>>|\.\.\.) (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    used = "\n".join(line for line in lines if not line.startswith("from epsd"))
    assert [name for name in epsd.__all__ if not re.search(rf"\b{name}\b", used)] == []
    imported = {name for line in lines if line.startswith("from epsd") for name in re.findall(r"\w+", line)[3:]}
    assert imported == set(epsd.__all__)
    table = PAGE.read_text(encoding="utf-8").partition("The examples share")[0]
    assert [name for name in epsd.__all__ if not re.search(rf"\b{name}\b", table)] == []


def test_every_public_name_is_there_under_its_name() -> None:
    for name in epsd.__all__:
        assert getattr(epsd, name).__doc__, name
    with pytest.raises(AttributeError, match=r"no attribute 'Nothing'. It has: Batch"):
        _ = epsd.Nothing
