"""The only importer of mlflow: `recording` writes runs. MLflow itself is imported when a run is opened, not before."""

from epsd.tracking.recording import Tracker, track, tracking_uri, ui_address

__all__ = ["Tracker", "track", "tracking_uri", "ui_address"]
