"""What was kept on disk while the store was away is sent to it, each point once."""

import json

from filelock import Timeout

from epsd.project.runtime import brief, note, say_once, state_folder
from epsd.tracking.addresses import shown, tracking_uri
from epsd.tracking.database import locked
from epsd.tracking.spool import Event, remember, waiting
from epsd.tracking.store import Store, refused


def send_kept(store: Store, events: list[Event]) -> str:
    """Send the events of one session; returns the id of its run. Safe to begin again after any interruption."""
    first, *rest = events
    store.forget()
    run_id = store.open(first, replayed=True)
    remember(first["local"], run_id)
    for event in rest:
        try:
            store.send(run_id, event)
        except Exception as error:
            if not refused(event, error):
                raise
            reject(run_id, event, error)
    return run_id


def reject(run_id: str, event: Event, error: Exception) -> None:
    """An event that the store will never take is put aside, so that it does not block the others."""
    path = state_folder("spool", "rejected.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"run": run_id, "error": str(error), **event}, default=str) + "\n")
    say_once(f"tracking: {shown(tracking_uri())} refused {event['op']} of run {run_id} ({brief(error)}).")


def replay(store: Store) -> int:
    """Send what earlier sessions could not; the number of events sent. Raises what MLflow raises if it cannot be."""
    folder, sent = state_folder("spool"), 0
    if not any(folder.glob("*.jsonl")):
        return 0
    try:
        with locked(state_folder("locks", "replay.lock"), timeout=0):
            for spool in waiting(folder):
                events = spool.events()
                if events and events[0].get("store") != store.name:
                    continue
                try:
                    if events:
                        send_kept(store, events)
                except Exception as error:
                    if not refused(events[0], error):
                        raise
                    aside = spool.set_aside()
                    note(f"tracking: {shown(store.uri)} refused the run that is kept in {aside} ({brief(error)}).")
                    continue
                spool.discard()
                sent += len(events)
    except Timeout:  # another process is at it
        return sent
    if sent:
        note(f"tracking: sent {sent} events that were kept while {shown(store.uri)} was away.")
    return sent
