import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import warm
from conftest import ROOT
from epsd.cli import main
from epsd.compute.devices import determinism
from epsd.pipeline import changes, stage
from epsd.project import artifacts, processes, runtime
from epsd.project.params import load, parse, read_yaml
from epsd.registry import ParamsError
from epsd.types import EpsdError

SCRIPT = """
import epsd.project.own_code
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from epsd.pipeline.stage import run_stage
from epsd.types import EpsdError

def main(params, machine):
    Path("started").write_text(str(os.getpid()))
    try:
        {body}
    finally:
        Path("tidied").touch()

run_stage("train", main)
"""


def tree() -> dict:
    return read_yaml(ROOT / "params.yaml")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project with the shipped params.yaml, which is not the repository."""
    for name in ("DVC_ROOT", "DVC_STAGE", "EPSD_COPY"):
        monkeypatch.delenv(name, raising=False)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(folder: Path, body: str) -> list[str]:
    (folder / "run.py").write_text(SCRIPT.format(body=textwrap.indent(body, " " * 8).strip()))
    return [sys.executable, "run.py"]


def run(folder: Path, body: str) -> subprocess.CompletedProcess:
    return subprocess.run(script(folder, body), cwd=folder, capture_output=True, text=True, timeout=60)


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def started(folder: Path) -> psutil.Process:
    wait_for(lambda: (folder / "started").exists() and (folder / "started").read_text())
    return psutil.Process(int((folder / "started").read_text()))


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # in between
        return True


# --- the two lines --------------------------------------------------------------------------------------------------


@pytest.fixture
def run_here(folder, capsys, monkeypatch):
    """Runs a body as a stage in this process (a fresh one costs seconds): (status, stdout, stderr)."""
    monkeypatch.setenv("EPSD_QUIET", "")

    def call(main, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stages/train.py", *arguments])
        status = 0
        try:
            stage.run_stage("train", main)
        except SystemExit as leaving:
            status = int(leaving.code)
        return status, *capsys.readouterr()

    yield call
    determinism(False)


def raising(error: Exception):
    def main(params, machine):
        raise error

    return main


def test_a_stage_says_what_it_does_and_what_came_of_it(run_here):
    status, out, errors = run_here(lambda params, machine: "top-1 0.98")
    assert (status, errors) == (0, "")
    first, last = out.splitlines()
    assert first.startswith("train: resnet at sparsity 0.95 on digits by cskd, 60 epochs, seed 0, on ")
    assert last.startswith("train: top-1 0.98 (") and last.endswith(" s, in artifacts/train)")


def test_quiet_leaves_the_line_with_the_result(run_here):
    status, out, errors = run_here(lambda params, machine: f"bars: {runtime.watched()}", "--quiet")
    assert (status, errors, out.count("\n")) == (0, "", 1)
    assert out.startswith("train: bars: False (")


def test_unknown_arguments_stop_a_stage_before_work(run_here):
    status, out, errors = run_here(raising(AssertionError()), "--quite")
    assert (status, out) == (2, "") and "--quite" in errors


@pytest.mark.parametrize(
    "name, words",
    {
        "prepare": "reading digits, and digit_scenes for detection, seed 0",
        "prune": "resnet on digits to sparsity 0.95 by epsd under cskd, seed 0",
        "evaluate": "resnet on the test images of digits, seed 0",
        "detect": "faster_rcnn around resnet on digit_scenes, seed 0",
    }.items(),
)
def test_every_stage_says_what_it_does_to_what(name, words):
    assert stage.describe(parse(tree()), name) == words


def test_random_state_is_seeded_before_the_stage(run_here):
    drawn: list[float] = []
    for _ in range(2):
        run_here(lambda params, machine: drawn.append(float(torch.rand(()))))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "error, line",
    [
        (EpsdError("data/x.png: truncated."), "train: data/x.png: truncated."),
        (EpsdError("one\n  two"), "train: one two"),
        (OSError(28, os.strerror(28), "model.bin"), "train: model.bin: No space left on device."),
        (PermissionError(13, "Permission denied", "out"), "train: out: Permission denied."),
        (RuntimeError("I/O error: No space left on device"), "train: No space left on device (I/O error"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "train: out of memory on the device"),
        (MemoryError(), "train: out of memory on the device: lower the batch size."),
    ],
)
def test_a_users_mistake_is_one_line(run_here, error, line):
    status, _, errors = run_here(raising(error))
    assert status == 1
    assert errors.count("\n") == 1
    assert errors.startswith(line)


@pytest.mark.parametrize("error", [KeyError("bug"), FileNotFoundError(2, "gone", "x"), RuntimeError("shape")])
def test_a_bug_keeps_its_traceback(run_here, error):
    with pytest.raises(type(error)):
        run_here(raising(error))


def test_handlers_are_put_back(run_here):
    before = signal.getsignal(signal.SIGTERM)
    run_here(lambda params, machine: None)
    assert signal.getsignal(signal.SIGTERM) is before


# --- params.yaml ----------------------------------------------------------------------------------------------------


def test_the_shipped_parameters_pass():
    stage.check(parse(tree()))


@pytest.mark.parametrize("where", ["dataset", "architecture", "objective", "prune.score", "voc", "detect.detector"])
def test_an_unknown_name_lists_the_valid_ones(where):
    content = tree()
    node = content
    for part in where.split("."):
        node = node[part]
    good = node["name"]
    node["name"] = good[:-1] + "x"
    with pytest.raises(ParamsError, match=rf"{where}.name: unknown '{good[:-1]}x'.*Valid: .*{good}"):
        stage.check(parse(content))


@pytest.mark.parametrize(
    "where, name, left_out",
    [
        ("prune.score", "snip", {"steps", "lr", "momentum", "reading"}),
        ("detect.detector", "ssd", {"proposals", "roi_samples"}),
    ],
)
def test_a_variant_is_chosen_by_one_word(folder, run_here, where, name, left_out):
    """What belongs to the variant before is left out with a note, and is in no record; a misspelt one is an error."""
    content = tree()
    *above, key = where.split(".")
    node = functools.reduce(dict.__getitem__, above, content)[key]
    node["name"] = name
    runtime._said.clear()
    kept = functools.reduce(getattr, [*above, key], stage.check(parse(content)))
    assert kept["name"] == name and left_out <= node.keys() - kept.keys()
    node["stepz"] = 3
    with pytest.raises(ParamsError, match=rf"{where} \({name}\): unknown 'stepz'"):
        stage.check(parse(content))


def test_what_is_left_out_is_said_and_not_recorded(folder, run_here):
    runtime._said.clear()
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("    name: epsd", "    name: snip", 1))
    status, out, errors = run_here(lambda params, machine: str(sorted(params.prune.score)))
    assert status == 0 and "['name']" in out
    assert errors.count("prune.score: left out, as not of snip: ") == 1


def test_all_findings_at_once():
    content = tree()
    content["objective"]["name"] = "cskf"
    content["detect"]["detector"]["name"] = "yolo"
    with pytest.raises(ParamsError) as caught:
        stage.check(parse(content))
    assert "cskf" in str(caught.value) and "yolo" in str(caught.value)


def test_weights_that_were_learned_are_not_rescaled() -> None:
    content = tree()
    content["prune"]["rescale"] = True
    stage.check(parse(content))
    content["detect"]["beside"] = "dense"
    with pytest.raises(ParamsError, match=r"detect\.beside: dense would begin with weights that prune\.rescale"):
        stage.check(parse(content))
    content["detect"]["beside"] = "none"
    content["start"]["weights"] = "champion"
    with pytest.raises(ParamsError, match=r"prune\.rescale: is for weights drawn by seed"):
        stage.check(parse(content))


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "name: faster_rcnn",
            "name: faster_rcn",
            "detect.detector.name: unknown 'faster_rcn'. Did you mean 'faster_rcnn'?",
        ),
        ("device: auto", "device: cuda:99", "train: device: 'cuda:99' is not on this machine."),
        (
            "precision: fp32             # as train.precision",
            "precision: fp16",
            "train: detect.precision: fp16 needs a GPU; on the CPU use auto, fp32 or bf16.",
        ),
        ("sparsity: 0.95", "sparsity: 1.0", "prune.sparsity"),
        ("epochs: 60", "epoch: 60", "train: unknown 'epoch'. Did you mean 'epochs'?"),
    ],
)
def test_a_mistake_in_any_section_stops_any_stage_before_work(folder, run_here, old, new, message):
    text = (folder / "params.yaml").read_text()
    assert old in text
    (folder / "params.yaml").write_text(text.replace(old, new))
    status, out, errors = run_here(lambda params, machine: pytest.fail("it worked"))
    assert (status, out) == (1, "")
    assert message in errors and errors.count("\n") == 1


def test_check_as_a_command(folder):
    command = [warm.python(), "-m", "epsd.cli", "check"]
    assert subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout == b""
    (folder / "params.yaml").unlink()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("epsd: params.yaml: no such file.")


def test_changed_images_are_read_again(folder, monkeypatch, capsys):
    """As `make repro` asks; a second time only if they change again."""
    text = (folder / "params.yaml").read_text()
    line = next(line for line in text.splitlines() if "name: digits " in line)
    (folder / "params.yaml").write_text(text.replace(line, "  name: image_folder\n  root: photos"))
    (folder / "photos").mkdir()
    (folder / "photos/1.png").touch()
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command) or SimpleNamespace(returncode=3))
    assert main(["check", "--reread"]) == 0
    artifacts.write_json(folder / artifacts.DATA_INDEX, {"digest": "d"})
    assert main(["check", "--reread"]) == 0
    changes.remember(stage.images_read(load(folder / "params.yaml")))
    assert main(["check", "--reread"]) == 0
    (folder / "photos/2.png").touch()
    assert main(["check", "--reread"]) == 3
    assert asked == [[sys.executable, "-m", "dvc", "repro", "-s", "-f", "prepare"]]
    assert capsys.readouterr().err.endswith(
        f"changed since the last reading, so it is read again: {folder / 'photos'}\n"
    )
    assert main(["check"]) == 0


# --- one at a time --------------------------------------------------------------------------------------------------


def test_two_stages_in_one_folder(folder, monkeypatch):
    first = subprocess.Popen(script(folder, "time.sleep(60)"), cwd=folder, stdout=subprocess.DEVNULL)
    try:
        process = started(folder)
        monkeypatch.setattr(stage, "LOCK_PATIENCE", 0.1)
        message = rf"another stage is running in .* \(train, PID {process.pid}\)"
        with pytest.raises(EpsdError, match=message), stage._folder_lock("detect"):
            pass
    finally:
        first.kill()
        first.wait()
    with stage._folder_lock("detect"):  # a killed stage blocks nobody
        assert (folder / ".epsd" / "stage.pid").read_text() == f"detect, PID {os.getpid()}"
    assert not (folder / ".epsd" / "stage.pid").exists()


def test_two_folders_do_not_disturb_each_other(folder, monkeypatch):
    other = folder / "copy"
    other.mkdir()
    monkeypatch.setattr(stage, "LOCK_PATIENCE", 0.1)
    with stage._folder_lock("train"):
        monkeypatch.chdir(other)
        with stage._folder_lock("train"):
            assert (other / ".epsd" / "stage.pid").exists()


def test_an_unwritable_folder_is_one_line(folder, run_here):
    (folder / ".epsd").write_text("a file where a folder should be")
    status, _, errors = run_here(lambda params, machine: None)
    assert status == 1
    assert errors == "train: .epsd: File exists.\n"


def test_the_lock_waits_for_one_that_is_about_to_leave():
    assert stage.LOCK_PATIENCE > 2 * (processes.WATCH_EVERY + processes.LEAVE_WITHIN)


# --- signals and orphans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_leaves_through_the_finally_blocks(folder, number, status):
    process = subprocess.Popen(script(folder, "time.sleep(60)"), cwd=folder, stderr=subprocess.PIPE, text=True)
    started(folder)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert (folder / "tidied").exists()
    assert errors.count("\n") == 1 and "`dvc repro` goes on from here." in errors


def test_a_second_signal_does_not_disturb_the_way_out(folder):
    body = """
