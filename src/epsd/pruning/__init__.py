"""Scores become a mask; the meta-gradient through the training steps that follow."""
