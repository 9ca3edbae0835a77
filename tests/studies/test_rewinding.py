"""Prune, then distill: rounds, rewound learning rates, selection by validation, and going on after any kill."""

import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from conftest import ROOT
from epsd.compute.cost import Meter
from epsd.evaluation.evaluate import evaluate
from epsd.masks import Mask, MaskError, prunable
from epsd.project.recipes import Recipe
from epsd.registry import ParamsError, choose
from epsd.studies.prune_then_distill.rewinding import Course, Rewinding, RewindingError, lasting, rewound
from epsd.training.checkpoints import CheckpointError
from epsd.training.record import Record
from epsd.training.schedule import lr_at
from epsd.types import Batch
from toys import Killed, ToyBatches, convnet, stop_after, timeless

RECIPE = Recipe(epochs=4, lr=0.05, schedule="cosine", precision="fp32")
SETTINGS = Rewinding(round_epochs=2, student_epochs=3)
SPARSITY = 0.45  # three rounds: 0.8, 0.64, 0.55
EPOCHS = 4 + 3 * 2 + 3


class Outcome(NamedTuple):
    """Both networks under the one mask that the rounds found, and what is known of all phases."""

    teacher: nn.Module
    student: nn.Module
    mask: Mask
    history: list[Record]
    chosen: list[Record]


def run(*, sparsity: float = SPARSITY, teacher: nn.Module | None = None, **more: Any) -> Outcome:
    """The student has the same architecture, under the mask that was found."""
    common = {
        "settings": SETTINGS,
        "recipe": RECIPE,
        "train": ToyBatches(),
        "validation": ToyBatches(size=24),
        "seed": 3,
        "mark": "",
        "on_epoch": lambda record: None,
    }
    with tempfile.TemporaryDirectory() as folder:
        course = Course(**{**common, "folder": Path(folder), **more})
        teacher, student = teacher or convnet(), convnet()
        mask = course.prune(teacher, sparsity)
        course.distil(teacher, student, mask)
    return Outcome(teacher, student, mask, course.history, course.chosen)


@pytest.fixture(scope="module")
def whole() -> Outcome:
    return run()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "share", "expected"),
    [
        (0.36, 0.2, [0.8, 0.64]),  # the numbers of rounds of the paper: 2, 4 and 7 for 36, 59 and 79 %
        (0.59, 0.2, [0.8, 0.64, 0.512, 0.41]),
        (1 - 0.8**7, 0.2, [0.8**k for k in range(1, 8)]),
        (0.95, 0.5, [0.5, 0.25, 0.125, 0.0625, 0.05]),
        (0.0, 0.2, []),
    ],
)
def test_densities(sparsity: float, share: float, expected: list[float]) -> None:
    assert Rewinding(share=share).densities(sparsity) == pytest.approx(expected)


def test_epochs_are_the_official_shares_of_the_recipe() -> None:
    assert Rewinding().epochs(Recipe(epochs=200)) == (200, 130, 200)
    assert Rewinding(teacher_epochs=100, round_epochs=50).epochs(Recipe(epochs=60)) == (100, 50, 60)
    with pytest.raises(RewindingError, match="round_epochs: 9 is more than the teacher's 4"):
        Rewinding(round_epochs=9).epochs(Recipe(epochs=4))


def test_a_round_runs_through_the_end_of_the_schedule() -> None:
    dense = Recipe(epochs=10, lr=1.0, schedule="step", milestones=[0.5, 0.8], warmup_epochs=1)
    part = rewound(dense, 6)
    assert part.epochs == 6
    assert [lr_at(part, step, 2) for step in range(12)] == [lr_at(dense, step, 2) for step in range(8, 20)]
    assert part.weight_decay == dense.weight_decay
    assert lr_at(lasting(dense, 20), 19, 1) == lr_at(dense, 9, 1)


@pytest.mark.parametrize(
    "bad", [{"share": 1.0}, {"alpha": 1.1}, {"temperature": 0.0}, {"select": "test"}, {"rounds": 3}]
)
def test_bad_settings_name_the_key(bad: dict[str, object]) -> None:
    with pytest.raises(ParamsError, match=rf"procedure.*{next(iter(bad))}"):
        choose({"it": Rewinding}, {"name": "it", **bad}, "procedure")


@pytest.mark.parametrize("sparsity", [1.0, -0.3, 0.9999])
def test_a_sparsity_that_cannot_be_is_refused_before_any_training(sparsity: float) -> None:
    class Never(ToyBatches):
        def epoch(self, *anything: object) -> Iterator[Batch]:  # type: ignore[override]
            raise AssertionError("it trained")

    with pytest.raises(MaskError, match="sparsity"):
        run(sparsity=sparsity, train=Never(), validation=Never())


def test_selection_by_validation_needs_validation() -> None:
    with pytest.raises(RewindingError, match=r"set data\.validation, or select: last"):
        run(validation=None)


# --- the procedure --------------------------------------------------------------------------------------------------


