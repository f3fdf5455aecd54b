"""Writes an ONNX graph node by node.

torch.onnx is not used: a stepped network needs its states as graph inputs and outputs, sequence lengths on every
recurrent node and peepholes in LSTM's `P`, and each layer class knows best how it is written.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8  # of opset 17's time: any onnxruntime of the last years reads it


class Graph:
    """A graph in the making; tensors are known by their names.

    Attributes:
        x: Name of the main input (B, T, F).
        lengths: Name of the input (B,) with the valid steps of each row.
    """

    def __init__(self, n_features: int) -> None:
        self.x, self.lengths = "x", "lengths"
        self._n_nodes = 0
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._memo: dict[str, str] = {}
        self._inputs = [
            helper.make_tensor_value_info(self.x, TensorProto.FLOAT, ["B", "T", n_features]),
            helper.make_tensor_value_info(self.lengths, TensorProto.INT32, ["B"]),
        ]
        self._outputs: list[onnx.ValueInfoProto] = []

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return the output's name. An empty input name leaves that input out."""
        return self.add_many(op, 1, *inputs, **attributes)[0]

    def add_many(self, op: str, n_outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with several outputs and return their names."""
        number = self._n_nodes
        self._n_nodes += 1
        names = [f"{op}_{number}" if i == 0 else f"{op}_{number}_{i}" for i in range(n_outputs)]
        self._nodes.append(helper.make_node(op, list(inputs), names, name=f"node_{number}", **attributes))
        return names

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Name of an initializer with this value; equal values share one."""
        array: NDArray[Any] = np.ascontiguousarray(np.asarray(value, dtype=dtype)).reshape(np.shape(value))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """Name of an int64 vector: axes, shapes, pads."""
        return self.constant(values, np.int64)

    def index(self, value: int) -> str:
        """Name of an int64 scalar."""
        return self.constant(value, np.int64)

    def state_input(self, name: str, shape: Sequence[int]) -> str:
        """Declare an input (B, *shape) that carries state in."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", *shape]))
        return name

    def zeros(self, name: str, shape: Sequence[int]) -> str:
        """Zeros (B, *shape), in place of the state `name` where nothing is carried."""
        rows = self.add("Shape", self.x, start=0, end=1)
        return self.add("Expand", self.constant(0.0), self.add("Concat", rows, self.ints(*shape), axis=0))

    def output(self, tensor: str, name: str, shape: Sequence[int | str]) -> None:
        """Declare `tensor` as the graph's output `name`."""
        self._nodes.append(helper.make_node("Identity", [tensor], [name], name=f"output_{name}"))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def scan(
        self,
        states: Sequence[str],
        inputs: Sequence[str],
        body: Callable[[list[str], list[str]], list[str]],
    ) -> tuple[list[str], str]:
        """Run `body` over axis 1 of `inputs`, carrying `states`.

        Args:
            states: (B, ...) each, before the first step.
            inputs: (B, T, ...) each.
            body: Adds the nodes of one step; takes names of the states and of the step's slices (B, ...), returns
                names of the new states, the first of which is also the step's output.

        Returns:
            The states after the last step, and the output (B, T, ...).
        """
        outer, self._nodes = self._nodes, []
        number = self._n_nodes
        inner_states = [f"scan_{number}_state_{i}" for i in range(len(states))]
        slices = [f"scan_{number}_slice_{i}" for i in range(len(inputs))]
        after = [self.add("Identity", name) for name in body(inner_states, slices)]
        step_output = self.add("Identity", after[0])
        graph = helper.make_graph(
            self._nodes,
            f"scan_{number}",
            [_untyped(name) for name in (*inner_states, *slices)],
            [_untyped(name) for name in (*after, step_output)],
        )
        self._nodes = outer
        axes = {"scan_input_axes": [1] * len(inputs), "scan_output_axes": [1]}
        names = self.add_many(
            "Scan", len(states) + 1, *states, *inputs, body=graph, num_scan_inputs=len(inputs), **axes
        )
        return names[:-1], names[-1]

    @contextmanager
    def lengths_are(self, lengths: str) -> Iterator[None]:
        """Within this context, rows have other lengths (int32)."""
        saved = self.lengths, self._memo
        self.lengths, self._memo = lengths, {}
        yield
        self.lengths, self._memo = saved

    def steps(self) -> str:
        """Numbers 0..T-1 of the steps, int64 (T,)."""
        if "steps" not in self._memo:
            n_steps = self.add("Squeeze", self.add("Shape", self.x, start=1, end=2), self.ints(0))
            self._memo["steps"] = self.add("Range", self.index(0), n_steps, self.index(1))
        return self._memo["steps"]

    def valid(self) -> str:
        """Which steps are no padding, bool (B, T)."""
        if "valid" not in self._memo:
            lengths = self.add("Unsqueeze", self.add("Cast", self.lengths, to=TensorProto.INT64), self.ints(1))
            self._memo["valid"] = self.add("Less", self.steps(), lengths)
        return self._memo["valid"]

    def moved(self) -> str:
        """Which rows have any step at all, bool (B, 1)."""
        if "moved" not in self._memo:
            zero = self.constant(0, np.int32)
            self._memo["moved"] = self.add("Unsqueeze", self.add("Greater", self.lengths, zero), self.ints(1))
        return self._memo["moved"]

    def keep(self, new: str, old: str) -> str:
        """`new` (B, H) for rows that have steps, `old` for rows of length 0."""
        return self.add("Where", self.moved(), new, old)

    def model(self, doc: str) -> onnx.ModelProto:
        """The finished, checked model."""
        graph = helper.make_graph(self._nodes, "stepcast", self._inputs, self._outputs, self._initializers)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, producer_name="stepcast", doc_string=doc)
        model.ir_version = IR_VERSION
        onnx.checker.check_model(model, full_check=True)
        return model


def _untyped(name: str) -> onnx.ValueInfoProto:
    """A float tensor of any shape."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
