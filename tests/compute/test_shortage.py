"""A batch that is too large: known before it is tried, one line that says what would fit, or computed in parts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import ROOT
from epsd.compute import shortage
from epsd.compute.shortage import Need, OutOfMemory
from epsd.objectives import OBJECTIVES
from epsd.project.recipes import Recipe
from epsd.training.fit import fit
from epsd.training.record import Record
from epsd.types import Batch
from toys import ToyBatches, convnet

NAMES = sorted(OBJECTIVES)
CPU = torch.device("cpu")
QUICK = {"epochs": 3, "lr": 0.05, "precision": "fp32"}


def smooth() -> nn.Module:
    """Without batch statistics: parts and whole are the same there."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [2, 5])
def test_a_batch_in_parts_is_the_batch(name: str, parts: int) -> None:
    """PS-KD's memory, CS-KD's partners and DLB's last batch included; 5 parts of 12 images are not equal."""
    whole, pieces = smooth(), smooth()
    expected = fit(whole, ToyBatches(), objective=OBJECTIVES[name](), recipe=Recipe(**QUICK))
    history = fit(pieces, ToyBatches(), objective=OBJECTIVES[name](), recipe=Recipe(**QUICK, accumulate=parts))
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(pieces.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    for record, other in zip(expected, history, strict=True):
        for name in ("time/epoch", "cost/seconds"):
            del record[name], other[name]
        assert other == pytest.approx(record, rel=1e-3, abs=1e-5)


def test_parts_of_dlb_look_back_at_the_last_batch_alone() -> None:
    """Also where that one, the short last of an epoch, had fewer parts."""
    dlb, seen = OBJECTIVES["dlb"](), {}
    dlb.begin("train", 0, 3)
    last: list[list[int]] = []
    for size in (12, 4, 12):
        batch = Batch(
            torch.randn(size, 3), torch.arange(size) % 3, torch.arange(size), torch.full((size, 3), 1.0 * size)
        )
        pieces = shortage.parts(batch, 4)
        for number, piece in enumerate(pieces):
            dlb.part = number, len(pieces)
            seen[size] = looked = []

            def forward(images: torch.Tensor, looked: list[float] = looked) -> torch.Tensor:
                looked.append(float(images[0, 0]))
                return images

            dlb.loss(forward, piece, 1.0)
            last.append([int(value) for value in looked[1:]])
    assert last == [[], [], [], [], [12], [12], [4], [4], [], []]


def test_parts_cover_the_batch_in_order() -> None:
    batch = next(ToyBatches().epoch(0))
    found = shortage.parts(batch, 5)
    assert len(found) == 5
    assert torch.equal(torch.cat([part.indices for part in found]), batch.indices)
    assert min(len(part.labels) for part in found) >= 2
    assert len(shortage.parts(batch, 100)) == 6, "BatchNorm needs two images"
    assert shortage.parts(batch, 1)[0] is batch


def test_what_a_graph_keeps() -> None:
    """A linear layer keeps its input for the gradient of its weight; an addition keeps nothing."""
    model = nn.Linear(10, 5)
    images = torch.zeros(7, 10)
    assert shortage.kept(lambda: model(images), model) == images.numel() * 4
    assert shortage.kept(lambda: model.weight + 1, model) == 0


def test_the_need_grows_with_the_batch() -> None:
    model, batch = convnet(), next(ToyBatches().epoch(0))
    found = shortage.need(model, lambda part: model(part.images), batch, copies=2)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert found.fixed >= 2 * weights
    # two convolutions, their normalisation and their ReLU (in another tensor) of 16 pixels, 6 and 8 channels
    assert found.each >= 2 * (6 + 8) * 16 * 4
    assert found.of(found.fitting(10**6)) <= 10**6 < found.of(found.fitting(10**6) + 8)


def test_the_largest_fitting_batch_is_round() -> None:
    need = Need(1000, 10)
    assert need.fitting(1000 + 10 * 29) == 24
    assert need.fitting(1000 + 10 * 7) == 7
    assert need.fitting(500) == 0


def room(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """Pretend that there is memory for a step of so many images of the toy data, and no more."""
    model, batch = convnet(), next(ToyBatches().epoch(0))
    need = shortage.need(model, lambda part: nn.functional.cross_entropy(model(part.images), part.labels), batch, 2)
    monkeypatch.setattr(shortage, "free", lambda device: round(need.of(images) + 0.5 * need.each))


def test_too_large_a_batch_is_refused_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 4)
    model = convnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OutOfMemory) as caught:
        fit(model, ToyBatches(), recipe=Recipe(**QUICK))
    said = str(caught.value)
    assert "on 12 images at a time needs about" in said
    assert "A batch of 4 would fit: lower train.batch_size (now 12), or set train.accumulate: 3 (or auto)" in said
    assert "\n" not in said
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_that_fits_is_trained_as_if_nobody_had_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, unseen = convnet(), convnet()
    looked.insert(6, nn.Dropout(0.3))
    unseen.insert(6, nn.Dropout(0.3))
    fit(looked, ToyBatches(), recipe=Recipe(**QUICK))
    monkeypatch.setattr(shortage, "free", lambda device: None)
    fit(unseen, ToyBatches(), recipe=Recipe(**QUICK))
    assert all(torch.equal(value, unseen.state_dict()[name]) for name, value in looked.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_automatic_parts_fit_and_stay_after_a_resume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    room(monkeypatch, 7)
    expected, broken, resumed = convnet(), convnet(), convnet()
    objective = OBJECTIVES[name]
    parts = 4 if name == "dlb" else 2  # it keeps two graphs
    fit(expected, ToyBatches(), objective=objective(), recipe=Recipe(**QUICK, accumulate=parts))

    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    common = {"recipe": Recipe(**QUICK, accumulate="auto"), "checkpoint": tmp_path / "last.safetensors", "mark": "m"}
    with pytest.raises(KeyboardInterrupt):
        fit(broken, ToyBatches(), objective=objective(), on_epoch=stop, **common)
    assert f"a batch of 12 does not fit into memory: computed in {parts} parts" in capsys.readouterr().err
    monkeypatch.setattr(shortage, "free", lambda device: None)  # as elsewhere: the result must not depend on it
    fit(resumed, ToyBatches(), objective=objective(), **common)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_memory_that_runs_out_on_the_way_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if loss.left == 0 and len(labels) > 4:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of shortage. Tried to allocate 20.00 MiB.")
        loss.left -= len(labels) == 12  # type: ignore[attr-defined]
        return nn.functional.cross_entropy(logits, labels)

    loss.left = 5  # type: ignore[attr-defined]
    with pytest.raises(
        OutOfMemory, match=r"out of memory: training on 12 images .* would fit: lower train\.batch_size"
    ):
        fit(convnet(), ToyBatches(), objective=loss, recipe=Recipe(**QUICK))


def test_other_errors_keep_their_traceback() -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        fit(convnet(), ToyBatches(), objective=loss, recipe=Recipe(**QUICK))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of shortage."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_shortages_are_known(error: Exception) -> None:
    assert shortage.is_shortage(error)
    assert not shortage.is_shortage(RuntimeError("shape mismatch"))
    assert not shortage.is_shortage(ValueError("out of memory"))


LIMITED = """
import resource, sys
import torch
from torch import nn
from epsd.compute import shortage
from epsd.training.fit import fit
from epsd.project.recipes import Recipe
sys.path.insert(0, {tests!r})
from toys import ToyBatches

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))
fit(net, ToyBatches(size=16, batch_size=8, shape=(1, 32, 32)), recipe=Recipe(epochs=1, precision="fp32"))
data = ToyBatches(size=512, batch_size=256, shape=(1, 32, 32))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {extra}, used + {extra}))
shortage.TRANSIENT = {factor}
try:
    fit(net, data, recipe=Recipe(epochs=1, precision="fp32", accumulate={accumulate!r}))
    print("trained")
except shortage.OutOfMemory as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
@pytest.mark.parametrize(
    ("factor", "accumulate", "expected"),
    [
        (1.3, 1, "on 256 images at a time needs about"),  # seen coming
        (0.01, 1, "on 256 images at a time needs about"),  # not seen coming: the allocation fails
        (1.3, "auto", "trained"),
    ],
)
def test_a_real_limit(factor: float, accumulate: object, expected: str) -> None:
    """256 images of 64 channels in two layers want 270 MB and more; 150 MB may be had."""
    code = LIMITED.format(tests=str(ROOT / "tests"), extra=150 * 2**20, factor=factor, accumulate=accumulate)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert expected in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_free_memory_is_known_here() -> None:
    found = shortage.free(CPU)
    assert found is not None
    assert 2**20 < found < 2**50
    assert shortage.free(torch.device("meta")) is None


def test_a_batch_smaller_than_the_sample_is_not_estimated() -> None:
    history = fit(convnet(), ToyBatches(size=6, batch_size=2), recipe=Recipe(**QUICK))
    assert len(history) == 3


def test_a_partner_is_cut_with_its_image() -> None:
    batch = Batch(
        torch.arange(4.0).view(4, 1, 1, 1), torch.arange(4), torch.arange(4), torch.arange(4.0).view(4, 1, 1, 1)
    )
    for part in shortage.parts(batch, 2):
        assert part.partner is not None
        assert torch.equal(part.images, part.partner)
