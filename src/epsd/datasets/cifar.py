"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 10 or 100 classes.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, University of Toronto, 2009.
Both published forms are read as they are: the "python version" (pickles, read by an unpickler that can build
nothing but arrays) and the "binary version". URLs and checksums are those that torchvision uses.
"""

import io
import pickle
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from epsd.datasets.downloads import Published, locate
from epsd.files.archives import Tree, open_tree
from epsd.files.layouts import Labelled, Source, SourceError, Split, below
from epsd.project.runtime import located
from epsd.project.settings import Place
from epsd.registry import variant

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_SITE = "https://www.cs.toronto.edu/~kriz"


class Edition(NamedTuple):
    """How CIFAR-10 or CIFAR-100 is laid out: file names, key and offset of the labels, bytes of label per record."""

    published: Published
    train: tuple[str, ...]
    test: str
    meta: str
    binary_meta: str
    names_key: str
    labels_key: str
    label_bytes: int


EDITIONS = {
    10: Edition(
        Published("cifar-10-python.tar.gz", f"{_SITE}/cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"),
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "batches.meta",
        "batches.meta.txt",
        "label_names",
        "labels",
        1,
    ),
    100: Edition(
        Published(
            "cifar-100-python.tar.gz", f"{_SITE}/cifar-100-python.tar.gz", "md5:eb9058c3a382ffc7106e4002c42a8d85"
        ),
        ("train",),
        "test",
        "meta",
        "fine_label_names.txt",
        "fine_label_names",
        "fine_labels",
        2,  # the coarse label, then the fine one
    ),
}


@variant
class Cifar:
    """`classes`: 10 or 100. `root`: the unpacked folder, an archive of it, or where to put the download."""

    classes: Literal[10, 100] = 10
    root: Place = "data/cifar"
    download: bool = True

    def __call__(self) -> Source:
        """The official train and test splits; validation is carved from train."""
        edition = EDITIONS[self.classes]
        where = locate(located(self.root), edition.published, self.download)
        tree = open_tree(where)
        read = _read_binary if any(name.endswith(".bin") for name in tree.names) else _read_pickles
        class_names, splits = read(tree, edition)
        return Source(f"CIFAR-{self.classes} ({where})", class_names, splits)


Parts = tuple[list[str], dict[Split, Labelled]]


def _read_pickles(tree: Tree, edition: Edition) -> Parts:
    top = below(tree, edition.meta)
    names = (*edition.train, edition.test)
    batches = {  # one file's bytes at a time: all of them would be as much again as the images
        name.removeprefix(top): _unpickled(content, tree, name.removeprefix(top))
        for name, content in tree.read_many([top + name for name in (*names, edition.meta)])
    }
    parts = {
        name: (
            _images(batches[name].get("data"), tree, name),
            _labels(batches[name].get(edition.labels_key), tree, name),
        )
        for name in names
    }
    return _class_names(batches[edition.meta].get(edition.names_key), tree, edition), _joined(parts, edition)


def _read_binary(tree: Tree, edition: Edition) -> Parts:
    top = below(tree, edition.binary_meta)
    names = (*edition.train, edition.test)
    parts = {
        (part := name.removeprefix(top).removesuffix(".bin")): _records(content, edition.label_bytes, tree, part)
        for name, content in tree.read_many([f"{top}{name}.bin" for name in names])
    }
    lines = tree.read(top + edition.binary_meta).decode("utf-8", "replace").split()
    return _class_names(lines, tree, edition), _joined(parts, edition)


Part = tuple[NDArray[np.uint8], NDArray[np.int64]]


def _joined(parts: dict[str, Part], edition: Edition) -> dict[Split, Labelled]:
    train = [parts[name] for name in edition.train]
    images, labels = (np.concatenate([part[i] for part in train]) for i in (0, 1))
    test_images, test_labels = parts[edition.test]
    return {"train": Labelled(images, labels.astype(np.int64)), "test": Labelled(test_images, test_labels)}


def _records(content: bytes, label_bytes: int, tree: Tree, name: str) -> Part:
    if not content or len(content) % (label_bytes + _PIXELS):
        raise SourceError(f"{tree.where}: '{name}.bin' is truncated, or no CIFAR file ({len(content)} bytes).")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, label_bytes + _PIXELS)
    return records[:, label_bytes:].reshape(-1, *_SHAPE).copy(), records[:, label_bytes - 1].astype(np.int64)


def _images(data: Any, tree: Tree, name: str) -> NDArray[np.uint8]:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
        raise SourceError(f"{tree.where}: '{name}' holds no 'data' of {_PIXELS} bytes per image.")
    return data.reshape(-1, *_SHAPE)


def _labels(labels: Any, tree: Tree, name: str) -> NDArray[np.int64]:
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise SourceError(f"{tree.where}: '{name}' holds no list of labels.")
    return np.array(labels, dtype=np.int64)


def _class_names(names: Any, tree: Tree, edition: Edition) -> list[str]:
    wanted = 100 if edition.label_bytes == 2 else 10
    if not isinstance(names, list) or len(names) != wanted or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{tree.where}: names not {wanted} classes. Is dataset.classes right?")
    return list(names)


def _unpickled(content: bytes, tree: Tree, name: str) -> dict[str, Any]:
    try:
        value = ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except Forbidden as error:
        raise SourceError(f"{tree.where}: '{name}' refused: {error}.") from None
    except Exception as error:  # damaged pickles raise nearly any type
        raise SourceError(f"{tree.where}: '{name}' is truncated, or no CIFAR file ({error}).") from None
    if not isinstance(value, dict):
        raise SourceError(f"{tree.where}: '{name}' is no CIFAR file (holds a {type(value).__name__}).")
    return {key.decode("latin1") if isinstance(key, bytes) else key: item for key, item in value.items()}


class Forbidden(pickle.UnpicklingError):
    """A pickle that asks for more than arrays."""


class ArraysOnly(pickle.Unpickler):
    """Builds containers, numbers, text and numpy arrays; anything else is refused before it is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickled array needs: numpy's own three builders, and text as bytes."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise Forbidden(f"it wants to run {module}.{name}, which no CIFAR file needs")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise Forbidden(f"it wants the codec '{encoding}', which no CIFAR file needs")
    return text.encode("latin1")
