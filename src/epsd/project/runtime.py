"""The project's folder, what is said and to whom, and the versions recorded with every run."""

import contextlib
import functools
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

STATE = ".epsd"
"""Folder (git-ignored) under the project's root for locks, checkpoints and the spool of the tracker."""


def project_root() -> Path:
    """The folder of the project, also from inside the temporary copy in which DVC runs a queued experiment.

    DVC says where the main project is (`DVC_ROOT`); without DVC it is the nearest folder with a dvc.yaml, upwards
    from the current one, or else the current one.
    """
    told = os.environ.get("DVC_ROOT")
    here = Path(told or Path.cwd()).resolve()
    if told:
        return here
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), here)


def located(path: str | Path) -> Path:
    """A path from params.yaml as an absolute one: `~` is the home folder, a relative one starts at the project's root.

    The current folder would not do: a queued experiment runs in a copy, beside which the user's data does not lie.
    """
    return project_root() / Path(path).expanduser()


def state_folder(*parts: str) -> Path:
    """`{project root}/.epsd/...`: what outlives a stage, but is no artifact. Not created here."""
    return project_root().joinpath(STATE, *parts)


def quiet() -> bool:
    """True where `EPSD_QUIET` (or `--quiet`, which sets it) asks for results and mistakes only."""
    return os.environ.get("EPSD_QUIET", "") not in ("", "0")


def hush() -> None:
    """Be quiet from now on, the processes started from here too."""
    os.environ["EPSD_QUIET"] = "1"


def watched() -> bool:
    """Whether somebody looks at a progress bar: stderr is a terminal, and nobody asked for quiet."""
    return not quiet() and sys.stderr.isatty()


def no_telemetry() -> None:
    """Turn off what mlflow, dvc and others would send home. Call before importing them; the user's own choice wins."""
    for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "DVC_NO_ANALYTICS": "1"}.items():
        os.environ.setdefault(name, value)


PACKAGES = (
    "epsd", "torch", "torchvision", "numpy", "pillow", "scikit-learn", "torch-pruning", "onnxruntime", "dvc",
    "mlflow", "optuna",
)  # fmt: skip
"""Those that read data, compute with them or keep results: another version may give another number."""


def _git(*arguments: str) -> str | None:
    """What git says about the project's folder, or None without git or repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path.cwd()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def _cpu() -> str:
    """The processor's own name where the system tells it (Linux), else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _versions() -> dict[str, str]:
    import torch  # not above: commands that train nothing start without it

    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    found |= {package: _installed(package) for package in PACKAGES}
    found |= {"cpu": f"{_cpu()} x{os.cpu_count()}", "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(0), "cuda": str(torch.version.cuda)}
    if commit := _git("rev-parse", "HEAD"):
        changed = _git("status", "--porcelain", "--untracked-files=no")
        found |= {"git.commit": commit, "git.dirty": str(bool(changed)).lower()}
    return found


def versions() -> dict[str, str]:
    """What a result was made with: python, packages, processor, GPU, git commit (where there is one) and platform."""
    return dict(_versions())


def note(text: str) -> None:
    """One line on stderr, at once (stdout may be a pipe that is read late). Work goes on where it cannot be written."""
    with contextlib.suppress(OSError):
        print(" ".join(text.split()), file=sys.stderr, flush=True)


def counted(number: int, what: str) -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def brief(error: BaseException) -> str:
    """What `error` says, in one line of at most 160 characters, without the password of an address."""
    text = re.sub(r"://[^/@\s]+@", "://", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


_said: set[str] = set()


def say_once(text: str, subject: str = "") -> None:
    """A line on stderr, the first time only that this `subject` (or this very text) comes up."""
    if (subject or text) not in _said:
        _said.add(subject or text)
        note(text)
