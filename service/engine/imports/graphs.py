"""A graph that others made, as evidence: its inputs, its outputs, its nodes."""

from functools import cached_property
from pathlib import Path
from typing import Any, Self

from stepcast.errors import ManifestError

from .. import onnx_door as onnx
from ..onnx_session import Port, signature


class Graph:
    """A graph as it came, or as a rewrite left it.

    Attributes:
        file: Where it came from; errors name it.
        model: onnx's ModelProto. Do not change it: give `rewritten` another.
        content: The bytes of model.onnx, with all weights inside.
    """

    def __init__(self, file: Path, model: Any, content: bytes) -> None:
        self.file, self.model, self.content = file, model, content

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read a graph; weights that lie in files beside it are taken in.

        Raises:
            ManifestError: the file, or one that it names, cannot be read, or is no graph.
        """
        try:
            content = file.read_bytes()
            model = _parsed(file, content)
            alone = model.SerializeToString()
            onnx.load_external_data_for_model(model, str(file.parent))
            whole = model.SerializeToString()
        except OSError as error:
            raise ManifestError(f"{file}: cannot be read ({error.strerror or error})") from error
        except ManifestError:
            raise
        except Exception as error:  # protobuf's and onnx's exceptions have no common base but this
            raise ManifestError(f"{file}: onnx cannot load it: {' '.join(str(error).split())}") from error
        return cls(file, model, content if whole == alone else whole)

    def rewritten(self, model: Any) -> "Graph":
        """The graph that a rewrite made of this one."""
        return Graph(self.file, model, model.SerializeToString())

    @cached_property
    def ports(self) -> tuple[list[Port], list[Port]]:
        """Inputs and outputs; raises ManifestError where onnxruntime cannot load the graph."""
        return signature(self.content, str(self.file))


def _parsed(file: Path, content: bytes) -> Any:
    try:
        return onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's exceptions are not ours to name: onnx chooses its protobuf
        raise ManifestError(f"{file}: is no ONNX graph, or not all of one") from error
