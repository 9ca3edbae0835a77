"""Fetch a published file: resumed where it was interrupted, and used only when its checksum is the published one."""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from epsd.files.regular import check_regular, refused
from epsd.project.runtime import note, watched
from epsd.types import EpsdError

if TYPE_CHECKING:
    import requests

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""

PATIENCE = 60.0
"""Most seconds to wait where a server says how long; one that asks for more is not asked again in this run."""

_CHUNK = 1 << 20
_LATER = (408, 429)
"""Of the answers below 500, those that another try may better: request timeout, too many requests."""


class DownloadError(EpsdError):
    """A file that cannot be fetched, or is not the published one."""


class Published(NamedTuple):
    """A file as its publisher offers it. `checksum`: `md5:...` or `sha256:...`."""

    name: str
    url: str
    checksum: str


def checksum(path: Path, algorithm: str) -> str:
    """The file's digest as `algorithm:hex`. Raises DownloadError where it cannot be read."""
    with refused(DownloadError, path, "read"), check_regular(path).open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def verify(path: Path, wanted: str) -> None:
    """Raises DownloadError when the file's checksum is not `wanted` (`md5:...` or `sha256:...`)."""
    found = checksum(path, wanted.partition(":")[0])
    if found != wanted:
        raise DownloadError(f"{path}: its checksum is {found}, published is {wanted}. Delete it to fetch it again.")


def fetch(published: Published, folder: Path, *, tries: int = 5, pause: float = 1.0) -> Path:
    """The published file in `folder`, downloaded unless it is there.

    What arrives is kept as `<name>.part`, also after an interruption, and continued from there next time. A lost
    connection is taken up again up to `tries` times, with a pause in seconds that doubles, or as long as the server
    asks (up to PATIENCE). What is no continuation (a server that sends all again, a login page) replaces what is kept
    only when it is whole and right.

    Raises DownloadError when the file cannot be had, or its checksum (or that of the file already there) is wrong;
    a wrong download is deleted.
    """
    target = folder / published.name
    if target.exists():
        verify(target, published.checksum)
        return target
    part = target.with_name(f"{target.name}.part")
    with refused(DownloadError, part):  # errors of the network have become `_Lost` before
        folder.mkdir(parents=True, exist_ok=True)
        came = _fetch_part(published, part, tries, pause)
        found = checksum(came, published.checksum.partition(":")[0])
        if found != published.checksum:
            came.unlink()
            kept = f" What came earlier is kept in {part}; delete it to start anew." if _size(part) else ""
            wrong = f"its checksum is {found}, published is {published.checksum}"
            raise DownloadError(f"{published.url}: {wrong}. What came was deleted; try again later.{kept}")
        came.replace(target)
        part.unlink(missing_ok=True)
    return target


def locate(root: Path, published: Published, download: bool, terms: str = "") -> Path:
    """Where a published data set lies: `root` as it is, the published archive inside it, or that archive downloaded.

    `root` may be the unpacked folder or any archive of it; a folder that holds only the published archive stands
    for this archive, whose checksum is then verified. Hidden files (.gitkeep, .DS_Store) do not count. `terms`: what
    a user who downloads agrees to.

    Raises DownloadError naming the file to place and where, when it is not there and `download` is false, or
    when it cannot be fetched.
    """
    archive = root / published.name
    if archive.is_file():
        verify(archive, published.checksum)
        return archive
    inside = root.iterdir() if root.is_dir() else ()
    if root.is_file() or any(entry.name[0] != "." and entry.suffix != ".part" for entry in inside):
        return root
    if download:
        return fetch(published, root)
    agree = f" ({terms})" if terms else ""
    raise DownloadError(
        f"{root}: nothing there. Place {published.name} ({published.url}) or its unpacked folder in it, "
        f"or set dataset.download: true{agree}."
    )


