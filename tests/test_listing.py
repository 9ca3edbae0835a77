import os
from pathlib import Path

import pytest

from epsd import listing


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "photos"


def test_nothing_remembered_is_nothing_changed(photos: Path) -> None:
    assert listing.changed([photos]) == []
    listing.remember([photos])
    assert listing.changed([photos]) == []
    assert listing.changed([photos.parent]) == []


def test_added_removed_renamed_and_edited_images_are_noticed(photos: Path) -> None:
    (photos.parent / "other.zip").write_bytes(b"zip")

    def noticed() -> bool:
        found = listing.changed([photos, photos.parent / "other.zip"]) == [photos]
        listing.remember([photos])
        return found

    listing.remember([photos, photos.parent / "other.zip"])
    (photos / "dog/2.png").write_bytes(b"new")
    assert noticed()
    (photos / "dog/2.png").unlink()
    assert noticed()
    (photos / "dog/1.png").rename(photos / "cat/3.png")
    assert noticed()
    (photos / "cat/1.png").write_bytes(b"other size")
    assert noticed()
    os.utime(photos / "cat/2.png", ns=(1, 1))
    assert noticed()
    assert not noticed()


def test_what_a_file_manager_leaves_is_no_change(photos: Path) -> None:
    listing.remember([photos])
    (photos / ".DS_Store").write_bytes(b"x")
    (photos / ".thumbnails").mkdir()
    (photos / ".thumbnails/1.png").write_bytes(b"x")
    assert listing.changed([photos]) == []


def test_what_a_link_leads_to_is_looked_at(photos: Path) -> None:
    elsewhere = photos.parent / "birds"
    elsewhere.mkdir()
    (photos / "bird").symlink_to(elsewhere)
    listing.remember([photos])
    (elsewhere / "1.png").write_bytes(b"x")
    assert listing.changed([photos]) == [photos]


def test_an_archive_is_looked_at_as_one_file(photos: Path) -> None:
    archive = photos.parent / "photos.zip"
    archive.write_bytes(b"one")
    listing.remember([archive])
    archive.write_bytes(b"another")
    assert listing.changed([archive]) == [archive]
    archive.unlink()
    assert listing.changed([archive]) == [], "that it is gone, reading it tells better"
    assert listing.glance(archive) is None


def test_a_damaged_memory_is_an_empty_one(photos: Path) -> None:
    listing.remember([photos])
    (photos.parent / ".epsd/read.json").write_text("{")
    assert listing.changed([photos]) == []
    listing.remember([photos])
    assert listing.changed([photos]) == []
