"""A backbone becomes a detector: trained, scored, drawn."""
