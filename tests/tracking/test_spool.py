import json
import multiprocessing

import pytest
from filelock import Timeout

from epsd.tracking.spool import Spool, waiting


def test_what_was_appended_comes_back_in_order(tmp_path):
    spool = Spool.new(tmp_path, "a")
    events = [{"op": "metrics", "value": number} for number in range(5)]
    for event in events:
        spool.append(event)
    assert spool.events() == events
    spool.close()
    assert [found.events() for found in waiting(tmp_path)] == [events]


def test_a_half_written_last_line_was_never_acknowledged(tmp_path):
    spool = Spool.new(tmp_path, "a")
    spool.append({"n": 1})
    with spool.path.open("a") as stream:
        stream.write('{"n": 2, "op": "met')
    assert spool.events() == [{"n": 1}]


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    spool = Spool.new(tmp_path, "a")
    spool.append({"n": 1})

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("epsd.tracking.spool.os.fsync", full)
        spool.append({"n": 2})
    spool.append({"n": 3})
    assert spool.path.read_text().splitlines() == [json.dumps({"n": 1}), json.dumps({"n": 3})]


def test_a_session_that_still_writes_is_left_alone(tmp_path):
    spool = Spool.new(tmp_path, "a")
    spool.append({"n": 1})
    assert list(waiting(tmp_path)) == []
    with pytest.raises(Timeout):
        Spool(spool.path)


def _write_and_die(folder):
    import os
    import signal

    Spool.new(folder, "killed").append({"n": 1})
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_lets_go(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(tmp_path,))
    process.start()
    process.join(20)
    assert process.exitcode == -9
    assert [spool.events() for spool in waiting(tmp_path)] == [[{"n": 1}]]


def test_oldest_first_and_discarded_ones_are_gone(tmp_path):
    for name in "bca":
        spool = Spool.new(tmp_path, name)
        spool.append({"name": name})
        spool.close()
    seen = []
    for spool in waiting(tmp_path):
        seen.append(spool.events()[0]["name"])
        spool.discard()
    assert seen == ["b", "c", "a"]
    assert list(tmp_path.iterdir()) == []


def test_artifacts_are_copied_as_they_are_now(tmp_path):
    spool = Spool.new(tmp_path / "spool", "a")
    source, folder = tmp_path / "metrics.json", tmp_path / "pictures"
    source.write_text("first")
    folder.mkdir()
    (folder / "one.png").write_bytes(b"1")
    first, pictures = spool.keep(source), spool.keep(folder)
    source.write_text("second")
    second = spool.keep(source)
    assert (first.read_text(), second.read_text()) == ("first", "second")
    assert first.name == second.name == "metrics.json"
    assert (pictures / "one.png").read_bytes() == b"1"
    spool.discard()
    assert not first.exists()
