"""What the documents promise: the example runs as printed, links lead somewhere, commands and messages exist."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from epsd.cli import parser
from epsd.masks import Mask, prunable
from epsd.project.params import flatten, read_yaml
from epsd.tracking import pages
from toys import ToyBatches, convnet

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def example(root: Path) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    return str(blocks[0])


def test_the_library_example_runs_as_printed(root: Path) -> None:
    """A torchvision ResNet and a plain DataLoader of (image, label) pairs."""
    torch.manual_seed(0)
    data = ToyBatches(size=96, num_classes=10, shape=(3, 32, 32))
    names: dict[str, Any] = {"dataset": TensorDataset(data.images, data.labels)}
    exec(example(root), names)
    mask, model, history = names["mask"], names["model"], names["history"]
    assert mask.kept == mask.total - round(0.95 * mask.total)
    assert all(not p[~mask.keep[name]].any() for name, p in model.named_parameters() if name in mask.keep)
    assert len(history) == 2
    assert all(math.isfinite(record["train/loss"]) for record in history)


def test_the_mask_holds_in_the_loop_of_ones_own(root: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    model, data = convnet(), ToyBatches()
    mask = Mask.from_scores({name: p.detach().abs() for name, p in prunable(model).items()}, 0.8)
    loader = DataLoader(TensorDataset(data.images, data.labels), batch_size=12)
    before = model[0].weight.detach().clone()
    exec(blocks[1], {"torch": torch, "model": model, "mask": mask, "loader": loader})
    assert Mask.of(model) == mask and not torch.equal(model[0].weight, before)


def test_the_three_lines_work_with_a_plain_loss_too(root: Path) -> None:
    data = ToyBatches(size=96, num_classes=10, shape=(3, 32, 32))
    code = (
        example(root).replace("CsKd()", "torch.nn.functional.cross_entropy").replace("resnet18", "mobilenet_v3_small")
    )
    names: dict[str, Any] = {"dataset": TensorDataset(data.images, data.labels)}
    exec(code, names)
    assert names["mask"].sparsity == pytest.approx(0.95, abs=1e-4)


DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md")))


@pytest.fixture(params=DOCUMENTS)
def document(request: pytest.FixtureRequest, root: Path) -> Path:
    return root / str(request.param)


def slug(heading: str) -> str:
    """How a forge names the place of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(document: Path) -> set[str]:
    prose = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {slug(found) for found in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)}


def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, place = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{document.name}: {target}"
        assert not place or place in headings(file), f"{document.name}: {target}"


def commands(document: Path) -> list[str]:
    """What a reader is told to type, in console blocks and inline."""
    text = document.read_text(encoding="utf-8")
    typed = [
        line.removeprefix("$ ").partition("  #")[0]
        for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("$ ")
    ]
    inline = re.findall(r"`((?:epsd|dvc|make) [^`\s]+ [^`\n]+)`", text)  # `epsd study` alone is a name, not a command
    return [part.strip() for line in [*typed, *inline] for part in line.split("&&") if "..." not in part]


def test_commands_exist_with_their_arguments(document: Path, root: Path) -> None:
    """Of epsd and dvc by their real parsers, of make by the Makefile, of python by the script."""
    from dvc.cli.parser import get_main_parser

    targets = set(re.findall(r"^(\w+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    parsers = {"epsd": parser(), "dvc": get_main_parser()}
    for command in commands(document):
        name, *arguments = shlex.split(command)
        try:
            if name in parsers:
                parsers[name].parse_args([re.sub(r"^[NMKP]$", "1", argument) for argument in arguments])
        except (SystemExit, Exception) as error:
            pytest.fail(f"{document.name}: {command}: {error}")
        if name == "make":
            assert arguments[0] in targets, f"{document.name}: {command}"
        if name == "python" and not arguments[0].startswith(("-", "deployed/")):
            assert (root / arguments[0]).is_file(), f"{document.name}: {command}"


def test_the_commands_of_the_documents_are_found(root: Path) -> None:
    found = {command for name in DOCUMENTS for command in commands(root / name)}
    assert {"make repro", "make test", "epsd predict photo.png", "dvc repro detect"} <= found


def test_make_compare_shows_columns_that_there_are(root: Path) -> None:
    """Parameters of params.yaml, metrics of the table of runs: DVC has a dot where MLflow has a slash."""
    text = (root / "Makefile").read_text(encoding="utf-8")
    (columns,) = re.findall(r"^COLUMNS := (.*)$", text, re.MULTILINE)
    metrics = [name.partition("`")[2].strip("`").replace("/", ".") for name in pages.COLUMNS]
    known = ["Experiment", *metrics, *(name for name, _ in flatten(read_yaml(root / "params.yaml")))]
    for column in re.split(r"\|(?![^(]*\))", columns):
        assert any(re.search(rf"(^|\.)({column})$", name) for name in known), column


def test_every_page_is_in_the_index_and_the_front_page_is_short(root: Path) -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in DOCS.glob("*.md") if path.name != "README.md" and f"({path.name})" not in index] == []
    assert (root / "README.md").stat().st_size <= 8 * 1024


def test_errors_that_have_a_remedy_are_still_said() -> None:
    """Each line of docs/troubleshooting.md quotes what some message in the code says."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = [row.partition(" | ")[0].strip("` ") for row in re.findall(r"^\| (`.*)$", page, re.MULTILINE)]
    assert len(quotes) > 20
    said = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src" / "epsd").rglob("*.py")))
    words = re.sub(r'"\s*\n\s*f?"', "", said)  # a message that is broken over lines
    for quote in quotes:
        assert quote in words, quote
