"""A store whose project folder was moved: its artifact addresses follow."""

import contextlib
import sqlite3
from pathlib import Path

_RELOCATED = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}


def relocate(database: Path, root: Path) -> None:
    """Point the artifact addresses of a store whose project folder was moved, renamed or copied to where it is now.

    MLflow makes them absolute when an experiment is created (mlflow/mlflow#3144). The old place is the tag
    `epsd.root` that `Store` leaves on every experiment. A store that can only be read stays as it is.
    """
    if not database.is_file():
        return
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as link:
        try:
            with link:
                _relocate(link, str(root))
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
                raise


def _relocate(link: sqlite3.Connection, root: str) -> None:
    tables = {name for (name,) in link.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "experiment_tags" not in tables:
        return
    query = "SELECT DISTINCT value FROM experiment_tags WHERE key = 'epsd.root' AND value != ?"
    for (old,) in link.execute(query, (root,)).fetchall():
        _replace_prefix(link, tables, old, root)
        link.execute("UPDATE experiment_tags SET value = ? WHERE key = 'epsd.root' AND value = ?", (root, old))


def _replace_prefix(link: sqlite3.Connection, tables: set[str], old: str, new: str) -> None:
    for table, column in _RELOCATED.items():
        if table in tables and any(row[1] == column for row in link.execute(f"PRAGMA table_info({table})")):
            for scheme in ("", "file://"):
                before = f"{scheme}{old}/"
                link.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (f"{scheme}{new}/", len(before) + 1, len(before), before),
                )
