"""The folder that one works in: parameters, presets, artifacts, the terminal."""
