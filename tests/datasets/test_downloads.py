import email.utils
import hashlib
import http.server
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epsd.datasets.downloads import DownloadError, Published, checksum, fetch, locate, verify

CONTENT = bytes(range(256)) * 2000


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; `breaks`: after how many bytes each of the first answers stops; `log`: ranges asked for.

    `scripts`: what the first answers are instead. `headers`: of answers that are errors.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.breaks, self.statuses, self.log = CONTENT, [], [], []
        self.ranges = True
        self.scripts: list[Script] = []
        self.headers: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.log.append(asked)
        if server.scripts:
            server.scripts.pop(0)(self)
            return
        if server.statuses and (status := server.statuses.pop(0)) != 200:
            self.send_response(status)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.end_headers()
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        self.send_response(206 if asked and server.ranges else 200)
        body = server.content[start:]
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks.pop(0)] if server.breaks else body)


Script = Callable[[Handler], None]


def silent(handler: Handler) -> None:
    """Closes without a word."""


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def slow(handler: Handler) -> None:
    time.sleep(0.3)


def garbage(handler: Handler) -> None:
    handler.wfile.write(b"hello, this is no http\r\n\r\n")


def login(handler: Handler) -> None:
    """What a network shows that wants a password first: a page, with status 200."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nlogin")


def chunked(handler: Handler) -> None:
    """Breaks in its second chunk, 150,000 bytes on."""
    size = b"%x\r\n" % 100_000
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    handler.wfile.write(size + CONTENT[:100_000] + b"\r\n" + size + CONTENT[100_000:150_000])


@pytest.fixture(params=["quiet", "bar"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("EPSD_QUIET", "1" if request.param == "quiet" else "")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def published(server: Server, content: bytes = CONTENT, algorithm: str = "md5") -> Published:
    return Published("set.zip", server.url, f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}")


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_file_is_fetched_verified_and_not_fetched_again(server: Server, tmp_path: Path, algorithm: str) -> None:
    for _ in range(2):
        path = fetch(published(server, algorithm=algorithm), tmp_path / "data")
        assert path.read_bytes() == CONTENT
    assert server.log == [None]
    assert [p.name for p in path.parent.iterdir()] == ["set.zip"]


def test_an_interrupted_download_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.breaks = [100_000, 50_000]
    assert fetch(published(server), tmp_path, pause=0.01).read_bytes() == CONTENT
    assert server.log == [None, "bytes=100000-", "bytes=150000-"]


def test_the_next_start_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.breaks = [100_000]
    with pytest.raises(DownloadError, match=r"broke after 100000 of 512000 bytes, 1 tries. What came is kept"):
        fetch(published(server), tmp_path, tries=1)
    assert not (tmp_path / "set.zip").exists()
    assert (tmp_path / "set.zip.part").stat().st_size == 100_000
    assert fetch(published(server), tmp_path).read_bytes() == CONTENT
    assert server.log == [None, "bytes=100000-"]


def test_a_server_without_ranges_starts_anew(server: Server, tmp_path: Path) -> None:
    server.ranges, server.breaks = False, [100_000]
    assert fetch(published(server), tmp_path, pause=0.01).read_bytes() == CONTENT


def test_a_complete_part_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(CONTENT)
    assert fetch(published(server), tmp_path).read_bytes() == CONTENT


def test_a_wrong_download_is_deleted_and_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"set.zip: its checksum is md5:\w+, published is md5:\w+. What came was deleted"
    ):
        fetch(published(server, b"other"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_part_is_found_out(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(b"x" * 100_000)
    with pytest.raises(DownloadError, match="its checksum"):
        fetch(published(server), tmp_path)
    assert fetch(published(server), tmp_path).read_bytes() == CONTENT


def test_a_wrong_file_already_there_is_named_and_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"mine")
    with pytest.raises(DownloadError, match=r"set.zip: its checksum .* Delete it to fetch it again"):
        fetch(published(server), tmp_path)
    assert (tmp_path / "set.zip").read_bytes() == b"mine"
    assert server.log == []


def test_server_errors_are_tried_again_missing_files_are_not(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 500]
    assert fetch(published(server), tmp_path / "a", pause=0.01).read_bytes() == CONTENT
    server.statuses, server.log = [404], []
    with pytest.raises(DownloadError, match="the server says 404"):
        fetch(published(server), tmp_path / "b", pause=0.01)
    assert server.log == [None]


def test_an_unreachable_server_and_an_unwritable_folder_are_named(server: Server, tmp_path: Path) -> None:
    nobody = Published("set.zip", "http://127.0.0.1:9/set.zip", "md5:0")
    with pytest.raises(DownloadError, match=r"cannot be reached .* 2 tries"):
        fetch(nobody, tmp_path, tries=2, pause=0.01)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match="cannot be written"):
        fetch(published(server), tmp_path / "file")


@pytest.mark.parametrize("script", [silent, reset, slow, garbage])
def test_a_connection_lost_before_an_answer_is_taken_up_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    monkeypatch.setattr("epsd.datasets.downloads.TIMEOUT", 0.1)
    server.scripts = [script]
    assert fetch(published(server), tmp_path / "a", pause=0.01).read_bytes() == CONTENT
    server.scripts, server.log = [script] * 3, []
    with pytest.raises(DownloadError, match=r"set.zip: the connection broke \(.+\), 3 tries\.$") as error:
        fetch(published(server), tmp_path / "b", tries=3, pause=0.01)
    assert "\n" not in str(error.value) and "written" not in str(error.value)
    assert list((tmp_path / "b").iterdir()) == [], "nothing came, so nothing is kept"
    (tmp_path / "b" / "set.zip.part").write_bytes(CONTENT[:10])
    server.scripts = [script]
    with pytest.raises(DownloadError, match=r"1 tries\. What came earlier is kept in .*set.zip.part"):
        fetch(published(server), tmp_path / "b", tries=1)


def test_a_broken_chunked_transfer_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.scripts = [chunked]
    assert fetch(published(server), tmp_path, pause=0.01).read_bytes() == CONTENT
    assert server.log == [None, "bytes=150000-"]
    server.scripts = [chunked]
    with pytest.raises(DownloadError, match=r"the connection broke .*, 1 tries. What came is kept"):
        fetch(published(server), tmp_path / "b", tries=1)
    assert (tmp_path / "b" / "set.zip.part").read_bytes() == CONTENT[:150_000]


def test_what_is_no_continuation_leaves_what_is_kept(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "set.zip.part"
    part.write_bytes(CONTENT[:100_000])
    server.scripts = [login]
    message = (
        r"its checksum is .* What came was deleted; .* What came earlier is kept in .*part; delete it to start anew"
    )
    with pytest.raises(DownloadError, match=message):
        fetch(published(server), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {part.name: CONTENT[:100_000]}
    server.ranges, server.breaks = False, [50_000]
    with pytest.raises(DownloadError, match="What came earlier is kept"):
        fetch(published(server), tmp_path, tries=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {part.name: CONTENT[:100_000]}
    assert fetch(published(server), tmp_path).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["set.zip"]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_busy_server_is_given_the_time_it_asks_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def asking(seconds: int) -> dict[str, str]:
        date = email.utils.formatdate(time.time() + seconds, usegmt=True)
        return {"Retry-After": str(seconds) if form == "seconds" else date}

    waits: list[float] = []
    monkeypatch.setattr("epsd.datasets.downloads.time.sleep", waits.append)
    server.statuses, server.headers = [429, 503, 408], asking(30)
    assert fetch(published(server), tmp_path / "a").read_bytes() == CONTENT
    assert len(waits) == 3 and all(28 <= wait <= 30 for wait in waits)
    server.statuses, server.headers, server.log = [429], asking(3600), []
    with pytest.raises(DownloadError, match=r"the server says 429 .* and asks to wait 3(600|59\d) s, 1 tries\.$"):
        fetch(published(server), tmp_path / "b")
    assert len(waits) == 3 and server.log == [None]
    server.statuses, server.headers = [429], {"Retry-After": "soon"}
    assert fetch(published(server), tmp_path / "c").read_bytes() == CONTENT
    assert waits[3:] == [1.0]


def test_verify_names_both_checksums(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    verify(tmp_path / "a", checksum(tmp_path / "a", "sha256"))
    with pytest.raises(DownloadError, match="published is md5:12"):
        verify(tmp_path / "a", "md5:12")


def test_locate_prefers_what_is_there(server: Server, tmp_path: Path) -> None:
    what = published(server)
    root = tmp_path / "root"
    with pytest.raises(
        DownloadError, match=r"root: nothing there. Place set.zip \(http.*\) .* dataset.download: true \(terms\)"
    ):
        locate(root, what, download=False, terms="terms")
    assert locate(root, what, download=True) == root / "set.zip"
    assert locate(root, what, download=False) == root / "set.zip"
    (root / "set.zip").write_bytes(b"changed")
    with pytest.raises(DownloadError, match="its checksum"):
        locate(root, what, download=True)
    (tmp_path / "mine.zip").write_bytes(b"mine")
    assert locate(tmp_path / "mine.zip", what, download=True) == tmp_path / "mine.zip"
    (tmp_path / "unpacked" / "train").mkdir(parents=True)
    assert locate(tmp_path / "unpacked", what, download=True) == tmp_path / "unpacked"
    assert server.log == [None]


@pytest.mark.parametrize("name", [".gitkeep", ".DS_Store"])
def test_locate_takes_a_hidden_file_for_nothing(server: Server, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DownloadError, match="nothing there"):
        locate(tmp_path, published(server), download=False)
    assert locate(tmp_path, published(server), download=True) == tmp_path / "set.zip"


def test_locate_goes_on_with_an_interrupted_download(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(CONTENT[:1000])
    assert locate(tmp_path, published(server), download=True).read_bytes() == CONTENT
    assert server.log == ["bytes=1000-"]
