"""Tiny-ImageNet-200: 200 classes of ImageNet at 64x64 pixels, 500 training and 50 validation images each.

Y. Le and X. Yang, Tiny ImageNet Visual Recognition Challenge, Stanford CS231N, 2015. The labels of its test images
were never published: as in the literature, the official validation images are the test split here, and validation
is carved from train.
"""

from epsd.datasets.downloads import Published, locate
from epsd.files.archives import Tree, open_tree
from epsd.files.images import is_image
from epsd.files.layouts import Labelled, Reading, Source, SourceError, Split, Unreadable, below, check_listed, labelled
from epsd.project.runtime import located
from epsd.project.settings import Place
from epsd.registry import variant

PUBLISHED = Published(
    "tiny-imagenet-200.zip",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "md5:90528d7ca1a48142e341f4ef8d21d0de",
)
_STRAY = "is not in wnids.txt"
TERMS = "ImageNet's terms: non-commercial research and education"


@variant
class TinyImagenet:
    """`root`: the unpacked folder, an archive of it, or where to put the download (248 MB).

    `download` true says that you accept ImageNet's terms (non-commercial research and education).
    `unreadable`: "error" stops at a damaged image, "skip" leaves it out and counts it.
    """

    root: Place = "data/tiny-imagenet"
    download: bool = False
    unreadable: Unreadable = "error"

    def __call__(self) -> Source:
        """Classes in the order of wnids.txt sorted, named as there; some images are grey and become RGB."""
        tree = open_tree(locate(located(self.root), PUBLISHED, self.download, TERMS))
        top = below(tree, "wnids.txt")
        marked = f"{top}val/val_annotations.txt"
        text = {
            name: content.decode("utf-8", "replace") for name, content in tree.read_many([f"{top}wnids.txt", marked])
        }
        class_names = sorted(text[f"{top}wnids.txt"].split())
        number = {name: i for i, name in enumerate(class_names)}
        splits: dict[Split, Labelled] = {
            "train": _train(tree, top, number),
            "test": _test(tree, top, number, text[marked]),
        }
        reading = Reading(size=64, unreadable=self.unreadable)
        return Source(f"Tiny-ImageNet ({tree.where})", class_names, splits, reading)


def _train(tree: Tree, top: str, number: dict[str, int]) -> Labelled:
    """train/<wnid>/images/*.JPEG."""
    start = f"{top}train/"
    names = [name for name in tree.names if name.startswith(start) and is_image(name)]
    classes = [name[len(start) :].split("/")[0] for name in names]
    return labelled(tree, names, classes, number, _STRAY)


def _test(tree: Tree, top: str, number: dict[str, int], annotations: str) -> Labelled:
    """val/images/*.JPEG, labelled by val_annotations.txt (file, wnid, box: tab-separated)."""
    rows = [line.split() for line in annotations.splitlines() if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise SourceError(f"{tree.where}: 'val/val_annotations.txt' has a line without a file and a class.")
    names = [f"{top}val/images/{row[0]}" for row in rows]
    check_listed(tree, names, "val_annotations.txt")
    return labelled(tree, names, (row[1] for row in rows), number, _STRAY)
