"""onnx, loaded when a graph is first taken apart: importing the service does not load it."""

from typing import Any


def __getattr__(name: str) -> Any:
    """What onnx has under this name."""
    import onnx

    return getattr(onnx, name)
