"""What is free, and what a graph holds."""

from pathlib import Path

import pytest
import torch
from torch import nn

from epsd.compute import memory
from epsd.compute.memory import GIB, Saved, container_bytes, free_bytes


def test_free_memory_is_less_than_all_of_it() -> None:
    import psutil

    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("limit", "used", "cached", "folder"),
    [
        ("memory.max", "memory.current", "inactive_file", "."),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory"),
    ],
)
def test_a_container_leaves_what_its_limit_leaves(
    tmp_path: Path, limit: str, used: str, cached: str, folder: str
) -> None:
    assert container_bytes(tmp_path) == float("inf")
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / limit).write_text(f"{4 * GIB}\n")
    (tmp_path / folder / used).write_text(f"{3 * GIB}\n")
    (tmp_path / folder / "memory.stat").write_text(f"anon 7\n{cached} {GIB}\n")
    assert container_bytes(tmp_path) == 2 * GIB
    (tmp_path / folder / limit).write_text("max\n")
    assert container_bytes(tmp_path) == float("inf")


def test_the_limits_of_all_groups_around_a_process_count(tmp_path: Path) -> None:
    """A job's or a service's limit stands below the root of the hierarchy; one beside it is another's."""
    for folder, limit in {"job": 8, "job/step": 4, "other": 1}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(f"{limit * GIB}\n")
        (tmp_path / folder / "memory.current").write_text(f"{GIB}\n")
        (tmp_path / folder / "memory.stat").write_text("inactive_file 0\n")
    assert container_bytes(tmp_path) == float("inf")
    assert container_bytes(tmp_path, ["/job/step/task"]) == 3 * GIB
    assert container_bytes(tmp_path, ["/job"]) == 7 * GIB
    assert container_bytes(tmp_path, ["/../.."]) == float("inf")
    listing = tmp_path / "cgroup"
    listing.write_text("4:memory:/job\n0::/job/step:with colon\n")
    assert memory._own_groups(listing) == ["/job", "/job/step:with colon"]
    assert memory._own_groups(tmp_path / "nothing") == [""]


def test_saved_bytes_are_those_of_the_tensors_kept_each_once() -> None:
    torch.manual_seed(0)
    linear, images = nn.Linear(8, 4), torch.randn(16, 8)
    with Saved([images, *linear.parameters()]) as saved:
        hidden = linear(images)
        assert saved.bytes == 0  # images and weights are there anyway
        out = torch.tanh(hidden)  # keeps its result, of which the square keeps the same storage
        loss = out.square().sum()
        assert saved.bytes == out.numel() * 4
    loss.exp()
    assert saved.bytes == out.numel() * 4
