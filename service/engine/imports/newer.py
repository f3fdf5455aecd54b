"""Graphs of an operator set that is newer than onnxruntime's: written in the newest that it knows, where that can be.

Opset 27 brought LinearAttention and CausalConvWithState. onnxruntime runs them as operators of its own, which have the
same inputs, outputs and attributes (domain com.microsoft).
"""

from typing import Any, Final

from stepcast.errors import ManifestError

from .. import onnx_door as onnx
from .reading import Reading
from .rewrites import Rewritten

NEWEST: Final = 26  # that onnxruntime 1.31 is released for
_THEIRS: Final = frozenset({"CausalConvWithState", "LinearAttention"})
_DOMAIN: Final = "com.microsoft"


def older(reading: Reading) -> Rewritten | None:
    """Write a graph in opset 26 with onnxruntime's own operators; None where onnxruntime takes it as it is.

    Raises:
        ManifestError: it has an operator that opset 26 lacks.
    """
    given = onnx.opset(reading.graph.model)
    if not NEWEST < given <= onnx.defs.onnx_opset_version() or _runs(reading):
        return None
    if given > (known := onnx.defs.onnx_opset_version()):
        raise ManifestError(f"{reading.graph.file}: opset {given} is newer than {known}, the newest that onnx knows")
    model = onnx.ModelProto()
    model.CopyFrom(reading.graph.model)
    replaced = set()
    for node in model.graph.node:
        if node.op_type in _THEIRS and not node.domain:
            node.domain = _DOMAIN
            replaced.add(node.op_type)
        elif not node.domain and not _known(node):
            said = f"operator {node.op_type} of opset {given} is not in opset {NEWEST}, the newest of this onnxruntime"
            raise ManifestError(f"{reading.graph.file}: {said}. Export it with opset {NEWEST} or lower.")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = NEWEST
    if replaced and all(entry.domain != _DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    own = f", {' and '.join(sorted(replaced))} as onnxruntime's own" if replaced else ""
    return Rewritten(model, f"opset {given} was written as {NEWEST}{own}")


def _runs(reading: Reading) -> bool:
    try:
        return bool(reading.graph.ports)
    except ManifestError:
        return False


def _known(node: Any) -> bool:
    """Whether the newest opset that onnxruntime knows has this operator with these attributes."""
    try:
        schema = onnx.defs.get_schema(node.op_type, NEWEST, "")
    except onnx.defs.SchemaError:
        return False
    return {attribute.name for attribute in node.attribute} <= set(schema.attributes)
