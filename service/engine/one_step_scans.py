"""Scans that run over a single step, written as the step: their bodies, between the nodes around them."""

from typing import Any

import numpy as np

from . import onnx_door as onnx
from .settled import Shapes, shapes_of

_PREFIX = "scan/"


def without_scans(model: Any) -> Any | None:
    """The model of one step with the body of every Scan in its place; None where some graph inside is no such Scan.

    A body's own tensors get names that nobody else has; those it reads from around it keep theirs. Shapes of what a
    Scan gives are known only when it is gone, so each pass may reach the next ones.
    """
    while any(onnx.subgraphs(node) for node in model.graph.node):
        shapes = shapes_of(onnx.shape_inference.infer_shapes(model).graph)
        scans = [node.output[0] for node in model.graph.node if _single(node, shapes)]
        if not scans:
            return None
        nodes = []
        for node in model.graph.node:
            prefix = f"{_PREFIX}{node.output[0]}/"
            nodes += _inlined(model.graph, node, prefix) if node.output[0] in scans else [node]
        onnx.replace(model.graph.node, nodes)
        del model.graph.value_info[:]
    return model


def _single(node: Any, shapes: Shapes) -> bool:
    """Is it a Scan over one step, without a graph in its body?"""
    if (
        node.op_type != "Scan"
        or not node.output[0]
        or any(onnx.subgraphs(inner) for inner in onnx.subgraphs(node)[0].node)
    ):
        return False
    inputs, axes, _ = _axes(node)
    scanned = zip(node.input[len(node.input) - inputs :], axes, strict=True)
    return any(len(shapes.get(name, ())) > axis and shapes[name][axis] == 1 for name, axis in scanned)


def _axes(node: Any) -> tuple[int, list[int], list[int]]:
    """How many of its inputs are scanned, and over which axis each of them and each stacked output goes."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    inputs = given["num_scan_inputs"]
    stacked = len(node.output) - (len(node.input) - inputs)
    return inputs, given.get("scan_input_axes") or [0] * inputs, given.get("scan_output_axes") or [0] * stacked


def _inlined(graph: Any, node: Any, prefix: str) -> list[Any]:
    """The nodes of one step. States go in and come out as they are, slices lose and outputs get the axis of time."""
    (body,), (inputs, in_axes, out_axes) = onnx.subgraphs(node), _axes(node)
    carried = len(node.input) - inputs
    names = {name: prefix + name for inner in body.node for name in inner.output if name}
    names |= {value.name: prefix + value.name for value in body.initializer}
    names |= {port.name: given for port, given in zip(body.input, node.input[:carried], strict=False)}
    nodes = []
    for port, given, axis in zip(list(body.input)[carried:], node.input[carried:], in_axes, strict=True):
        names[port.name] = prefix + port.name
        nodes.append(_moved(graph, "Squeeze", given, names[port.name], axis))
    for value in body.initializer:
        graph.initializer.add().CopyFrom(value)
        graph.initializer[-1].name = names[value.name]
    for inner in body.node:
        onnx.rename(inner, names)
        nodes.append(inner)
    ends = [names.get(port.name, port.name) for port in body.output]
    for end, name in zip(ends[:carried], node.output[:carried], strict=True):
        nodes += [onnx.helper.make_node("Identity", [end], [name])] if name else []
    for end, name, axis in zip(ends[carried:], node.output[carried:], out_axes, strict=True):
        nodes += [_moved(graph, "Unsqueeze", end, name, axis)] if name else []
    return nodes


def _moved(graph: Any, op: str, given: str, name: str, axis: int) -> Any:
    """A node that takes an axis of size 1 away or puts it in."""
    axes = f"{_PREFIX}axis_{axis}"
    if not any(value.name == axes for value in graph.initializer):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([axis], np.int64), axes))
    return onnx.helper.make_node(op, [given, axes], [name])
