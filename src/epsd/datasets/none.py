"""Nothing to detect: for whoever classifies alone."""

from pathlib import Path

from epsd.registry import variant


@variant
class Nothing:
    """No pictures with boxes. `detect` says so in one line, and leaves empty results. No settings."""

    def __call__(self, folder: Path, *, seed: int, images: object = None, class_names: object = None) -> None:
        """No source of boxes."""
