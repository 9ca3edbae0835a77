"""Batches: of the prepared data in memory or streamed, or of a user's own loader."""
