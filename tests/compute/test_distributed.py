"""Two real processes against one: the same weights, masks and figures to rounding, whatever the objective."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import warm
import worlds
from conftest import ROOT
from epsd.compute import distributed, joint_layers
from epsd.compute.distributed import ParallelError
from epsd.compute.second_order import batch_norm
from epsd.data.loaders import as_batches
from epsd.data.sampling import Sampler
from epsd.detection.whole_batch import Whole
from epsd.detectors import DETECTORS
from epsd.masks import prunable
from epsd.objectives import OBJECTIVES
from epsd.pipeline import launch
from epsd.types import Batch
from toys import ToyBatches, convnet

NAMES = sorted(OBJECTIVES)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything of `worlds` in this process and in two others; each number goes on from the other's checkpoints."""
    folder = tmp_path_factory.mktemp("worlds")
    both = ["train", "broken", "scores", "masks", "detect", "detect_broken", "rounded", "tuned", "parts"]
    both.append("parts_that_never_fit")
    after = ["resumed", "detect_resumed"]
    worlds.main(folder, both)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        command = [warm.python(), str(ROOT / "tests/worlds.py"), str(folder), *both, *after]
        assert launch.run(command, 2) == 0
    worlds.main(folder, after)
    return folder


def found(folder: Path, kind: str, objective: str, world: int, rank: int = 0) -> dict[str, Tensor]:
    content: dict[str, Tensor] = torch.load(folder / f"{kind}-{objective}-{world}-{rank}.pt")
    assert content
    return content


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one if one[name].numel())


@pytest.mark.parametrize("objective", NAMES)
def test_two_processes_find_the_weights_and_figures_of_one(results: Path, objective: str) -> None:
    """PS-KD's memory, CS-KD's partners, DLB's last batch, BatchNorm, dropout, mask, clipping and validation."""
    one = found(results, "train", objective, 1)
    assert {"train/loss", "train/top1", "val/top1", "val/nll"} <= one.keys()
    assert difference(one, found(results, "train", objective, 2)) < 1e-9


@pytest.mark.parametrize("objective", NAMES)
def test_two_processes_fine_tune_as_one(results: Path, objective: str) -> None:
    one, other = (found(results, "tuned", objective, world) for world in (1, 2))
    assert difference(one, other) < 1e-9


@pytest.mark.parametrize("objective", NAMES)
def test_both_processes_hold_the_same_bits(results: Path, objective: str) -> None:
    assert difference(found(results, "train", objective, 2, 0), found(results, "train", objective, 2, 1)) == 0


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("objective", NAMES)
def test_a_training_goes_on_in_another_number_of_processes(results: Path, objective: str, world: int) -> None:
    """From one process's checkpoint in two, from two processes' in one."""
    assert difference(found(results, "train", objective, 1), found(results, "resumed", objective, world)) < 1e-9


@pytest.mark.parametrize("objective", NAMES)
def test_two_processes_find_the_scores_of_one(results: Path, objective: str) -> None:
    """Every score that looks at images, with momentum, micro-batches, kept graphs, BatchNorm, dropout."""
    one, two = found(results, "scores", objective, 1), found(results, "scores", objective, 2)
    assert len(one) > (30 if objective == "cross_entropy" else 12)
    for name, tensor in one.items():
        assert "/" not in name or float(tensor.abs().max()) > 0
        torch.testing.assert_close(two[name], tensor, rtol=1e-8, atol=1e-12, msg=name)
    assert difference(two, found(results, "scores", objective, 2, 1)) == 0


@pytest.mark.parametrize("objective", NAMES)
def test_two_processes_find_the_mask_of_one(results: Path, objective: str) -> None:
    one = found(results, "masks", objective, 1)
    assert difference(one, found(results, "masks", objective, 2, 0)) == 0
    assert difference(one, found(results, "masks", objective, 2, 1)) == 0


@pytest.mark.parametrize("objective", NAMES)
def test_two_processes_compute_a_batch_in_as_many_parts(results: Path, objective: str) -> None:
    """By `accumulate: auto`, where the memory of one of them has room for half of its slice."""
    one, two = found(results, "parts", objective, 1), found(results, "parts", objective, 2)
    assert one["parts"].tolist() == [2]
    assert difference(one, two) < 1e-9


@pytest.mark.parametrize("objective", NAMES)
def test_two_processes_round_the_weights_of_one(results: Path, objective: str) -> None:
    """But for those that lie on the border between two numbers."""
    one, two = found(results, "rounded", objective, 1), found(results, "rounded", objective, 2)
    assert difference(two, found(results, "rounded", objective, 2, 1)) == 0
    assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-3)
    near = torch.cat([((one[name] - two[name]).abs() < 1e-4).flatten() for name in prunable(convnet())])
    assert near.double().mean() > 0.98
    assert max(len(channel.unique()) for channel in two["3.weight"].flatten(1)) <= 15


