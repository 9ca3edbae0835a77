"""The ledger: each slot once, whoever is killed and at whatever moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from epsd.engine import ledger as engine
from epsd.engine import storage as storages
from epsd.engine.ledger import Ledger, Lost, failures, known_run, on_stale, open_study, slot
from epsd.engine.storage import StorageError, open_storage
from epsd.project.processes import Stopped, stops

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture(params=["journal", "sqlite"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A journal, or a database."""
    return str(tmp_path / "trials.journal") if request.param == "journal" else f"sqlite:///{tmp_path}/trials.db"


def opened(where: str, slots: int = 0, heartbeat: int = 30) -> Ledger:
    """The ledger of a study in `where`, with so many more slots laid down."""
    storage = open_storage(where, heartbeat, on_stale)
    if open_study(storage, "s", ["maximize"]):
        Ledger(storage, "s").write("trials", 0)
    ledger = Ledger(storage, "s")
    ledger.write("trials", ledger.facts["trials"] + slots)
    for number in ledger.missing(ledger.trials()):
        ledger.add(number, {"x": number / 10})
    return ledger


def take(ledger: Ledger) -> Any:
    trial = ledger.claim(ledger.trials())
    if trial is not None:
        trial.suggest_float("x", 0, 1)
    return trial


def states(ledger: Ledger) -> list[str]:
    return [trial.state.name for trial in ledger.trials()]


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What is claimed is so by a process of this machine that is gone; `undo` brings this one back."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    who = {**engine.owner(), "pid": gone.pid, "pid.started": 1.0}
    monkeypatch.setattr(engine, "owner", lambda: who)
    yield monkeypatch


# --- each slot once -------------------------------------------------------------------------------------------------


def test_there_are_exactly_as_many_slots_as_asked(where: str) -> None:
    ledger = opened(where, 3)
    taken = [take(ledger) for _ in range(3)]
    assert take(ledger) is None
    assert [(trial.number, trial.params["x"]) for trial in taken] == [(0, 0.0), (1, 0.1), (2, 0.2)]
    for trial in taken:
        ledger.finish(trial, 0.5)
    assert ledger.open_slots(ledger.trials()) == set()
    opened(where, 2)
    assert states(opened(where)) == ["COMPLETE"] * 3 + ["WAITING"] * 2


def test_two_views_never_take_the_same_trial(where: str) -> None:
    first, second = opened(where, 2), opened(where)
    seen = first.trials(), second.trials()  # both before either takes one
    taken = [ledger.claim(trials) for _ in range(2) for ledger, trials in zip((first, second), seen, strict=True)]
    assert sorted(trial.number for trial in taken if trial) == [0, 1]


def test_a_slot_that_was_laid_down_twice_is_done_once(where: str) -> None:
    """As two machines that begin at the same moment do."""
    ledger = opened(where, 1)
    ledger.add(0)
    first = take(ledger)
    assert take(ledger) is None
    ledger.finish(first, 0.5)
    assert take(ledger) is None


def test_a_worker_may_choose(where: str) -> None:
    ledger = opened(where, 3)
    trial = ledger.claim(ledger.trials(), lambda each: -each.number)
    assert trial is not None and trial.number == 2


def test_what_was_done_before_the_storage_knew_is_not_done_again(where: str) -> None:
    ledger = opened(where, 0)
    ledger.write("trials", 2)
    ledger.add_done(0, 0.5, result={"a": 1})
    ledger.add_done(1, None, result={"a": 2})
    assert states(ledger) == ["COMPLETE", "PRUNED"] and not ledger.missing(ledger.trials())


# --- killed, interrupted, failed ------------------------------------------------------------------------------------


def test_a_trial_given_up_waits_again_with_its_values_and_counts_once(where: str) -> None:
    ledger = opened(where, 1)
    ledger.study.set_user_attr("trials", 1)
    first = take(ledger)
    ledger.tell(first, run_id="r")
    lost = ledger.trials()[0]
    ledger.give_up(lost, "interrupted")
    ledger.give_up(lost, "interrupted")  # by another process, at the same time
    assert states(ledger) == ["FAIL", "WAITING"]
    again = take(ledger)
    assert again.params == first.params
    assert again.user_attrs["retry_of"] == 0 and again.user_attrs["lost_run"] == "r"
    ledger.finish(again, 0.5)
    assert ledger.open_slots(ledger.trials()) == set()


def test_one_who_lost_a_trial_is_told(where: str) -> None:
    ledger = opened(where, 1)
    trial = take(ledger)
    ledger.give_up(ledger.trials()[0], "no sign of life")
    with pytest.raises(Lost):
        ledger.tell(trial, result=1)
    with pytest.raises(Lost):
        ledger.finish(trial, 0.5)
    assert states(ledger) == ["FAIL", "WAITING"]


def test_a_trial_that_keeps_dying_gets_new_values_in_the_end(where: str) -> None:
    ledger = opened(where, 1)
    for _ in range(engine.RETRIES + 1):
        assert take(ledger).params == {"x": 0.0}
        ledger.give_up(ledger.trials()[-1], "killed")
    assert take(ledger).params != {"x": 0.0}


