"""Where runs go: the kinds of stores, and how an address is written down."""

import os
import re
from urllib.parse import urlsplit, urlunsplit

from epsd.project.runtime import counted, project_root, state_folder
from epsd.types import EpsdError

ADDRESSES = ("sqlite:///...", "postgresql://...", "mysql://...", "mssql://...", "http://...", "https://...")


class AddressError(EpsdError):
    """An address of a tracking store of a kind that is not supported."""


def tracking_uri() -> str:
    """Where runs go: `MLFLOW_TRACKING_URI`, else `mlflow.db` in the project's root (also from a queued experiment).

    Raises AddressError for an address of another kind than those in `ADDRESSES`.
    """
    told = os.environ.get("MLFLOW_TRACKING_URI", "")
    if told and not _is_address(told):
        kept = len(list(state_folder("spool").glob("*.jsonl")))
        also = f" {counted(kept, 'session')} in {state_folder('spool')} wait for their store." if kept else ""
        raise AddressError(
            f"MLFLOW_TRACKING_URI: '{shown(told)}' is no address of a tracking store. Valid: {', '.join(ADDRESSES)}; "
            f"without it runs go to mlflow.db.{also}"
        )
    if re.match(r"sqlite:///[^/]", told):  # a relative file would land in the throw-away copy of a queued experiment
        return f"sqlite:///{project_root() / told.removeprefix('sqlite:///')}"
    return told or f"sqlite:///{project_root() / 'mlflow.db'}"


def _is_address(text: str) -> bool:
    """A driver may be named after a `+`, as in `mysql+pymysql://`; a port is a number."""
    kinds = "|".join(kind.removesuffix("...") for kind in ADDRESSES).replace(":", r"(\+\w+)?:")
    try:
        return bool(re.match(rf"({kinds})\S", text)) and urlsplit(text).port != 0
    except ValueError:
        return False


def shown(uri: str) -> str:
    """`uri` without a password, as it may be printed and written down."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
