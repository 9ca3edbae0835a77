"""Channels brought to like ranges before a network is written in int8, where all channels of a map share one scale.

A channel may be divided by any s > 0 where it is made and multiplied by s where it is read, if nothing but ReLU, sums,
means and maxima stand in between: the network says the same (cross-layer equalisation, Nagel et al. 2019, arXiv
1906.04721, section 4.1). A channel that is small beside others then keeps as many bits as they do. Here s is the root
of what occurs in it, over the weights that read it (Xiao et al. 2022, arXiv 2211.10438, equation 4, alpha = 0.5).

Channels that a sum joins have one s, so that shortcuts stay what they are; layers with groups are read group by group.
Left alone is what anything else touches: another activation, concatenation, attention, a BatchNorm that the export
could not fold into a layer, the network's input and output, a weight that two layers share.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

_EACH_CHANNEL = {"Add", "AveragePool", "GlobalAveragePool", "Identity", "MaxPool", "Relu"}
"""What makes s times its output of s times its inputs, channel by channel. Means and reshapes may: see `_commutes`."""


class Group(NamedTuple):
    """Nodes of the layers that make, and of those that read, channels which have one s."""

    makers: list[Any]
    readers: list[Any]


def equalise_(model: Any, images: Array, at_once: int) -> list[Group]:
    """Scale the channels of a `ModelProto`, in place. Returns those that could be.

    images : (N, C, H, W), which show what occurs; so many `at_once` go through the network.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = groups(model.graph)
    layers = [node for group in found for part in group for node in part]
    values = {name: numpy_helper.to_array(tensors[name]).copy() for node in layers for name in node.input[1:]}
    read = {node.input[0]: values[node.input[1]].ndim for group in found for node in group.readers}
    largest = _largest(model, read, images, at_once) if found else {}
    for makers, readers in found:
        scales = _scales(readers, values, largest)
        for node in readers:
            view = _by_channel(node, values[node.input[1]])
            view *= _along(scales, view, 2)
        for node in makers:
            view = _by_channel(node, values[node.input[1]])
            view /= _along(scales, view, 1)
            for name in node.input[2:]:
                values[name] /= scales.reshape(values[name].shape)
    for name, value in values.items():
        tensors[name].CopyFrom(numpy_helper.from_array(value, name))
    return found


def _scales(readers: Sequence[Any], values: Mapping[str, Array], largest: Mapping[str, Array]) -> Array:
    """(C,) s of every channel, 1 in the (geometric) mean and where a channel is always zero or never read."""
    views = [_by_channel(node, values[node.input[1]]) for node in readers]
    weights = _joint([np.abs(view).max(axis=(1, *range(3, view.ndim))).ravel() for view in views])
    occurs = _joint([largest[node.input[0]] for node in readers])
    alive = (occurs > 0) & (weights > 0)
    logs = 0.5 * np.log(np.divide(occurs, weights, out=np.ones_like(occurs), where=alive))
    scales: Array = np.exp(np.where(alive, logs - logs[alive].mean(), 0)) if alive.any() else np.ones_like(occurs)
    return scales


def _joint(ranges: Sequence[Array]) -> Array:
    """(C,) the largest range of each channel over all places, each as a share of the largest there."""
    shares: Array = np.max([each / max(each.max(), np.finfo(np.float32).tiny) for each in ranges], axis=0)
    shares[shares < 1e-6] = 0
    return shares


