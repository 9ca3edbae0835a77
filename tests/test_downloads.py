import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from epsd.downloads import DownloadError, Published, checksum, fetch, locate, verify

CONTENT = bytes(range(256)) * 2000


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; `breaks`: after how many bytes each of the first answers stops; `log`: ranges asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.breaks, self.statuses, self.log = CONTENT, [], [], []
        self.ranges = True

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
        if server.statuses and (status := server.statuses.pop(0)) != 200:
            self.send_error(status)
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


def test_locate_goes_on_with_an_interrupted_download(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(CONTENT[:1000])
    assert locate(tmp_path, published(server), download=True).read_bytes() == CONTENT
    assert server.log == ["bytes=1000-"]
