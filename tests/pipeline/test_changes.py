import os
from pathlib import Path

import pytest

from epsd.pipeline import changes


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "photos"


def test_nothing_remembered_is_nothing_changed(photos: Path) -> None:
    assert changes.changed({photos: "d"}) == []
    changes.remember({photos: "d"})
    assert changes.changed({photos: "d"}) == []
    assert changes.changed({photos.parent: "d"}) == []


def test_added_removed_renamed_and_edited_images_are_noticed(photos: Path) -> None:
    (photos.parent / "other.zip").write_bytes(b"zip")

    def noticed() -> bool:
        found = changes.changed({photos: "d", photos.parent / "other.zip": "d"}) == [photos]
        changes.remember({photos: "d"})
        return found

    changes.remember({photos: "d", photos.parent / "other.zip": "d"})
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


def test_what_counts_is_how_the_images_looked_when_the_present_data_was_made(photos: Path) -> None:
    """DVC may bring back from its cache what an earlier state of the images gave."""
    changes.remember({photos: "before"})
    (photos / "dog/2.png").write_bytes(b"new")
    changes.remember({photos: "after"})
    assert changes.changed({photos: "after"}) == []
    assert changes.changed({photos: "before"}) == [photos]
    assert changes.changed({photos: "of another machine"}) == []


def test_what_a_file_manager_leaves_is_no_change(photos: Path) -> None:
    changes.remember({photos: "d"})
    (photos / ".DS_Store").write_bytes(b"x")
    (photos / ".thumbnails").mkdir()
    (photos / ".thumbnails/1.png").write_bytes(b"x")
    assert changes.changed({photos: "d"}) == []


def test_what_a_link_leads_to_is_looked_at(photos: Path) -> None:
    elsewhere = photos.parent / "birds"
    elsewhere.mkdir()
    (photos / "bird").symlink_to(elsewhere)
    changes.remember({photos: "d"})
    (elsewhere / "1.png").write_bytes(b"x")
    assert changes.changed({photos: "d"}) == [photos]


def test_an_archive_is_looked_at_as_one_file(photos: Path) -> None:
    archive = photos.parent / "photos.zip"
    archive.write_bytes(b"one")
    changes.remember({archive: "d"})
    archive.write_bytes(b"another")
    assert changes.changed({archive: "d"}) == [archive]
    archive.unlink()
    assert changes.changed({archive: "d"}) == [], "that it is gone, reading it tells better"
    assert changes.glance(archive) is None


def test_a_damaged_memory_is_an_empty_one(photos: Path) -> None:
    changes.remember({photos: "d"})
    (photos.parent / ".epsd/read.json").write_text("{")
    assert changes.changed({photos: "d"}) == []
    changes.remember({photos: "d"})
    assert changes.changed({photos: "d"}) == []
