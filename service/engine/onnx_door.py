"""onnx, loaded when a graph is first taken apart: importing the service does not load it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

RANDOM: Final = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial"})
"""Operators whose answers do not follow from what they are given."""


def __getattr__(name: str) -> Any:
    """What onnx has under this name."""
    import onnx

    return getattr(onnx, name)


def opset(model: Any) -> int:
    """The version of ONNX's own operators that a model is written for."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def inlined(model: Any) -> Any:
    """A model without functions of its own: each call is the function's nodes."""
    from onnx import inliner

    return inliner.inline_local_functions(model)


def replace(field: Any, values: Iterable[Any]) -> None:
    """Let a repeated field hold these values."""
    kept = list(values)
    del field[:]
    field.extend(kept)


def needed(nodes: Sequence[Any], names: Iterable[str]) -> set[str]:
    """These tensors, and all that they are computed from."""
    found = set(names)
    for node in reversed(nodes):  # each stands behind those whose outputs it reads
        if found.intersection(node.output):
            found.update(node.input)
    return found


def copy(model: Any) -> Any:
    """A model of its own."""
    made = type(model)()
    made.CopyFrom(model)
    return made


def subgraphs(node: Any) -> list[Any]:
    """The graphs inside a node."""
    return [graph for a in node.attribute for graph in ((a.g,) if a.HasField("g") else a.graphs)]


def captured(node: Any) -> set[str]:
    """Tensors from around a node that the graphs inside it read."""
    found: set[str] = set()
    for graph in subgraphs(node):
        made = {port.name for port in graph.input} | {i.name for i in graph.initializer}
        made |= {name for inner in graph.node for name in inner.output}
        read = {name for inner in graph.node for name in (*inner.input, *captured(inner))}
        found |= (read | {port.name for port in graph.output}) - made
    return found - {""}


def rename(node: Any, names: Mapping[str, str]) -> None:
    """Give tensors other names, in a node and in the graphs inside it."""
    for field in (node.input, node.output):
        replace(field, [names.get(name, name) for name in field])
    for graph in subgraphs(node):
        for inner in graph.node:
            rename(inner, names)
        for port in graph.output:
            port.name = names.get(port.name, port.name)


def prune(graph: Any) -> None:
    """Drop nodes and initializers that no output needs."""
    found = {port.name for port in graph.output}
    for node in reversed(graph.node):
        if found.intersection(node.output):
            found.update(node.input, captured(node))
    replace(graph.node, (node for node in graph.node if found.intersection(node.output)))
    replace(graph.initializer, (value for value in graph.initializer if value.name in found))
