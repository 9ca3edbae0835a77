"""A data set becomes artifacts/data: checked, split, written once."""
