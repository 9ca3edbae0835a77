"""Boxes as people annotate them: a devkit is read and checked."""
