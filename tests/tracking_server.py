"""A real MLflow server on this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import requests


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Until it answers."""
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(requests.RequestException):
            if requests.get(url, timeout=2).ok:
                return
        time.sleep(0.1)


@contextlib.contextmanager
def serving(command: list[str], url: str, log: Path, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """A server that answers at `url` in the block, and is killed with all its workers afterwards."""
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        wait(server, url, log)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


class Server:
    """A real `mlflow server` on this machine, with its store in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Until it answers."""
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        store += ["--artifacts-destination", str(self.folder / "artifacts"), "--serve-artifacts"]
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        command = [sys.executable, "-m", "mlflow", "server", *store, *place]
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        wait(self.process, f"{self.uri}/health", self.folder / "server.log")

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            return requests.get(f"{self.uri}/health", timeout=2).ok
        except requests.RequestException:
            return False

    def kill(self) -> None:
        """kill -9, the server and its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
