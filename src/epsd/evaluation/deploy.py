"""A network as an ONNX file, in fp32 and in int8: made here, asked by `epsd.files.onnx_file`."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from epsd.compute.quantise import LEVELS
from epsd.evaluation.equalise import equalise_
from epsd.evaluation.intake import Intake, ServingError
from epsd.evaluation.servable import Servable, example
from epsd.files.onnx_file import CARD, WEIGHT_BITS, WEIGHTS, save, silently, words_of

OPSET, OPSET_INT4 = 20, 21
"""The first with all that is used here, runtimes of 2024 and later read it; the first with numbers of four bits."""

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


def export_whole(network: nn.Module, card: dict[str, Any], path: Path, weights: str = "") -> None:
    """`network` with its preprocessing as an ONNX file that knows its card, and the digest of its `weights`. Errors: as
    of `export`.
    """
    intake = Intake.of(card)
    channels, height, width = intake.image_shape
    module = Servable(copy.deepcopy(network).cpu(), intake)
    images = torch.from_numpy(example(np.zeros((2, channels, height + 3, width + 1), dtype=np.uint8)))
    export(module, images, ("batch", "height", "width"), path, {CARD: json.dumps(card), WEIGHTS: weights})


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    class_names: Sequence[str],
    image_shape: tuple[int, int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Write a classifier as an ONNX file that takes images (B, C, height, width) of any size, values 0 to 255.

    It gives probabilities (B, K). `epsd predict --model PATH` and `epsd export --model PATH` take it.

    image_shape : (C, H, W) that the network was trained on: images of another size are brought to it.
    mean, std : per channel, of pixels in [0, 1], by which its training images were normalised; None: they were not.

    Raises ServingError: torch cannot export it. OSError: `path` cannot be written.
    """
    channels = image_shape[0]
    card = {"class_names": list(class_names), "image_shape": list(image_shape)}
    card |= {"mean": list(mean or [0.0] * channels), "std": list(std or [1.0] * channels)}
    try:
        export_whole(model, card, Path(path))
    except OSError:
        raise
    except Exception as error:  # torch.export raises nearly any type
        raise ServingError(
            f"torch cannot export this network ({type(error).__name__}: {' '.join(str(error).split())[:200]})."
        ) from None


def quantise(source: Path, path: Path, images: NDArray[np.float32], bits: int | None = None) -> None:
    """Write the network of `source` to `path` in int8: static, per channel, between pairs of quantisers (QDQ).

    Activations are uint8 and weights int8, which x86 and ARM both multiply fastest. `images` (N, C, H, W) show which
    values occur. What prepares the images, and what comes after the last layer, stays in fp32. A processor without
    int8 dot products (VNNI) would overflow with eight bits of weight: there seven are used.

    bits : of the weights, 8 or 4, to which training rounded them (`train.quantise`): the file has those very weights.
        Four are kept two to a byte; the runtime makes int8 of them when it opens the file, so that they are multiplied
        as fast as eight. None: training rounded nothing; channels are brought to like ranges (`equalise_`), then
        weights become eight bits.
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
    words = words_of(graph)
    if bits is None:
        equalise_(graph, images, _CALIBRATED_AT_ONCE)
    nodes = _network_nodes(graph)
    grids = _grids(graph, nodes, LEVELS[4], QuantType.QInt8) if bits == 4 else {}
    with silently():
        quantize_static(
            graph,
            path,
            Images(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=bits != 4 and not torch.cpu._is_vnni_supported(),
            nodes_to_quantize=nodes,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"], "TensorQuantOverrides": grids},
        )
    model = onnx.load(path)
    if grids:
        _pack(model, grids)
    save(model, path, words | ({WEIGHT_BITS: str(bits)} if grids else {}))


def _grids(model: Any, nodes: Sequence[str], levels: int, kind: Any) -> dict[str, list[dict[str, Any]]]:
    """Name of each weight -> per output channel the distance of two numbers, `levels` of which reach its largest."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    grids = {}
    for node in model.graph.node:
        if node.name in nodes and node.op_type in _HEAVY and node.input[1] in constants:
            axis = 0 if node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute) else 1
            weight = np.abs(numpy_helper.to_array(constants[node.input[1]]))
            scales = weight.max(axis=tuple(place for place in range(weight.ndim) if place != axis)) / np.float32(levels)
            about = {"axis": axis, "quant_type": kind, "zero_point": np.array(0, np.int8)}
            grids[node.input[1]] = [{**about, "scale": np.float32(scale or 1)} for scale in scales]
    return grids


def _pack(model: Any, weights: Iterable[str]) -> None:
    """Keep these int8 weights as int4, each cast to int8 before its use."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for name in (f"{name}_quantized" for name in weights):
        codes = numpy_helper.to_array(constants[name])
        packed = helper.make_tensor(f"{name}_packed", TensorProto.INT4, codes.shape, codes.flatten().tolist())
        constants[name].CopyFrom(packed)
        graph.node.insert(0, helper.make_node("Cast", [packed.name], [name], to=TensorProto.INT8))
    for entry in model.opset_import:
        entry.version = OPSET_INT4 if not entry.domain else entry.version


def _network_nodes(model: Any) -> list[str]:
    """Names of the nodes from the first layer to the last."""
    nodes = list(model.graph.node)
    heavy = [place for place, node in enumerate(nodes) if node.op_type in _HEAVY]
    return [node.name for node in nodes[heavy[0] : heavy[-1] + 1]]