def test_one_checkpoint_was_written_by_each_group(results: Path) -> None:
    for objective in NAMES:
        assert (results / f"{objective}-1").stat().st_size > 0
        assert (results / f"{objective}-2").stat().st_size > 0


@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_two_processes_find_the_detector_of_one(results: Path, detector: str) -> None:
    """Padding, samples, divisors, BatchNorm and the last batch, which cannot be split; in single precision."""
    one, two = found(results, "detect", detector, 1), found(results, "detect", detector, 2)
    assert {"loss", "gradient_norm", "boxes6"} <= one.keys()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-4, atol=2e-6, check_dtype=False, msg=name)
    assert difference(two, found(results, "detect", detector, 2, 1)) == 0


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_a_detector_goes_on_in_another_number_of_processes(results: Path, detector: str, world: int) -> None:
    whole, resumed = found(results, "detect", detector, 1), found(results, "detect_resumed", detector, world)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=2e-4, atol=2e-6, check_dtype=False, msg=name)


def test_pictures_are_padded_to_the_size_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another slice held one of 60 x 70."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    as_one_of(monkeypatch, 0, 2)
    largest = iter([-1.0, -60.0, -70.0])
    monkeypatch.setattr(distributed, "least", lambda number: min(number, next(largest)))
    detector = nn.Module()
    detector.transform = GeneralizedRCNNTransform(40, 99, [0.0], [1.0])
    shapes = [[1, 40, 44], [1, 80, 20]]
    with Whole(detector):
        assert detector.transform.max_by_axis(shapes) == [1, 80, 70]
    assert detector.transform.max_by_axis(shapes) == [1, 80, 44]


# --- pieces, in this process ----------------------------------------------------------------------------------------


def test_alone_nothing_is_changed() -> None:
    data, model = ToyBatches(), nn.Linear(2, 2)
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    assert distributed.shard(data) is data
    assert distributed.wrapped(model) is model
    tensor = torch.ones(3)
    distributed.mean_([tensor])
    assert distributed.gather(tensor) is tensor
    assert distributed.first_to_fail()
    with joint_layers.together():
        assert not torch.overrides._get_current_function_mode_stack()


