"""Your own images: a folder, or a .zip or .tar(.gz) of one, in `split/class/image` or `class/image` layout."""

from typing import Annotated

from pydantic import Field

from epsd.files.archives import FolderTree, open_tree
from epsd.files.layouts import Reading, Source, Unreadable, folder_source
from epsd.files.tables import Column, metadata, placed, table_source
from epsd.project.runtime import located, project_root
from epsd.project.settings import Place, Text
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
    unreadable : "error" stops at damaged images (and rows without their image), "skip" leaves them out and names them.
    labels : a CSV file, or one of JSON lines, in `root`, or else a path as of `root`, whose rows name images and their
        classes; null: folders are classes, unless there is a `metadata.csv` or `metadata.jsonl` with file_name and
        label, as Hugging Face has it.
    columns : which columns tell the image, the label and (optional) the split: `{image: photo, label: breed}`; those
        that are not named are looked for by their usual names (`epsd.files.tables.USUAL`).
    title : what runs, cards and figures call the data set; null: the name of its folder or archive.
    """

    root: Place
    size: Pixels | None = None
    resize: Pixels | None = None
    grayscale: bool = False
    unreadable: Unreadable = "error"
    labels: Text | None = None
    columns: dict[Column, str] = Field(default_factory=dict)
    title: Text | None = None

    def __call__(self) -> Source:
        """Class names are the class folders, or the classes that the table names, sorted."""
        reading = Reading(self.size, self.resize, self.grayscale, self.unreadable)
        tree = open_tree(located(self.root))
        if self.labels is not None:
            tables = placed(tree, self.labels, FolderTree(project_root()))
        else:
            tables = {name: (tree, name) for name in metadata(tree)}
        return table_source(tree, tables, reading, self.columns) if tables else folder_source(tree, reading)