class _Lost(Exception):
    """The connection broke; another try may go on, no sooner than in `wait` seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


def _fetch_part(published: Published, part: Path, tries: int, pause: float) -> Path:
    """The file with all that the server sent: `part`, or one beside it where that was not a continuation."""
    before = _size(part)
    for attempt in range(tries):
        try:
            return _continue(published, part)
        except _Lost as lost:
            wait = max(pause * 2**attempt, lost.wait)
            if attempt + 1 == tries or lost.wait > PATIENCE:
                where = f"{published.url}: {lost}, {attempt + 1} tries."
                raise DownloadError(where + _kept(part, before)) from None
            note(f"{published.name}: {lost}; going on in {wait:g} s")
            time.sleep(wait)
    raise AssertionError("unreachable: the last try returns or raises")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _kept(part: Path, before: int) -> str:
    """What a user who starts again will find; `before`: bytes that were there when this run began."""
    size = _size(part)
    if not size:
        part.unlink(missing_ok=True)
        return ""
    return f" What came {'' if size > before else 'earlier '}is kept in {part}; the next start goes on from there."


def _continue(published: Published, part: Path) -> Path:
    """Ask for the bytes from the end of `part` on and append them; what a server sends instead goes to a file beside.

    Returns the file that is complete. Raises _Lost where another try may go on.
    """
    have = _size(part)
    answer = _asked(published.url, have)
    if answer is None:
        return part
    with answer:
        sent = str(answer.headers.get("Content-Range"))
        resumed = answer.status_code == 206 and sent.startswith(f"bytes {have}-")
        length = answer.headers.get("Content-Length")
        start = have if resumed else 0
        total = start + int(length) if length and length.isdigit() else None
        if resumed or not have:
            with part.open("ab" if resumed else "wb") as file:
                _receive(answer, file, published.name, start, total)
            return part
        return _beside(answer, part, published.name, total)


def _beside(answer: "requests.Response", part: Path, name: str, total: int | None) -> Path:
    """All that the server sends, in a file of its own, which goes when it breaks: `part` may be more."""
    other = part.with_name(f"{name}.new.part")
    try:
        with other.open("wb") as file:
            _receive(answer, file, name, 0, total)
    except BaseException:
        other.unlink(missing_ok=True)
        raise
    return other


def _asked(url: str, have: int) -> "requests.Response | None":
    """The server's answer, to be read, with the bytes from `have` on; None: there are none.

    Raises DownloadError for an answer that will not change, _Lost for everything that may.
    """
    import requests  # not above: a stage that fetches nothing starts without it
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        answer = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except requests.RequestException as error:
        reason = getattr(error.args[0] if error.args else None, "reason", None)
        if isinstance(reason, ConnectTimeoutError | NewConnectionError):
            raise _Lost(f"cannot be reached ({_told(reason)})") from None
        raise _Lost(f"the connection broke ({_told(error)})") from None
    if answer.ok:
        return answer
    answer.close()
    if answer.status_code == 416 and have:  # complete, or of another version: its checksum will tell
        return None
    says = f"the server says {answer.status_code} {answer.reason}"
    if answer.status_code < 500 and answer.status_code not in _LATER:
        raise DownloadError(f"{url}: {says}.")
    wait = _seconds(answer.headers.get("Retry-After"))
    raise _Lost(f"{says} and asks to wait {wait:.0f} s" if wait else says, wait)


def _seconds(retry_after: str | None) -> float:
    """How long a server asks to be left alone; 0: it does not say."""
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    with contextlib.suppress(InvalidHeader):
        return Retry().parse_retry_after(retry_after or "0")
    return 0.0


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


def _receive(answer: "requests.Response", file: IO[bytes], name: str, start: int, total: int | None) -> None:
    size = start
    for chunk in _shown(_chunks(answer), name, start, total):
        file.write(chunk)
        size += len(chunk)
    if total is not None and size < total:
        raise _Lost(f"the connection broke after {size} of {total} bytes")


def _chunks(answer: "requests.Response") -> Iterator[bytes]:
    """What arrives, as it arrives: waiting for a block to be full would lose its beginning with the connection."""
    from urllib3.exceptions import HTTPError

    answer.raw.enforce_content_length = False  # what is missing is told, and asked for, in bytes of the file
    while True:
        try:
            chunk = answer.raw.read1(_CHUNK)
        except (OSError, HTTPError) as error:
            raise _Lost(f"the connection broke ({_told(error)})") from None
        if not chunk:
            return
        yield chunk


def _shown(chunks: Iterator[bytes], name: str, start: int, total: int | None) -> Iterator[bytes]:
    """With a progress bar where somebody looks at it."""
    if not watched():
        yield from chunks
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total, completed=start)
        for chunk in chunks:
            yield chunk
            progress.advance(task, len(chunk))