def as_one_of(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(distributed, "_group", distributed._Group(rank, world, True, None))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_shares_make_up_the_whole(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    pieces = []
    for rank in range(world):
        as_one_of(monkeypatch, rank, world)
        pieces.append(torch.arange(13)[distributed.share(13)])
    assert torch.equal(torch.cat(pieces), torch.arange(13))


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_sampler_draws_its_share_of_every_batch_and_no_empty_one(
    monkeypatch: pytest.MonkeyPatch, drop_last: bool
) -> None:
    whole = Sampler(size=9, batch_size=4, seed=0, shuffle=True, drop_last=drop_last)
    order = whole.order(3)
    drawn: list[int] = []
    for rank in range(2):
        as_one_of(monkeypatch, rank, 2)
        mine = whole.shared(distributed.share)
        assert torch.equal(mine.order(3), order)
        assert len(mine) == len(whole)
        parts = mine.parts(len(order))
        assert all(part.stop > part.start for part in parts)
        drawn += [position for part in parts for position in order[part].tolist()]
    assert sorted(drawn) == sorted(order.tolist())
    assert whole.lengths() == ({4} if drop_last else {4, 1})


def test_batches_that_cannot_be_split_evenly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of(monkeypatch, 0, 5)
    monkeypatch.setattr(distributed, "agree", lambda number: True)
    with pytest.raises(ParallelError, match="12 cannot be split evenly over 5 processes"):
        next(iter(distributed.shard(ToyBatches(), even=True).epoch(0)))
    assert len(next(iter(distributed.shard(ToyBatches()).epoch(0))).labels) == 2


def test_a_loader_whose_last_batch_cannot_be_split_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of(monkeypatch, 0, 2)
    dataset = TensorDataset(torch.randn(15, 1, 4, 4), torch.arange(15) % 3)
    for shuffle in (False, True):
        with pytest.raises(ParallelError, match="7 cannot be split evenly over 2 processes"):
            distributed.shard(as_batches(DataLoader(dataset, batch_size=8, shuffle=shuffle)), even=True)
        distributed.shard(as_batches(DataLoader(dataset, batch_size=8, shuffle=shuffle, drop_last=True)), even=True)


def test_batches_that_differ_between_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a loader with a DistributedSampler, which would be shared out twice."""
    as_one_of(monkeypatch, 0, 2)
    monkeypatch.setattr(distributed, "agree", lambda number: False)
    with pytest.raises(ParallelError, match="without a DistributedSampler"):
        next(iter(distributed.shard(ToyBatches()).epoch(0)))


def test_a_weight_that_takes_no_part_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model["used"](torch.ones(1, 2)).sum().backward()
    distributed.check_used(model)
    as_one_of(monkeypatch, 0, 2)
    with pytest.raises(ParallelError, match=r"unused.weight takes no part in the loss, nor do 1 others"):
        distributed.check_used(model)
    model["unused"].requires_grad_(False)
    distributed.check_used(model)


def test_a_slice_of_a_batch_keeps_what_belongs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of(monkeypatch, 1, 2)
    batch = Batch(torch.arange(4.0)[:, None], torch.arange(4), torch.arange(4) + 10, torch.arange(4.0) + 20)
    mine = distributed.part(batch)
    assert mine.indices.tolist() == [12, 13]
    assert mine.partner is not None
    assert mine.partner.tolist() == [22, 23]
    assert distributed.part(batch._replace(partner=None)).partner is None


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 3, 2)])
@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_the_joint_batch_norm_is_torchs_on_one_slice(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], momentum: float
) -> None:
    """With sums that no other process adds to: values, running statistics, first and second derivatives."""
    monkeypatch.setattr(distributed, "_group", distributed._Group(0, 1, True, None))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    outcomes = []
    for function in (F.batch_norm, partial(batch_norm, joint=True)):
        torch.manual_seed(0)
        x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).requires_grad_()
        weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        result = function(x, mean, var, weight, bias, True, momentum, 1e-3)
        first = torch.autograd.grad(result.pow(3).sum(), [x, weight, bias], create_graph=True)
        second = torch.autograd.grad(sum((g.square().sum() for g in first), torch.zeros(())), [x, weight])
        outcomes.append([result, mean, var, *first, *second])
    for theirs, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_half_precision_keeps_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(distributed, "_group", distributed._Group(0, 1, True, None))
    x = torch.randn(8, 4, 3, 3)
    args = torch.zeros(4), torch.ones(4), torch.ones(4), torch.zeros(4), True
    joint = batch_norm(x.bfloat16(), *args, joint=True)
    assert joint.dtype == torch.bfloat16
    torch.testing.assert_close(joint.float(), F.batch_norm(x, *args), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_shares_of_dropout_are_those_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch, channels_last: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.rand(6, 5, 4, 4).contiguous(memory_format=layout)
    torch.manual_seed(1)
    whole = F.dropout(x, 0.4, True)
    pieces = []
    for rank in range(2):
        as_one_of(monkeypatch, rank, 2)
        torch.manual_seed(1)
        pieces.append(joint_layers._dropout(x[distributed.share(6)], 0.4, True))
    torch.testing.assert_close(torch.cat(pieces), whole)
    assert torch.equal(joint_layers._dropout(x, 0.4, False), x)


@pytest.mark.parametrize(
    ("device", "processes", "message"),
    [
        ("cuda:1", 2, "device: 'cuda:1' is one device; with 2 processes use auto, cuda or cpu"),
        ("auto", 4, "launch.processes: 4 processes need a GPU each, this machine has 2. Use at most 2, or auto"),
    ],
)
def test_devices_that_cannot_be_shared_out(
    monkeypatch: pytest.MonkeyPatch, device: str, processes: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ParallelError, match=message):
        distributed.check_devices(device, processes)
    distributed.check_devices("auto", 2)
    assert launch.wanted("auto", "auto") == 2
    assert launch.wanted("auto", "cpu") == 1


# --- starting and ending --------------------------------------------------------------------------------------------


def launched(body: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time; rank = int(os.environ['RANK']); {body}"]


def test_the_first_failure_ends_all_with_its_status() -> None:
    started = time.monotonic()
    assert launch.run(launched("sys.exit(7) if rank else time.sleep(60)"), 2) == 7
    assert time.monotonic() - started < 30


def test_a_killed_process_is_named_by_its_signal() -> None:
    with pytest.raises(launch.LaunchError, match="ended by SIGKILL"):
        launch.run(launched(f"os.kill(os.getpid(), 9) if rank else sys.exit({launch.LOST})"), 2)


def test_every_process_knows_its_place(tmp_path: Path) -> None:
    body = f"open(r'{tmp_path}' + '/' + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'])"
    assert launch.run(launched(body), 3) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "3", "1": "3", "2": "3"}


def test_start_is_left_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    distributed.start("cpu")
    assert distributed.world() == 1


def test_importing_it_starts_nothing() -> None:
    code = "import torch, epsd.compute.distributed; print(torch.distributed.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
