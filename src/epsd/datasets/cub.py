"""CUB-200-2011: 11,788 photographs of 200 bird species, 5,994 for training and 5,794 for test.

C. Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, technical report CNS-TR-2011-001, Caltech, 2011.
"""

from epsd.datasets.downloads import Published, locate
from epsd.files.archives import Tree, open_tree
from epsd.files.layouts import Labelled, Reading, Source, SourceError, Split, Unreadable, below, check_listed, labelled
from epsd.project.runtime import located
from epsd.project.settings import Place, Side, Text
from epsd.registry import variant

PUBLISHED = Published(
    "CUB_200_2011.tgz",
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    "md5:97eceeb196236b17998738112f37df78",
)
TERMS = "non-commercial research and education; the images stay their owners'"
_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


@variant
class Cub:
    """`root`: the unpacked folder, an archive of it, or where to put the download (1.1 GB).

    `top`: name of the folder inside. `size`, `resize`: side of the network's square and of the shorter side before
    it is cut, in pixels (224 and 256: the ImageNet literature). `download` true accepts the terms.
    `unreadable`: "error" stops at a damaged image, "skip" leaves it out and counts it.
    """

    root: Place = "data/cub"
    top: Text = "CUB_200_2011"
    size: Side = 224
    resize: Side | None = 256
    download: bool = False
    unreadable: Unreadable = "error"

    def __call__(self) -> Source:
        """The official train and test splits; validation is carved from train."""
        tree = open_tree(locate(located(self.root), PUBLISHED, self.download, TERMS))
        top = below(tree, "images.txt", self.top)
        lists = _lists(tree, top)
        class_names = list(lists["classes.txt"].values())
        number = {key: i for i, key in enumerate(lists["classes.txt"])}
        splits: dict[Split, Labelled] = {}
        flags: dict[Split, str] = {"train": "1", "test": "0"}
        for split, flag in flags.items():
            keys = [key for key in lists["images.txt"] if _entry(lists, "train_test_split.txt", key, tree) == flag]
            names = [f"{top}images/{lists['images.txt'][key]}" for key in keys]
            check_listed(tree, names, "images.txt")
            classes = (_entry(lists, "image_class_labels.txt", key, tree) for key in keys)
            splits[split] = labelled(tree, names, classes, number, "is not in classes.txt")
        reading = Reading(self.size, self.resize, unreadable=self.unreadable)
        return Source(f"CUB ({tree.where})", class_names, splits, reading)


Lists = dict[str, dict[str, str]]
"""Text file -> {number in its first column: the rest of the line}."""


def _lists(tree: Tree, top: str) -> Lists:
    lists: Lists = {}
    for name, content in tree.read_many([top + name for name in _LISTS]):
        rows = [line.split(maxsplit=1) for line in content.decode("utf-8", "replace").splitlines() if line.strip()]
        if any(len(row) < 2 for row in rows):
            raise SourceError(f"{tree.where}: '{name}' has a line without two columns.")
        lists[name.removeprefix(top)] = {key: value.strip() for key, value in rows}
    return lists


def _entry(lists: Lists, name: str, key: str, tree: Tree) -> str:
    if key not in lists[name]:
        raise SourceError(f"{tree.where}: '{name}' has no line for image {key} of images.txt.")
    return lists[name][key]
