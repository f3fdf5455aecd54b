"""Convolutions: over time, looking back only, and over the frames of a video."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import ACTIVATIONS, write_activation
from ..graph import Graph
from .base import Layer, LayerState
from .specs import Conv1DSpec, Conv2DSpec, Pool2DSpec
from .weights import initialise
from .window import latest, write_latest


class Conv1D(Layer):
    """Causal convolution over time. The inputs it needs from before are its state, oldest first; they begin as 0."""

    def __init__(self, name: str, spec: Conv1DSpec, size: int) -> None:
        super().__init__(name)
        self.activation, self.size = spec.activation, size
        self.reach = (spec.kernel - 1) * spec.dilation  # steps back
        self.convolution = nn.Conv1d(size, spec.units, spec.kernel, dilation=spec.dilation)
        initialise(self.convolution.weight, spec.weight_init, size * spec.kernel, spec.units * spec.kernel)
        nn.init.zeros_(_bias(self.convolution))

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"last": (self.reach, self.size)} if self.reach else {}

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        if self.reach:
            x = torch.cat([state["last"], x], dim=1)
            state = {"last": latest(x, lengths, self.reach)}
        y = self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return ACTIVATIONS[self.activation](y), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        after = {}
        if self.reach:
            x = graph.add("Concat", state["last"], x, axis=1)
            after["last"] = write_latest(graph, x, self.reach)
        y = graph.add("Transpose", x, perm=[0, 2, 1])
        weight, bias = (graph.constant(p.detach().cpu().numpy()) for p in self.convolution.parameters())
        y = graph.add("Conv", y, weight, bias, dilations=list(self.convolution.dilation))
        return write_activation(graph, self.activation, graph.add("Transpose", y, perm=[0, 2, 1])), after


class Frames(Layer):
    """What layers over frames (B, T, C, H, W) share: time is one more batch axis for them."""

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        y = self.over_frames(x.flatten(0, 1))
        return y.view(*x.shape[:2], *y.shape[1:]), state

    def over_frames(self, x: Tensor) -> Tensor:
        """(B * T, C, H, W) to the same of other sizes."""
        raise NotImplementedError

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        rows = graph.add("Shape", x, start=0, end=2)
        inner = graph.add("Shape", x, start=2)
        y = self.write_over_frames(graph, graph.add("Reshape", x, _joined(graph, graph.ints(-1), inner)))
        return graph.add("Reshape", y, _joined(graph, rows, graph.add("Shape", y, start=1))), {}

    def write_over_frames(self, graph: Graph, x: str) -> str:
        """`over_frames` in ONNX."""
        raise NotImplementedError


class Conv2D(Frames):
    """Convolution over each frame."""

    def __init__(self, name: str, spec: Conv2DSpec, channels: int) -> None:
        super().__init__(name)
        self.activation = spec.activation
        self.convolution = nn.Conv2d(channels, spec.units, spec.kernel, stride=spec.stride, padding=spec.padding)
        area = spec.kernel[0] * spec.kernel[1]
        initialise(self.convolution.weight, spec.weight_init, channels * area, spec.units * area)
        nn.init.zeros_(_bias(self.convolution))

    def over_frames(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.convolution(x))

    def write_over_frames(self, graph: Graph, x: str) -> str:
        weight, bias = (graph.constant(p.detach().cpu().numpy()) for p in self.convolution.parameters())
        height, width = (int(p) for p in self.convolution.padding)
        strides = list(self.convolution.stride)
        y = graph.add("Conv", x, weight, bias, strides=strides, pads=[height, width, height, width])
        return write_activation(graph, self.activation, y)


class Pool2D(Frames):
    """Maximum or mean over windows of each frame; padding is left out of means."""

    def __init__(self, name: str, spec: Pool2DSpec) -> None:
        super().__init__(name)
        self.spec = spec

    def over_frames(self, x: Tensor) -> Tensor:
        spec = self.spec
        if spec.pooling == "max":
            return F.max_pool2d(x, spec.kernel, spec.stride, spec.padding)
        return F.avg_pool2d(x, spec.kernel, spec.stride, spec.padding, count_include_pad=False)

    def write_over_frames(self, graph: Graph, x: str) -> str:
        spec = self.spec
        op = "MaxPool" if spec.pooling == "max" else "AveragePool"
        pads = [*spec.padding, *spec.padding]
        return graph.add(op, x, kernel_shape=list(spec.kernel), strides=list(spec.stride), pads=pads)


class ToFrames(Layer):
    """(B, T, C * H * W) to (B, T, C, H, W)."""

    def __init__(self, name: str, frame: tuple[int, int, int]) -> None:
        super().__init__(name)
        self.frame = frame

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        return x.view(*x.shape[:2], *self.frame), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        shape = _joined(graph, graph.add("Shape", x, start=0, end=2), graph.ints(*self.frame))
        return graph.add("Reshape", x, shape), {}


class ToValues(Layer):
    """(B, T, C, H, W) to (B, T, C * H * W)."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name)
        self.size = size

    def forward(self, x: Tensor, lengths: Tensor | None, state: LayerState) -> tuple[Tensor, LayerState]:
        return x.flatten(2), state

    def write(self, graph: Graph, x: str, state: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        shape = _joined(graph, graph.add("Shape", x, start=0, end=2), graph.ints(self.size))
        return graph.add("Reshape", x, shape), {}


def _bias(convolution: nn.Conv1d | nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias


def _joined(graph: Graph, *parts: str) -> str:
    return graph.add("Concat", *parts, axis=0)
