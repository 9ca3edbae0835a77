"""Bytes on disk become pictures, safely: archives, image files, folder layouts."""
