"""A real PostgreSQL from the system's packages, on a unix socket of its own, run as a user that is not root."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def programs() -> Path:
    """The folder with `initdb` and `postgres`, or a skip with the reason."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    beside = shutil.which("initdb")
    if not found and not beside:
        pytest.skip("needs PostgreSQL (Debian: apt-get install postgresql)")
    return found[-1].parent if found else Path(str(beside)).parent


def account() -> dict[str, int]:
    """Arguments of `subprocess` for the account that runs the server: it refuses to be root."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid}
    pytest.skip("needs an account that is not root to run PostgreSQL")


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of a fresh database, which is gone afterwards."""
    pytest.importorskip("psycopg", reason="needs psycopg (pip install 'epsd[postgres]')")
    home, who = programs(), account()
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # the path of a socket holds 107 bytes at most
    process = None
    try:
        if who:
            os.chown(folder, who["user"], who["group"])
        made = subprocess.run(
            [home / "initdb", "-D", folder / "data", "-A", "trust", "-U", "epsd", "--no-sync"],
            capture_output=True, text=True, cwd=folder, **who,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        command = [
            home / "postgres",
            "-D",
            folder / "data",
            "-k",
            folder,
            "-c",
            "listen_addresses=",
            "-c",
            "max_connections=300",
            "-F",
        ]
        process = subprocess.Popen(command, stderr=(folder / "log").open("w"), cwd=folder, **who)
        deadline = time.monotonic() + 30
        while not (folder / ".s.PGSQL.5432").exists():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"postgresql://epsd@/postgres?host={folder}"
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # SIGTERM would wait for every client to leave
            process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)
