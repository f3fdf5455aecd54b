"""Take both graphs of DTLN (noise suppression) into the model repository as one: noisy samples in, clean ones out.

Blocks of 512 samples, 128 of them new: the first graph makes a mask for the block's magnitudes, the second one filters
the masked block, and blocks overlap and add up (https://github.com/breizhn/DTLN, real_time_processing_onnx.py). The
Fourier transforms between the graphs become products with matrices, in float64.
"""

import argparse
from pathlib import Path
from typing import Any, Final

import numpy as np

from stepcast.errors import ManifestError

from .. import onnx_door as onnx
from ..onnx_session import Port
from .graphs import Graph
from .onnx_command import say
from .onnx_graphs import import_graph

_SHIFT: Final = 128  # new samples of a step
_FIRST, _SECOND = "mask", "signal"


def options(parser: argparse.ArgumentParser) -> None:
    """Add where the second graph is."""
    text = "the second graph; default: FILE's name with 2 for 1"
    parser.add_argument("--second", type=Path, metavar="FILE", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Take the graphs in, and say how."""
    second = arguments.second or _beside(arguments.file)
    graph, known = joined_dtln(Graph.load(arguments.file), Graph.load(second))
    say(import_graph(graph, arguments.models, arguments.name, arguments.version, known))
    return 0


def _beside(first: Path) -> Path:
    stem, one, rest = first.stem.rpartition("1")
    if not one:
        raise ManifestError(f"{first}: its name has no 1, so the second graph's is not known. Give --second.")
    return first.with_name(f"{stem}2{rest}{first.suffix}")


def joined_dtln(first: Graph, second: Graph) -> tuple[Graph, dict[str, Any]]:
    """One graph of both, from a block (1, 512) to a block, and the fields of its manifest.

    Raises:
        ManifestError: the graphs are others.
    """
    (x1, h1, y1, n1), (x2, h2, y2, n2) = _ports(first), _ports(second)
    bins, size = x1.shape[-1], x2.shape[-1]
    opset = onnx.opset(first.model)
    if not isinstance(bins, int) or size != 2 * (bins - 1) or onnx.opset(second.model) != opset:
        found = f"{bins} magnitudes in opset {opset}, blocks of {size} in opset {onnx.opset(second.model)}"
        raise ManifestError(f"{first.file} and {second.file} are not the two graphs of DTLN: {found}")
    parts = [onnx.compose.add_prefix(graph.model, f"{name}/") for graph, name in ((first, _FIRST), (second, _SECOND))]
    mask, signal = f"{_FIRST}/{{}}".format, f"{_SECOND}/{{}}".format
    make, kinds = onnx.helper.make_node, onnx.TensorProto
    into = [
        make("Cast", ["block"], ["wide"], to=kinds.DOUBLE),
        make("MatMul", ["wide", "cos"], ["real"]),
        make("MatMul", ["wide", "sin"], ["imaginary"]),
        make("Mul", ["real", "real"], ["real_squared"]),
        make("Mul", ["imaginary", "imaginary"], ["imaginary_squared"]),
        make("Add", ["real_squared", "imaginary_squared"], ["power"]),
        make("Sqrt", ["power"], ["magnitude"]),
        make("Cast", ["magnitude"], ["narrow"], to=kinds.FLOAT),
        make("Reshape", ["narrow", "as_spectrum"], [mask(x1.name)]),
    ]
    between = [
        make("Reshape", [mask(y1.name), "as_bins"], ["gain"]),
        make("Cast", ["gain"], ["wide_gain"], to=kinds.DOUBLE),
        make("Mul", ["real", "wide_gain"], ["real_masked"]),
        make("Mul", ["imaginary", "wide_gain"], ["imaginary_masked"]),
        make("MatMul", ["real_masked", "cos_back"], ["from_real"]),
        make("MatMul", ["imaginary_masked", "sin_back"], ["from_imaginary"]),
        make("Add", ["from_real", "from_imaginary"], ["masked"]),
        make("Cast", ["masked"], ["narrow_masked"], to=kinds.FLOAT),
        make("Reshape", ["narrow_masked", "as_block"], [signal(x2.name)]),
    ]
    after = [make("Reshape", [signal(y2.name), "as_samples"], ["clean"])]
    weights = _transforms(bins, size)
    weights |= {"as_spectrum": np.array([-1, 1, bins]), "as_bins": np.array([-1, bins])}
    weights |= {"as_block": np.array([-1, 1, size]), "as_samples": np.array([-1, size])}
    a, b = (part.graph for part in parts)
    info = onnx.helper.make_tensor_value_info
    states_in = [p for p in (*a.input, *b.input) if p.name in (mask(h1.name), signal(h2.name))]
    states_out = [p for p in (*a.output, *b.output) if p.name in (mask(n1.name), signal(n2.name))]
    graph = onnx.helper.make_graph(
        [*into, *a.node, *between, *b.node, *after],
        "dtln",
        [info("block", kinds.FLOAT, [1, size]), *states_in],
        [info("clean", kinds.FLOAT, [1, size]), *states_out],
        [*a.initializer, *b.initializer, *(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    states = [
        {"layer": _FIRST, "key": "hc", "input": mask(h1.name), "output": mask(n1.name)},
        {"layer": _SECOND, "key": "hc", "input": signal(h2.name), "output": signal(n2.name)},
    ]
    fields = {
        "description": f"DTLN: {_SHIFT} noisy samples at 16000 Hz in, as many clean ones out, {size} samples behind.",
        "features": [{"name": "audio", "width": _SHIFT}],
        "input": {"name": "block", "context": size - _SHIFT},
        "output": {"name": "clean", "overlap": size - _SHIFT},
        "states": states,
    }
    return Graph(first.file, model, model.SerializeToString()), fields


def _ports(graph: Graph) -> tuple[Port, Port, Port, Port]:
    """Data and state that go in, data and state that come out: a block has three axes, a state four."""
    found = [[port for port in ports if len(port.shape) == rank] for ports in graph.ports for rank in (3, 4)]
    if any(len(ports) != 1 for ports in found) or sum(map(len, graph.ports)) != len(found):
        names = ", ".join(str(port) for ports in graph.ports for port in ports)
        raise ManifestError(f"{graph.file} is not a graph of DTLN, it has {names}. Import it as kind onnx.")
    (x,), (before,), (y,), (after,) = found
    return x, before, y, after


def _transforms(bins: int, size: int) -> dict[str, Any]:
    """Matrices of the real Fourier transform of blocks (B, size), and of its inverse, as numpy's rfft and irfft."""
    angle = 2 * np.pi * np.outer(np.arange(size), np.arange(bins)) / size  # (size, bins)
    weight = np.where(np.isin(np.arange(bins), (0, bins - 1)), 1, 2)[:, None] / size  # both halves, but for the ends
    return {
        "cos": np.cos(angle),
        "sin": -np.sin(angle),
        "cos_back": weight * np.cos(angle).T,
        "sin_back": -weight * np.sin(angle).T,
    }
