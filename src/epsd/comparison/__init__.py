"""What differs between runs, and whether it is more than chance."""