try:
    time.sleep(60)
finally:
    Path("leaving").touch()
    time.sleep(1)
    Path("left").touch()
"""
    process = subprocess.Popen(script(folder, body), cwd=folder, stderr=subprocess.DEVNULL)
    started(folder)
    process.terminate()
    wait_for((folder / "leaving").exists)
    process.terminate()
    process.wait(20)
    assert (folder / "left").exists()


PARENT = """
import os, subprocess, sys
sys.exit(subprocess.call({command!r}, env={{**os.environ, "DVC_STAGE": "train"}}))
"""


@pytest.mark.parametrize("shell", [False, True], ids=["direct", "through a shell"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nobody_trains_on_when_dvc_is_gone(folder, shell, number):
    command = script(folder, "time.sleep(60)")
    if shell:  # the second command keeps the shell from becoming the first
        command = ["/bin/sh", "-c", f"{' '.join(command)}; true"]
    (folder / "parent.py").write_text(PARENT.format(command=command))
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=folder, stderr=subprocess.DEVNULL)
    orphan = started(folder)
    parent.send_signal(number)
    parent.wait()
    wait_for(lambda: gone(orphan), 20)
    assert (folder / "tidied").exists()


def test_a_busy_orphan_ends_as_well(folder):
    """One long operation in C holds signals back; the watch does not wait for it."""
    body = "import torch; torch.linalg.svd(torch.rand(6000, 6000))"
    (folder / "parent.py").write_text(
        PARENT.format(command=["/bin/sh", "-c", " ".join(script(folder, body)) + "; true"])
    )
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=folder, stderr=subprocess.DEVNULL)
    orphan = started(folder)
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(orphan), 6)


def test_without_dvc_a_stage_outlives_the_shell_that_started_it(folder):
    """`nohup python stages/train.py &` and closing the terminal is allowed."""
    text = PARENT.replace('"DVC_STAGE": "train"', "").format(command=script(folder, "time.sleep(60)"))
    (folder / "parent.py").write_text(text)
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=folder)
    process = started(folder)
    parent.kill()
    parent.wait()
    time.sleep(2)
    assert not gone(process)
    process.kill()


# --- queued experiments ---------------------------------------------------------------------------------------------


def test_a_copy_runs_its_own_code(folder):
    """The environment's editable install points at the main folder; a queued experiment brings its own src."""
    shutil.copytree(ROOT / "src" / "epsd", folder / "src" / "epsd", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "src" / "epsd" / "extra.py").write_text("PLACE = 'copy'\n")
    done = run(folder, "import epsd.extra, epsd; return epsd.__file__")
    assert done.returncode == 0, done.stderr
    assert str(folder / "src") in done.stdout
