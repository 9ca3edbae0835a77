"""A network as an ONNX file, in fp32 and in int8: made here, asked by `epsd.files.onnx_file`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from epsd.files.onnx_file import save, silently, words_of

OPSET = 20
"""The first with all that is used here; runtimes of 2024 and later read it."""

_HEAVY = {"Conv", "Gemm", "MatMul"}
"""With the first of them the network begins: what stands before it prepares the images."""

_CALIBRATED_AT_ONCE = 64


def export(module: nn.Module, images: torch.Tensor, sizes: Sequence[str], path: Path, words: Mapping[str, str]) -> None:
    """Write `module` (on the CPU, in evaluation mode) to `path`.

    Parameters
    ----------
    images : an example (B, C, H, W), B > 1: of one image the export would take the number 1 for a part of the network.
    sizes : the dimensions that stay open, of "batch", "height", "width".
    words : metadata of the file.

    Raises
    ------
    nearly any type of error, where torch cannot export the module; OSError where the file cannot be written.
    """
    places = {"batch": 0, "height": 2, "width": 3}
    opened = {places[name]: torch.export.Dim(name) for name in sizes}
    with silently():
        program = torch.onnx.export(
            module,
            (images,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=(opened,),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    save(program.model_proto, path, words)


def quantise(source: Path, path: Path, images: NDArray[np.float32]) -> None:
    """Write the network of `source` to `path` in int8: static, per channel, between pairs of quantisers (QDQ).

    Activations are uint8 and weights int8, which x86 and ARM both multiply fastest. `images` (N, C, H, W) show which
    values occur. What prepares the images, and what comes after the last layer, stays in fp32. A processor without
    int8 dot products (VNNI) would overflow with eight bits of weight: there seven are used.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            parts = range(0, len(images), _CALIBRATED_AT_ONCE)
            self._left = iter([images[start : start + _CALIBRATED_AT_ONCE] for start in parts])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self._left, None)
            return None if batch is None else {"images": batch}

    graph = onnx.load(source)
    with silently():
        quantize_static(
            source,
            path,
            Images(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=not torch.cpu._is_vnni_supported(),
            nodes_to_quantize=_network_nodes(graph),
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
    save(onnx.load(path), path, words_of(graph))


def _network_nodes(model: Any) -> list[str]:
    """Names of the nodes from the first layer to the last."""
    nodes = list(model.graph.node)
    heavy = [place for place, node in enumerate(nodes) if node.op_type in _HEAVY]
    return [node.name for node in nodes[heavy[0] : heavy[-1] + 1]]
