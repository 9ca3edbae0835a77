"""Why one pruning is better than another: `epsd analyse` trains EPSD and simple combinations and measures them.

A simple combination is early pruning by another score and then the same self-distilled training. Everything runs in
process on the prepared data; nothing here reads the test split.
"""

from epsd.types import EpsdError


class AnalysisError(EpsdError):
    """What was asked for cannot be analysed."""