def test_each_round_removes_the_smallest_of_what_is_left(whole: Outcome) -> None:
    total = Mask.dense(convnet()).total
    assert whole.mask.kept == total - round(SPARSITY * total)
    for model in (whole.teacher, whole.student):
        kept = {name: weight != 0 for name, weight in prunable(model).items()}
        assert all(torch.equal(kept[name], keep) for name, keep in whole.mask.keep.items())
    phases = [record["train/phase"] for record in whole.history]
    assert phases == [0.0] * 4 + [1.0] * 2 + [2.0] * 2 + [3.0] * 2 + [4.0] * 3
    assert [record["epoch"] for record in whole.history] == list(range(1, EPOCHS + 1))


def test_weights_are_kept_from_round_to_round() -> None:
    """With a learning rate of almost 0 in every phase the masks are those of the initial magnitudes."""
    still = Recipe(epochs=1, lr=1e-30, weight_decay=0.0)
    found = run(recipe=still, settings=Rewinding(select="last"))
    weights = {name: weight.detach().abs() for name, weight in prunable(convnet()).items()}
    assert found.mask.jaccard(Mask.from_scores(weights, SPARSITY)) == 1.0
    assert same(found.student[0], found.teacher[0]), "neither has moved from the same start"


def test_rounds_continue_the_learning_rate_and_the_epochs_of_the_data() -> None:
    numbers: list[int] = []

    class Listening(ToyBatches):
        def epoch(self, number: int, *needs: object) -> object:
            numbers.append(number)
            return super().epoch(number, *needs)

    found = run(train=Listening(), sparsity=0.3, settings=Rewinding(select="last", student_epochs=1))
    assert numbers == list(range(4 + 2 * 3 + 1))
    rates = [record["train/lr"] for record in found.history]
    assert rates[4:7] == rates[7:10] == pytest.approx(rates[1:4]), "65 % of 4 epochs are 3"


def test_validation_chooses_the_weights(whole: Outcome) -> None:
    for phase, chosen in enumerate(whole.chosen):
        ranks = [(r["val/top1"], -r["val/nll"]) for r in whole.history if r["train/phase"] == phase]
        assert (chosen["val/top1"], -chosen["val/nll"]) == max(ranks)
    assert evaluate(whole.student, ToyBatches(size=24)).metrics["nll"] == pytest.approx(whole.chosen[-1]["val/nll"])


def test_the_last_epoch_where_asked() -> None:
    found = run(settings=Rewinding(round_epochs=2, student_epochs=3, select="last"), validation=None)
    assert [record["epoch"] for record in found.chosen] == [4, 6, 8, 10, 13]


def test_every_pass_is_counted(whole: Outcome) -> None:
    images = 48
    last = whole.history[-1]
    assert last["cost/images_backward"] == EPOCHS * images
    assert last["cost/images_forward"] == (EPOCHS + 3) * images, "the teacher's, while it teaches, too"
    assert last["cost/seconds"] == pytest.approx(sum(record["time/epoch"] for record in whole.history))


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["validation", "last"])
def test_it_goes_on_after_any_kill_to_the_same_bits(tmp_path: Path, select: str) -> None:
    """Killed at the end of every single epoch, one after the other."""
    settings = Rewinding(round_epochs=2, student_epochs=3, select=select)
    expected = run(settings=settings)
    for epoch in range(1, EPOCHS + 1):
        torch.manual_seed(epoch)
        with pytest.raises(Killed):
            run(settings=settings, folder=tmp_path, mark="m", on_epoch=stop_after(epoch))
    told: list[Record] = []
    meter = Meter()
    found = run(settings=settings, folder=tmp_path, mark="m", on_epoch=told.append, meter=meter)
    assert same(found.student, expected.student) and same(found.teacher, expected.teacher)
    assert timeless(found.history) == timeless(expected.history) == timeless(told)
    assert found.chosen == [found.history[int(record["epoch"]) - 1] for record in expected.chosen]
    assert meter.figures("cost/").items() <= found.history[-1].items()


def test_a_real_kill(tmp_path: Path, whole: Outcome) -> None:
    code = (
        "import json, sys, time\nfrom pathlib import Path\nimport torch\nimport studies.test_rewinding as t\n"
        "torch.set_num_threads(1)\n"
        "def say(record):\n    print(int(record['epoch']), flush=True)\n    time.sleep(float(sys.argv[2]))\n"
        "found = t.run(folder=Path(sys.argv[1]), mark='m', on_epoch=say)\n"
        "print(json.dumps({n: v.tolist() for n, v in found.student.state_dict().items()}))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": paths}
    process = subprocess.Popen([*command, "0.1"], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 6:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert (tmp_path / "course.safetensors").exists()
    again = subprocess.run([*command, "0"], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    weights = json.loads(again.stdout.splitlines()[-1])
    assert all(torch.equal(torch.tensor(weights[n]), v) for n, v in whole.student.state_dict().items())


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(folder=tmp_path, mark="one", on_epoch=stop_after(5))
    with pytest.raises(CheckpointError, match="belongs to other parameters"):
        run(folder=tmp_path, mark="two")


def test_the_model_given_is_the_one_that_is_trained() -> None:
    model = convnet()
    before = copy.deepcopy(model.state_dict())
    started = time.monotonic()
    found = run(teacher=model, sparsity=0, settings=Rewinding(select="last"), recipe=Recipe(epochs=1, lr=0.05))
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])
    assert found.mask.sparsity == 0
    assert 0 < found.history[-1]["cost/seconds"] < time.monotonic() - started