def _largest(model: Any, read: Mapping[str, int], images: Array, at_once: int) -> dict[str, Array]:
    """Name of a map -> (C,) the largest magnitude of each channel. `read`: how many dimensions each map has."""
    from onnx import ModelProto, TensorProto, helper, numpy_helper
    from onnxruntime import InferenceSession, SessionOptions

    asked, options = ModelProto(), SessionOptions()
    options.log_severity_level = 3  # no warnings about processors
    asked.CopyFrom(model)
    graph = asked.graph
    for place, (name, rank) in enumerate(read.items()):
        own = [f"largest.{place}{end}" for end in ("", ".axes", ".size")]
        graph.initializer.append(numpy_helper.from_array(np.array([0, *range(2, rank)]), own[1]))
        graph.node.append(helper.make_node("Abs", [name], [own[2]]))
        graph.node.append(helper.make_node("ReduceMax", [own[2], own[1]], [own[0]], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(own[0], TensorProto.FLOAT, None))
    session = InferenceSession(asked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names, source = [f"largest.{place}" for place in range(len(read))], session.get_inputs()[0].name
    parts = range(0, len(images), at_once)
    found = [session.run(names, {source: images[start : start + at_once]}) for start in parts]
    return {name: np.max([part[place] for part in found], axis=0) for place, name in enumerate(read)}


# --- the graph ------------------------------------------------------------------------------------------------------


def groups(graph: Any) -> list[Group]:
    """Channels that may be scaled, by the layers that make and that read them."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    layers = [node for node in graph.node if _is_layer(node, tensors, uses)]
    joined: dict[str, set[str]] = {}
    fixed = {value.name for part in (graph.input, graph.output) for value in part}
    for node in graph.node:
        maps = {name for name in (*node.input, *node.output) if name and name not in tensors}
        if _commutes(node, graph, tensors):
            whole = set().union(*(joined.get(name, {name}) for name in maps))
            joined |= dict.fromkeys(whole, whole)
        elif node not in layers:
            fixed |= maps | {name for attribute in node.attribute if attribute.HasField("g") for name in uses}
    ends = dict.fromkeys(name for node in layers for name in (node.output[0], node.input[0]))
    wholes = {min(whole): whole for whole in (joined.get(name, {name}) for name in ends) if not whole & fixed}
    found = [
        Group([n for n in layers if n.output[0] in whole], [n for n in layers if n.input[0] in whole])
        for whole in wholes.values()
    ]
    return [group for group in found if len(_widths(group, tensors)) == 1 and all(group)]


def _is_layer(node: Any, tensors: Mapping[str, Any], uses: Mapping[str, int]) -> bool:
    """A convolution or linear layer with numbers of its own in single precision, one of its bias per channel."""
    if node.op_type not in ("Conv", "Gemm") or _setting(node, "transA", 0):
        return False
    own = [tensors[name] for name in node.input[1:] if name in tensors and uses[name] == 1]
    if len(own) < len(node.input) - 1 or any(each.data_type != each.FLOAT for each in own):
        return False
    made = own[0].dims[0 if node.op_type == "Conv" or _setting(node, "transB", 0) else 1]
    return all(int(np.prod(each.dims)) == made for each in own[1:])


def _commutes(node: Any, graph: Any, tensors: Mapping[str, Any]) -> bool:
    """Whether s times its inputs, channel by channel, give s times its output."""
    if node.op_type in _EACH_CHANNEL:
        return len(node.output) == 1 and not any(name in tensors for name in node.input)
    if node.op_type == "Reshape":  # of a map that has become one number per channel
        return any(node.input[0] in other.output and _is_mean(other, graph, tensors) for other in graph.node)
    return _is_mean(node, graph, tensors)


def _is_mean(node: Any, graph: Any, tensors: Mapping[str, Any]) -> bool:
    """Over height and width."""
    if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in tensors:
        return str(node.op_type) == "GlobalAveragePool"
    from onnx import numpy_helper

    ranks = {len(tensors[n.input[1]].dims) for n in graph.node if n.op_type == "Conv" and n.input[1] in tensors}
    axes: list[int] = numpy_helper.to_array(tensors[node.input[1]]).tolist()
    return ranks == {4} and {axis % 4 for axis in axes} == {2, 3}


def _widths(group: Group, tensors: Mapping[str, Any]) -> set[int]:
    """Numbers of channels: another than one where a sum broadcasts, or a reshape makes several of a channel."""
    made = [_shape(node, tensors)[0] for node in group.makers]
    return {*made, *(_shape(node, tensors)[1] * _setting(node, "group", 1) for node in group.readers)}


def _shape(node: Any, tensors: Mapping[str, Any]) -> tuple[int, int]:
    """Channels that a layer makes, and that each of its groups reads."""
    first, second = tensors[node.input[1]].dims[:2]
    return (second, first) if node.op_type == "Gemm" and not _setting(node, "transB", 0) else (first, second)


def _by_channel(node: Any, weight: Array) -> Array:
    """A view of a layer's weight: (groups, made by each, read by each, ...)."""
    if node.op_type == "Gemm":
        return (weight if _setting(node, "transB", 0) else weight.T)[None]
    parts = _setting(node, "group", 1)
    return weight.reshape(parts, len(weight) // parts, *weight.shape[1:])


def _along(scales: Array, view: Array, axis: int) -> Array:
    """`scales` of the channels that are made (1) or read (2) in the shape of a view by channel."""
    return scales.reshape(len(view), *(view.shape[place] if place == axis else 1 for place in range(1, view.ndim)))


def _setting(node: Any, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
