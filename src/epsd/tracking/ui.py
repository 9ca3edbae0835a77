"""The address of the runs in the MLflow UI."""

import contextlib
import sqlite3

from epsd.tracking import pages
from epsd.tracking.addresses import shown, tracking_uri
from epsd.tracking.relocation import relocate
from epsd.tracking.store import Store


def ui_address(port: int = 5000) -> str:
    """The address of the runs of the experiment with the newest run, in a `mlflow ui` on this machine; of a server
    that has a UI of its own, its address. The artifacts of a project that was moved are found from here on.

    Raises AddressError, as `tracking_uri`.
    """
    store = Store(tracking_uri())
    address = f"http://127.0.0.1:{port}/"
    if store.database is None or not store.database.is_file():
        return shown(store.uri) if store.remote else address
    with store.alone():
        relocate(store.database, store.home)
    with contextlib.closing(sqlite3.connect(store.database)) as link, contextlib.suppress(sqlite3.Error):
        newest = link.execute("SELECT experiment_id FROM runs ORDER BY start_time DESC LIMIT 1").fetchone()
        if newest:
            return f"{address}#/experiments/{newest[0]}/runs?{pages.QUERY}"
    return address
