"""A real MySQL (or MariaDB) from the system's packages, on a socket of its own, run as a user that is not root."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def program(*names: str) -> str:
    """The first of `names` that is installed, or a skip with the reason."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/libexec"])
    for name in names:
        if found := shutil.which(name, path=places):
            return found
    pytest.skip("needs MySQL or MariaDB (Debian: apt-get install mariadb-server)")


def account() -> str:
    """The account that runs the server: it refuses to be root."""
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid()).pw_name
    for name in ("mysql", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    pytest.skip("needs an account that is not root to run MySQL")


def made(folder: Path, user: str) -> list[str]:
    """Make an empty database in `folder`/data; the command that serves it."""
    server = program("mariadbd", "mysqld")
    options = ["--no-defaults", f"--datadir={folder / 'data'}", f"--user={user}"]
    if Path(server).name == "mariadbd":
        first = [program("mariadb-install-db"), *options, "--auth-root-authentication-method=normal", "--skip-test-db"]
    else:
        first = [server, *options, "--initialize-insecure"]
    done = subprocess.run(first, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    log = ["--skip-networking", f"--socket={folder / 'socket'}", f"--pid-file={folder / 'pid'}"]
    return [server, *options, *log, "--innodb-flush-log-at-trx-commit=0"]


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of a fresh database, which is gone afterwards."""
    pymysql = pytest.importorskip("pymysql", reason="needs PyMySQL (pip install 'epsd[mysql]')")
    user = account()
    program("mariadbd", "mysqld")
    folder = Path(tempfile.mkdtemp(prefix="my", dir="/tmp"))  # the path of a socket holds 107 bytes at most
    process = None
    try:
        (folder / "data").mkdir()
        for path in (folder, folder / "data"):
            shutil.chown(path, user)
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(made(folder, user), stdout=log, stderr=log, cwd=folder)
        deadline = time.monotonic() + 30
        while not (folder / "socket").exists():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        with contextlib.closing(pymysql.connect(unix_socket=str(folder / "socket"), user="root")) as link:
            link.cursor().execute("CREATE DATABASE epsd")
        yield f"mysql+pymysql://root@localhost/epsd?unix_socket={folder / 'socket'}"
    finally:
        if process is not None:
            process.terminate()
            process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)
