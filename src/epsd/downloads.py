"""Fetch a published file: resumed where it was interrupted, and used only when its checksum is the published one."""

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from epsd.runtime import note, watched
from epsd.types import EpsdError

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""

_CHUNK = 1 << 20


class DownloadError(EpsdError):
    """A file that cannot be fetched, or is not the published one."""


class Published(NamedTuple):
    """A file as its publisher offers it. `checksum`: `md5:...` or `sha256:...`."""

    name: str
    url: str
    checksum: str


def checksum(path: Path, algorithm: str) -> str:
    """The file's digest as `algorithm:hex`."""
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def verify(path: Path, wanted: str) -> None:
    """Raises DownloadError when the file's checksum is not `wanted` (`md5:...` or `sha256:...`)."""
    found = checksum(path, wanted.partition(":")[0])
    if found != wanted:
        raise DownloadError(f"{path}: its checksum is {found}, published is {wanted}. Delete it to fetch it again.")


def fetch(published: Published, folder: Path, *, tries: int = 5, pause: float = 1.0) -> Path:
    """The published file in `folder`, downloaded unless it is there.

    What arrives is kept as `<name>.part`, also after an interruption, and continued from there next time. A lost
    connection is taken up again up to `tries` times, with a pause in seconds that doubles.

    Raises DownloadError when the file cannot be had, or its checksum (or that of the file already there) is wrong;
    a wrong download is deleted.
    """
    target = folder / published.name
    if target.exists():
        verify(target, published.checksum)
        return target
    part = target.with_name(f"{target.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _fetch_part(published, part, tries, pause)
        found = checksum(part, published.checksum.partition(":")[0])
        if found != published.checksum:
            part.unlink()
            wrong = f"its checksum is {found}, published is {published.checksum}"
            raise DownloadError(f"{published.url}: {wrong}. What came was deleted; try again later.")
        part.replace(target)
    except OSError as error:
        raise DownloadError(f"{part}: cannot be written ({error.strerror or error}).") from None
    return target


def locate(root: Path, published: Published, download: bool, terms: str = "") -> Path:
    """Where a published data set lies: `root` as it is, the published archive inside it, or that archive downloaded.

    `root` may be the unpacked folder or any archive of it; a folder that holds only the published archive stands
    for this archive, whose checksum is then verified. `terms`: what a user who downloads agrees to.

    Raises DownloadError naming the file to place and where, when it is not there and `download` is false, or
    when it cannot be fetched.
    """
    archive = root / published.name
    if archive.is_file():
        verify(archive, published.checksum)
        return archive
    if root.is_file() or (root.is_dir() and any(not entry.name.endswith(".part") for entry in root.iterdir())):
        return root
    if download:
        return fetch(published, root)
    agree = f" ({terms})" if terms else ""
    raise DownloadError(
        f"{root}: nothing there. Place {published.name} ({published.url}) or its unpacked folder in it, "
        f"or set dataset.download: true{agree}."
    )


class _Lost(Exception):
    """The connection broke; another try may go on."""


def _fetch_part(published: Published, part: Path, tries: int, pause: float) -> None:
    for attempt in range(tries):
        try:
            _continue(published, part)
            return
        except _Lost as lost:
            if attempt + 1 == tries:
                where = f"{published.url}: {lost}, {tries} tries"
                raise DownloadError(
                    f"{where}. What came is kept in {part}; the next start goes on from there."
                ) from None
            note(f"{published.name}: {lost}; going on in {pause * 2**attempt:g} s")
            time.sleep(pause * 2**attempt)


def _continue(published: Published, part: Path) -> None:
    """Ask for the bytes from the end of `part` on, and append them; a server that sends all starts it anew."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(published.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            resumed = answer.status == 206 and _starts_at(answer.headers.get("Content-Range"), have)
            length = answer.headers.get("Content-Length")
            start = have if resumed else 0
            total = start + int(length) if length and length.isdigit() else None
            with part.open("ab" if resumed else "wb") as file:
                _receive(answer, file, published.name, start, total)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing beyond what is here: complete, or of another version
            return
        if error.code < 500:
            raise DownloadError(f"{published.url}: the server says {error.code} {error.reason}.") from None
        raise _Lost(f"the server says {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise _Lost(f"cannot be reached ({error.reason})") from None


def _starts_at(content_range: str | None, have: int) -> bool:
    return bool(content_range) and str(content_range).startswith(f"bytes {have}-")


def _receive(answer: IO[bytes], file: IO[bytes], name: str, start: int, total: int | None) -> None:
    size = start
    for chunk in _shown(_chunks(answer), name, start, total):
        file.write(chunk)
        size += len(chunk)
    if total is not None and size < total:
        raise _Lost(f"the connection broke after {size} of {total} bytes")


def _chunks(answer: IO[bytes]) -> Iterator[bytes]:
    while True:
        try:
            chunk = answer.read(_CHUNK)
        except http.client.IncompleteRead as error:
            yield error.partial
            return
        except (OSError, http.client.HTTPException) as error:
            raise _Lost(f"the connection broke ({error})") from None
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
