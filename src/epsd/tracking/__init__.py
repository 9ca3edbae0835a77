"""The only importer of mlflow: `recording` writes runs. MLflow itself is imported when a run is opened, not before."""

from epsd.tracking.addresses import tracking_uri
from epsd.tracking.recording import Tracker, new_id, track
from epsd.tracking.ui import ui_address

__all__ = ["Tracker", "new_id", "track", "tracking_uri", "ui_address"]
