"""stages/prune.py and stages/train.py by one process and by two: the same result, one line for a mistake."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import warm
from epsd.masks import Mask
from epsd.project import artifacts
from epsd.training import checkpoints

ROOT = Path(__file__).resolve().parents[2]
CHANGES = {"limit: null": "limit: 20", "epochs: 60": "epochs: 2", "compare: true": "compare: false"}


def changed(text: str, **train: float) -> str:
    """params.yaml, small, with other values in its section `train`."""
    for before, after in CHANGES.items():
        text = text.replace(f"  {before}", f"  {after}")
    head, mark, section = text.partition("\ntrain:")
    for key, value in train.items():
        section = re.sub(rf"\n  {key}: \S+", f"\n  {key}: {value}", section, count=1)
    return head + mark + section


def run(folder: Path, stage: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    path = folder / "params.yaml"
    path.write_text(re.sub(r"\n  processes: \S+", f"\n  processes: {processes}", path.read_text(), count=1))
    environment = {**os.environ, "EPSD_QUIET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    command = [warm.python(), str(ROOT / "stages" / f"{stage}.py")]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `prune` leaves it. Steps so small that rounding does not grow."""
    from epsd.datasets.digits import Digits
    from epsd.preparing.write import prepare

    folder = tmp_path_factory.mktemp("train")
    (folder / "dvc.yaml").touch()
    (folder / "params.yaml").write_text(changed((ROOT / "params.yaml").read_text(), lr=1e-4))
    prepare(Digits()(), folder / artifacts.DATA, seed=0, limit=20, validation=0.1, test=0.2)
    done = run(folder, "prune")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_two_processes_leave_the_network_of_one(project: Path) -> None:
    found = []
    for processes in (1, 2):
        done = run(project, "train", processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1 and not done.stderr, "the main process alone speaks"
        found.append(load_file(project / artifacts.MODEL))
    one, two = found
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    from mlflow import MlflowClient

    runs = MlflowClient(f"sqlite:///{project}/mlflow.db").search_runs(["1"])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2  # one each: only the main process records
    assert runs[0].data.metrics["train/loss"] == pytest.approx(runs[1].data.metrics["train/loss"], rel=1e-5)


@pytest.mark.slow
def test_two_machines_leave_the_mask_of_one(project: Path) -> None:
    """Two torchrun agents, as on two machines that share the project's folder."""
    assert run(project, "prune").returncode == 0
    alone = Mask.load(project / artifacts.MASK)
    (project / artifacts.MASK).unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = [warm.python(), "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", port]
    environment = {**os.environ, "EPSD_QUIET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    nodes = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(node), str(ROOT / "stages/prune.py")],
            cwd=project,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert said[0].count("\n") == 1 and not said[1], "the main process alone speaks"
    assert alone.jaccard(Mask.load(project / artifacts.MASK)) > 0.99


@pytest.mark.slow
def test_two_processes_leave_the_mask_of_one(project: Path) -> None:
    masks, counts = [], []
    for processes in (1, 2):
        done = run(project, "prune", processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1 and not done.stderr, "the main process alone speaks"
        masks.append(Mask.load(project / artifacts.MASK))
        report = artifacts.read_json(project / artifacts.PRUNE_REPORT)
        counts.append({name: report[name] for name in report if name.startswith("image")})
    assert masks[0].jaccard(masks[1]) > 0.99, "but for weights that rounding ranks otherwise"
    assert counts[0] == counts[1] and counts[0]["images_forward"] == 8 * 128, "3 steps and the loss, with partners"


@pytest.mark.slow
@pytest.mark.parametrize(
    "train, message",
    [
        ({"batch_size": 63}, "train.batch_size: 63 cannot be split evenly over 2 processes. Use a multiple of 2."),
        ({"compile": "kernels"}, "train.compile: several processes run uncompiled"),
    ],
)
def test_what_several_processes_cannot_do_is_one_line(project: Path, train: dict[str, object], message: str) -> None:
    path = project / "params.yaml"
    before = path.read_text()
    path.write_text(changed(before, **train))  # type: ignore[arg-type]
    try:
        done = run(project, "train", 2)
    finally:
        path.write_text(before)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_fewer_workers_after_a_kill_keep_the_finished_epochs(project: Path) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(changed(text, epochs=40).replace("workers: 0", "workers: 2"))
    shutil.rmtree(project / ".epsd" / "checkpoints", ignore_errors=True)
    command = [warm.python(), str(ROOT / "stages/train.py"), "--quiet"]
    killed = subprocess.Popen(command, cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    deadline = time.monotonic() + 120
    while not (saved := list(project.glob(".epsd/checkpoints/*/last.safetensors"))):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    state = checkpoints.load(saved[0], saved[0].parent.name)
    assert state is not None
    (project / "params.yaml").write_text(changed(text, epochs=40))
    done = run(project, "train")
    (project / "params.yaml").write_text(text)
    assert done.returncode == 0, done.stderr
    times = artifacts.read_csv(project / artifacts.HISTORY)["time/epoch"]
    kept = [record["time/epoch"] for record in state["history"]]
    assert len(times) == 40 and kept and times[: len(kept)] == pytest.approx(kept, rel=1e-4)
