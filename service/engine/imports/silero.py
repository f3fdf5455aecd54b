"""Take Silero's voice activity detector (version 5 or later) into the model repository: raw frames in, speech out.

What its own wrapper does around the graph becomes part of it: the last samples of a frame stand before the next one,
and the sample rate is settled (https://github.com/snakers4/silero-vad, OnnxWrapper in utils_vad.py).
"""

import argparse
from typing import Any, Final

from stepcast.errors import ManifestError

from .graphs import Graph
from .onnx_command import say
from .onnx_graphs import import_graph

_FRAMES: Final = {16_000: (512, 64), 8_000: (256, 32)}  # by sample rate: new samples, and old ones before them


def options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--rate", type=int, default=16_000, choices=sorted(_FRAMES), help="samples a second")


def run(arguments: argparse.Namespace) -> int:
    """Take the graph in, and say how."""
    graph = Graph.load(arguments.file)
    known = silero_fields(graph, arguments.rate)
    say(import_graph(graph, arguments.models, arguments.name, arguments.version, known))
    return 0


def silero_fields(graph: Graph, rate: int) -> dict[str, Any]:
    """The fields of its manifest at a sample rate in Hz.

    Raises:
        ManifestError: the graph is another, or is not for this rate.
    """
    inputs, outputs = ({port.name for port in ports} for ports in graph.ports)
    if not ({"input", "state"} <= inputs <= {"input", "state", "sr"} and outputs == {"output", "stateN"}):
        found = f"it has inputs {sorted(inputs)} and outputs {sorted(outputs)}"
        raise ManifestError(f"{graph.file} is not Silero VAD of version 5 or later: {found}. Import it as kind onnx.")
    if "sr" not in inputs and rate != 16_000:
        raise ManifestError(f"{graph.file} takes no sample rate, it is for 16000 Hz alone. Leave --rate out.")
    frame, context = _FRAMES[rate]
    return {
        "description": f"Silero VAD: the probability of speech in each frame of {frame} samples at {rate} Hz.",
        "features": [{"name": "audio", "width": frame}],
        "outputs": [{"name": "speech"}],
        "input": {"name": "input", "batch_axis": 0, "time_axis": None, "context": context},
        "output": {"name": "output"},
        "states": [{"layer": "lstm", "key": "hc", "input": "state", "output": "stateN", "batch_axis": 1}],
        "constants": [{"name": "sr", "values": [rate]}] if "sr" in inputs else [],
    }
