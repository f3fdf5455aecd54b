"""How the tensors of a graph lie: where the batch and time axes are, what one row of one step is."""

import math
from collections.abc import Mapping
from typing import Any

from stepcast.errors import ManifestError

from ..onnx_session import Port
from .roles import Roles, StatePorts


def layout_of(roles: Roles, known: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a manifest that say how tensors lie: input, output, states, features, outputs.

    `known` are fields of a manifest, which win over guesses.

    Raises:
        ManifestError: an axis can be read in more than one way.
    """
    states = [_state(state) for state in roles.states]
    batch = {ports.input.shape[state["batch_axis"]] for ports, state in zip(roles.states, states, strict=True)}
    entry = _axes("input", roles.input, batch, known)
    leave = _axes("output", roles.output, {*batch, roles.input.shape[entry["batch_axis"]]}, known)
    if leave["time_axis"] is not None and entry["time_axis"] is None:
        said = f"output {roles.output} has a time axis, input {roles.input} has none."
        raise ManifestError(f"{said} Give $.input and $.output.")
    return {
        "features": _names("features", "x", roles.input, entry, known),
        "outputs": _names("outputs", "y", roles.output, leave, known),
        "input": entry,
        "output": leave,
        "states": states,
    }


def _state(ports: StatePorts) -> dict[str, Any]:
    port, result, given = ports
    if "batch_axis" not in given and len(port.dynamic) != 1:
        many = f"{len(port.dynamic)} dynamic axes. Give $.states with batch_axis and shape."
        none = "no dynamic axis, so sessions cannot be batched. Export the graph with a dynamic batch axis."
        raise ManifestError(f"state input {port} has {many if port.dynamic else none}")
    axis = int(given["batch_axis"] if "batch_axis" in given else port.dynamic[0])
    shape = [size for at, size in enumerate(port.shape) if at != axis]
    made = {"layer": "state", "key": port.name, "input": port.name, "output": result.name, "dtype": port.dtype}
    return {**made, "shape": shape, "batch_axis": axis, **given}


def _axes(side: str, port: Port, batch: set[Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Where the batch and the time axis are."""
    given = known.get(side, {})
    made = {"name": port.name, **given}
    if "batch_axis" in given and "time_axis" in given:
        return made
    sized = [axis for axis in port.dynamic if port.shape[axis] in batch - {None}]
    found = [int(given["batch_axis"])] if "batch_axis" in given else sized
    if len(found) != 1:
        found = port.dynamic
    advice = f"Give $.{side}.batch_axis and time_axis."
    if len(found) != 1:
        raise ManifestError(f"which axis of {side} {port} is the batch? {advice}")
    times = [axis for axis in port.dynamic if axis != found[0]] if len(port.shape) == 3 else [None]
    if len(times) > 1:
        raise ManifestError(f"which axis of {side} {port} is time? {advice}")
    if not times:
        fixed = f"{side} {port} has one dynamic axis of three: time is fixed."
        step = f"Give $.{side}.time_axis of a graph that takes one step (axis of size 1)"
        raise ManifestError(f"{fixed} {step}, or export with a dynamic time axis.")
    return {"batch_axis": found[0], "time_axis": times[0], **made}


def _names(
    field: str, letter: str, port: Port, axes: Mapping[str, Any], known: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Features or outputs, named by number."""
    if field in known:
        return list(known[field])
    rest = [size for at, size in enumerate(port.shape) if at not in (axes["batch_axis"], axes["time_axis"])]
    sizes = [size for size in rest if isinstance(size, int)]
    if len(sizes) < len(rest):
        raise ManifestError(f"{port}: how many {field} there are is not fixed in the graph. Give $.{field}.")
    return [{"name": f"{letter}{number}"} for number in range(math.prod(sizes))]
