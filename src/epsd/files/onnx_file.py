"""A network in an ONNX file: asked by ONNX Runtime without torch, written with a digest and nothing of this machine."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsd.files.digests import DamagedFile, digest
from epsd.files.regular import read_bytes
from epsd.types import EpsdError

CARD, WEIGHTS, DIGEST, WEIGHT_BITS = "card", "weights", "digest", "weight_bits"
"""Keys of the file's metadata: the card as JSON; the digest of the weights that it was made from; that of the file; how
many bits a weight has, where int8 holds fewer than eight."""

FP32, INT8, FOLDER = "model.onnx", "model.int8.onnx", "onnx"
"""Names of the files, by the form of the network, and of the folder with them."""

SCRIPT = Path(__file__).parents[1] / "evaluation" / "predict.py"
"""Goes with every ONNX file that is handed on, and needs nothing else of this package."""


class OnnxFile:
    """An open file: `card` (as beside the weights), `weights` (their digest), and probabilities when it is called.

    `threads`: of the processor, 0 is all of them. Raises DamagedFile for what is no file of ours.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        from onnxruntime import InferenceSession, SessionOptions

        options = SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # no warnings about processors
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or idle threads disturb what runs next
        try:
            self._session = InferenceSession(_unsealed(path), options, providers=["CPUExecutionProvider"])
            words = self._session.get_modelmeta().custom_metadata_map
            self.card: dict[str, Any] = json.loads(words[CARD])
            self.weights: str = words.get(WEIGHTS, "")
        except EpsdError:
            raise
        except Exception as error:  # the runtime's errors have no common type
            reason = " ".join(str(error).split())[:160]
            raise DamagedFile(f"{path}: cannot be read as a network that epsd exported ({reason}).") from None

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, C, H, W), values 0 to 255, -> probabilities (B, K)."""
        probabilities: NDArray[np.float32] = self._session.run(None, {"images": images})[0]
        return probabilities

    def outputs(self, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Everything that the network says, by name."""
        names = [one.name for one in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, {"images": images}), strict=True))


_SEAL = re.compile(rb"\x72\x12\x0a\x06digest\x12\x08([0-9a-f]{8})\Z")
"""The end of a file: an entry of its metadata, as protocol buffers write it, with the digest of all before it."""


def sealed(model: bytes) -> bytes:
    """A serialised model with a digest, which is one more entry of its metadata to whoever else reads it."""
    return model + b"\x72\x12\x0a\x06digest\x12\x08" + digest([model]).encode()


def _unsealed(path: Path) -> bytes:
    """The content of a file of ours. Raises DamagedFile where it is not what was written, OSError."""
    content = read_bytes(path)
    seal = _SEAL.search(content[-32:])
    if seal is None:
        raise DamagedFile(f"{path}: carries no digest: damaged, or no network that epsd exported.")
    if digest([memoryview(content)[: -len(seal[0])]]) != seal[1].decode():
        raise DamagedFile(f"{path}: damaged: its content is not what was written.")
    return content


# --- writing --------------------------------------------------------------------------------------------------------


def save(model: Any, path: Path, words: Mapping[str, str]) -> None:
    """Write a `ModelProto` with `words` as its only metadata, and nothing of the machine on which it was made.

    The same network gives the same bytes. Raises OSError.
    """
    graph = model.graph
    _strip(model)
    used = {node.domain for node in graph.node}
    versions = {entry.domain: entry.version for entry in model.opset_import if entry.domain in used}
    del model.opset_import[:], graph.value_info[:]
    for domain, version in sorted(versions.items()):
        model.opset_import.add(domain=domain, version=version)
    for key, value in words.items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name, model.producer_version, graph.name = "epsd", "", "network"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(sealed(model.SerializeToString(deterministic=True)))
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from None


def words_of(model: Any) -> dict[str, str]:
    """The metadata of a `ModelProto` that `save` wrote."""
    return {entry.key: entry.value for entry in model.metadata_props if entry.key != DIGEST}


def fill(source: Path, path: Path) -> None:
    """Write the network of `source` to `path` with a small number for every zero: the dense twin."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1:
            tensor.CopyFrom(numpy_helper.from_array(np.where(values == 0, np.float32(0.01), values), tensor.name))
    save(model, path, words_of(model))


def _strip(message: Any) -> None:
    """Take notes off a message and all that is inside it: torch writes its stack, with paths, into every node."""
    for name in {"doc_string", "metadata_props"} & set(message.DESCRIPTOR.fields_by_name):
        message.ClearField(name)
    for field, content in message.ListFields():
        if field.message_type is not None:
            for part in content if hasattr(content, "__len__") else [content]:
                _strip(part)


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """Advice of torch and ONNX Runtime that a user can do nothing about stays out of the log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
            yield
    finally:
        logging.disable(before)