def test_the_trial_of_a_dead_process_is_put_back_at_once(where: str, dead: pytest.MonkeyPatch) -> None:
    ledger = opened(where, 2)
    take(ledger)
    dead.undo()
    take(ledger)  # of this process, which lives
    ledger.repair()
    assert states(ledger) == ["FAIL", "RUNNING", "WAITING"]


def test_one_killed_between_two_changes_loses_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After taking a trial and before naming itself; after ending one and before putting it back."""
    ledger = opened(where, 2)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(engine, "owner", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        take(ledger)
    trial = take(ledger)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(engine, "_put_back", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        ledger.give_up(ledger.trials()[trial.number], "killed")
    assert states(ledger) == ["RUNNING", "FAIL"]
    ledger.repair()
    assert states(ledger) == ["RUNNING", "FAIL"]  # another process may be about to
    monkeypatch.setattr(engine, "UNCLAIMED", 0.0)
    monkeypatch.setattr(engine, "MISSING", 0.0)
    time.sleep(0.01)
    ledger.repair()
    assert states(ledger) == ["FAIL", "FAIL", "WAITING", "WAITING"]
    assert sorted(str(slot(trial)) for trial in ledger.trials()[2:]) == ["0", "1"]
    time.sleep(0.01)
    ledger.repair()
    assert len(ledger.trials()) == 4


def test_a_failure_is_tried_again_or_not(where: str) -> None:
    ledger = opened(where, 2)
    before = [trial.number for trial in failures(ledger.trials())]
    ledger.fail(take(ledger), "too bad", again=True)
    ledger.fail(take(ledger), "as bad", again=False)
    assert states(ledger) == ["FAIL", "FAIL", "WAITING"] and ledger.trials()[2].user_attrs["retry_of"] == 0
    assert [trial.user_attrs["error"] for trial in failures(ledger.trials(), before)] == ["too bad", "as bad"]
    assert not failures(ledger.trials(), [0, 1])
    ledger.repair()
    assert len(ledger.trials()) == 3


def test_what_a_stopped_process_has_taken_is_put_back(where: str) -> None:
    ledger = opened(where, 2)
    with pytest.raises(Stopped), stops(), ledger.at_work():
        ledger.finish(take(ledger), 0.5)
        take(ledger)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert states(ledger) == ["COMPLETE", "FAIL", "WAITING"]
    assert ledger.trials()[1].user_attrs["lost"] == "interrupted"


def test_a_trial_of_another_machine_is_lost_after_missed_heartbeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storages, "GRACE", 2)
    ledger = opened(f"sqlite:///{tmp_path}/trials.db", 2, heartbeat=1)
    elsewhere = {**engine.owner(), "host": "elsewhere"}
    monkeypatch.setattr(engine, "owner", lambda: elsewhere)
    with ledger.pulse(take(ledger).number):
        pass  # one sign of life, then none
    with ledger.pulse(take(ledger).number):
        deadline = time.monotonic() + 20
        while states(ledger) == ["RUNNING", "RUNNING"] and time.monotonic() < deadline:
            ledger.repair()
            time.sleep(0.3)
        assert states(ledger) == ["FAIL", "RUNNING", "WAITING"]
        assert ledger.trials()[2].user_attrs["retry_of"] == 0


def test_hosts_of_one_name_are_told_apart_by_their_heartbeats_where_there_are_some(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = opened(where, 1)
    namesake = {**engine.owner(), "boot": "another"}
    monkeypatch.setattr(engine, "owner", lambda: namesake)
    take(ledger)
    ledger.repair()
    assert states(ledger) == (["RUNNING"] if where.startswith("sqlite") else ["FAIL", "WAITING"])


# --- outages --------------------------------------------------------------------------------------------------------


def test_an_outage_is_borne_for_a_while(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = opened(where, 1)
    trial, tries = take(ledger), []

    def away_twice() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("no answer")
        return 7

    monkeypatch.setattr(engine, "POLL", 0.01)
    assert ledger.patiently(away_twice) == 7
    monkeypatch.setattr(storages, "PATIENCE", 0.05)
    monkeypatch.setattr(trial, "set_user_attr", lambda *_: (_ for _ in ()).throw(OSError("no answer")))
    with pytest.raises(StorageError, match=r"cannot be used \(no answer\)"):
        ledger.tell(trial, result=1)


def test_one_run_for_all_machines(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "PATIENCE", 0.1)
    ledger = opened(where, 1)
    assert known_run(ledger, made=True) is None and known_run(ledger, made=False) is None
    ledger.write("run_id", "r")
    assert known_run(opened(where), made=False) == "r"


def test_what_optuna_keeps_for_itself_is_left_alone(root: Path) -> None:
    """Its own attributes of trials; tests/test_house.py sees to names that begin with an underscore."""
    files = [file for file in (root / "src").rglob("*.py") if "system_attrs" in file.read_text(encoding="utf-8")]
    assert not files


def test_optuna_gives_no_trial_twice_where_this_relies_on_it(where: str) -> None:
    """`set_trial_state_values` to RUNNING succeeds once."""
    ledger = opened(where, 1)
    trial_id = ledger.storage.get_trial_id_from_study_id_trial_number(ledger._id, 0)
    other = open_storage(where)
    assert ledger.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    assert not other.set_trial_state_values(trial_id, TrialState.RUNNING)
    assert optuna.load_study(study_name="s", storage=other).trials[0].state == TrialState.RUNNING
