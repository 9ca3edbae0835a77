"""Your own images: a folder, or a .zip or .tar(.gz) of one, in `split/class/image` or `class/image` layout."""

from typing import Annotated

from pydantic import Field

from epsd.files.archives import open_tree
from epsd.files.layouts import Reading, Source, Unreadable, folder_source
from epsd.project.runtime import located
from epsd.project.settings import Place
from epsd.registry import variant

Pixels = Annotated[int, Field(ge=4, le=4096)]


@variant
class ImageFolder:
    """Split folders are train, val (valid, validation) and test; those that are missing are carved from train.

    root : the folder or archive; a single folder around everything is skipped.
    size : side in pixels of the square that each image becomes (the shorter side is resized to `resize`, then the
        middle is cut); None keeps the images, which then must all have one size. Images of up to 64 pixels are
        held in memory, larger ones are streamed from their files.
    resize : shorter side before the cut, None = `size`.
    grayscale : one channel instead of three.
    unreadable : "error" stops at a damaged image, "skip" leaves it out, counts and names it.
    """

    root: Place
    size: Pixels | None = None
    resize: Pixels | None = None
    grayscale: bool = False
    unreadable: Unreadable = "error"

    def __call__(self) -> Source:
        """Class names are the class folders, sorted."""
        reading = Reading(self.size, self.resize, self.grayscale, self.unreadable)
        return folder_source(open_tree(located(self.root)), reading)
