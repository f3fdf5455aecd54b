"""Tensors of graphs that others made, however they lie: any rank, any type, one row a run, a hundred states."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper

from service.engine.model import Runtime
from stepcast.errors import ManifestError, NonFinite
from stepcast.manifest import MODEL_FILE, Manifest, sha256_of, write_manifest

pytestmark = pytest.mark.service
Array = np.ndarray[Any, Any]
node = helper.make_node


def described(folder: Path, n_features: int, n_outputs: int, **fields: Any) -> Runtime:
    """The runtime of a graph that lies in a folder, described by these fields."""
    known = {
        "name": "m",
        "version": 1,
        "task": "regression",
        "lengths": None,
        "features": [{"name": "x", "width": n_features}],
        "outputs": [{"name": f"y{n}"} for n in range(n_outputs)],
        "sha256": sha256_of(folder / MODEL_FILE),
    }
    write_manifest(folder, Manifest.model_validate({**known, **fields}))
    return Runtime(folder, device="cpu")


def state(name: str, shape: list[int], dtype: str = "float32", batch_axis: int | None = 0) -> dict[str, Any]:
    """A state tensor's entry in a manifest."""
    made = {"layer": "s", "key": name, "input": f"{name}_in", "output": f"{name}_out"}
    return {**made, "dtype": dtype, "shape": shape, "batch_axis": batch_axis}


def stepped(runtime: Runtime, x: Array, cut: int = 1) -> tuple[Array, Mapping[str, Array]]:
    """Outputs (T, N, O) and the last state of steps x (T, N, F), of sessions of `cut` rows each."""
    rows = x.shape[1]
    before = np.frombuffer(runtime.initial(rows), np.uint8).reshape(rows // cut, -1).copy()
    outputs = []
    for values in x:
        after = np.empty_like(before)
        outputs.append(runtime.step(values, [before], [after]))
        before = after
    return np.stack(outputs), runtime.unpack(before.tobytes(), rows)["s"]


def spectra(folder: Path) -> None:
    """y [1, 2, B, 3] and total [B, 2, 3] of x [1, B, 3, 2]: total += x transposed; y is the total, rows not first."""
    nodes = [
        node("Squeeze", ["x", "zero"], ["rows"]),
        node("Transpose", ["rows"], ["turned"], perm=[0, 2, 1]),
        node("Add", ["total_in", "turned"], ["total_out"]),
        node("Transpose", ["total_out"], ["moved"], perm=[1, 0, 2]),
        node("Unsqueeze", ["moved", "zero"], ["y"]),
    ]
    inputs = [("x", T.FLOAT, [1, "n", 3, 2]), ("total_in", T.FLOAT, ["n", 2, 3])]
    outputs = [("y", T.FLOAT, [1, 2, "n", 3]), ("total_out", T.FLOAT, ["n", 2, 3])]
    foreign.save(folder / MODEL_FILE, nodes, inputs, outputs, {"zero": np.array([0])})


SPECTRA: dict[str, Any] = {
    "input": {"name": "x", "batch_axis": 1, "time_axis": None, "shape": [1, 3, 2]},
    "output": {"name": "y", "batch_axis": 2, "time_axis": None, "shape": [1, 2, 3]},
    "states": [state("total", [2, 3])],
}


@pytest.mark.parametrize(("rows", "cut"), [(1, 1), (3, 1), (6, 2)])
def test_a_step_of_any_rank_is_its_numbers_in_c_order(tmp_path: Path, rows: int, cut: int) -> None:
    """Inputs [1, B, 3, 2] and outputs [1, 2, B, 3], by single steps and by a call of several."""
    spectra(tmp_path)
    runtime = described(tmp_path, 6, 6, **SPECTRA)
    x = np.arange(4 * rows * 6, dtype=np.float32).reshape(4, rows, 6)
    want = x.reshape(4, rows, 3, 2).transpose(0, 1, 3, 2).cumsum(axis=0)
    y, states = stepped(runtime, x, cut)
    np.testing.assert_array_equal(y, want.reshape(4, rows, 6))
    np.testing.assert_array_equal(states["total"], want[-1])
    blank = np.frombuffer(runtime.initial(rows), np.uint8).reshape(rows, -1)
    got, _ = runtime.run(x.transpose(1, 0, 2).copy(), None, blank)
    np.testing.assert_array_equal(got, want.reshape(4, rows, 6).transpose(1, 0, 2))
    one = runtime.step_one(x[0, 0].tobytes(), b"??" + runtime.initial(1), 2)
    assert one is not None
    np.testing.assert_array_equal(one[0], want[0, :1].reshape(1, 6))


def test_inputs_and_outputs_are_converted_at_the_port(tmp_path: Path) -> None:
    """int64 inputs, float64 outputs, states of int64 and float16: y = (count += x) / 2, half += 1."""
    nodes = [
        node("Add", ["count_in", "x"], ["count_out"]),
        node("Add", ["half_in", "step"], ["half_out"]),
        node("Cast", ["count_out"], ["wide"], to=T.DOUBLE),
        node("Div", ["wide", "two"], ["y"]),
    ]
    inputs = [("x", T.INT64, ["n", 2]), ("count_in", T.INT64, ["n", 2]), ("half_in", T.FLOAT16, ["n", 1])]
    outputs = [("y", T.DOUBLE, ["n", 2]), ("count_out", T.INT64, ["n", 2]), ("half_out", T.FLOAT16, ["n", 1])]
    weights = {"step": np.array([1], np.float16), "two": np.array([2.0])}
    foreign.save(tmp_path / MODEL_FILE, nodes, inputs, outputs, weights)
    runtime = described(
        tmp_path,
        2,
        2,
        input={"name": "x", "time_axis": None, "dtype": "int64"},
        output={"name": "y", "time_axis": None, "dtype": "float64"},
        states=[state("half", [1], "float16"), state("count", [2], "int64")],
    )
    x = np.array([[[1, 2], [3, 4], [5, 6]], [[10, 20], [30, 40], [-50, 60]]], np.float32)
    y, states = stepped(runtime, x)
    np.testing.assert_array_equal(y, [[[0.5, 1], [1.5, 2], [2.5, 3]], [[5.5, 11], [16.5, 22], [-22.5, 33]]])
    assert (y.dtype, states["count"].dtype, states["half"].dtype) == (np.float32, np.int64, np.float16)
    np.testing.assert_array_equal(states["count"], [[11, 22], [33, 44], [-45, 66]])
    np.testing.assert_array_equal(states["half"], [[2]] * 3)


def test_an_output_that_float32_does_not_hold_is_refused(tmp_path: Path) -> None:
    """1e300 in float64 is no float32."""
    nodes = [node("Cast", ["x"], ["wide"], to=T.DOUBLE), node("Mul", ["wide", "much"], ["y"])]
    foreign.save(
        tmp_path / MODEL_FILE,
        nodes,
        [("x", T.FLOAT, ["n", 1])],
        [("y", T.DOUBLE, ["n", 1])],
        {"much": np.array([1e300])},
    )
    ports = {"input": {"name": "x", "time_axis": None}, "output": {"name": "y", "time_axis": None, "dtype": "float64"}}
    runtime = described(tmp_path, 1, 1, **ports)
    with pytest.raises(NonFinite):
        runtime.step(np.ones((1, 1), np.float32), [np.empty((1, 0), np.uint8)], [np.empty((1, 0), np.uint8)])


@pytest.mark.parametrize("axis", [1, None], ids=["fixed to one", "not there"])
@pytest.mark.parametrize(("rows", "cut"), [(1, 1), (4, 1), (6, 3)])
def test_a_graph_of_one_row_runs_row_by_row(tmp_path: Path, axis: int | None, rows: int, cut: int) -> None:
    """total [2, 1, 2], or [2, 2] without a batch axis; y is its sum over the first axis; calls of several steps too."""
    batch = [] if axis is None else [1]
    shape = [2, *batch, 2]
    nodes = [node("Add", ["total_in", "x"], ["total_out"]), node("ReduceSum", ["total_out", "zero"], ["y"], keepdims=0)]
    inputs = [("x", T.FLOAT, [*batch, 2]), ("total_in", T.FLOAT, shape)]
    outputs = [("y", T.FLOAT, [*batch, 2]), ("total_out", T.FLOAT, shape)]
    foreign.save(tmp_path / MODEL_FILE, nodes, inputs, outputs, {"zero": np.array([0])})
    at = None if axis is None else 0
    runtime = described(
        tmp_path,
        2,
        2,
        rows="one",
        input={"name": "x", "batch_axis": at, "time_axis": None},
        output={"name": "y", "batch_axis": at, "time_axis": None},
        states=[state("total", [2, 2], batch_axis=axis)],
    )
    assert not runtime.quicken()
    x = np.arange(3 * rows * 2, dtype=np.float32).reshape(3, rows, 2)
    want = x.cumsum(axis=0)
    y, states = stepped(runtime, x, cut)
    np.testing.assert_array_equal(y, 2 * want)
    np.testing.assert_array_equal(states["total"], np.stack([want[-1]] * 2, axis=1))
    lengths = np.arange(rows, dtype=np.int32) % 4
    blank = np.frombuffer(runtime.initial(rows), np.uint8).reshape(rows, -1)
    got, end = runtime.run(x.transpose(1, 0, 2).copy(), lengths, blank)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(got[row, :length], 2 * want[:length, row])
        last = want[length - 1, row] if length else np.zeros(2)
        np.testing.assert_array_equal(runtime.unpack(end.tobytes(), rows)["s"]["total"][row], [last, last])


def test_a_graph_of_one_row_takes_whole_sequences(tmp_path: Path) -> None:
    """x [1, T, 2]: rows of different lengths, each by one run of its own."""
    nodes = [
        node("CumSum", ["x", "one"], ["sums"]),
        node("Add", ["sums", "total_in"], ["y"]),
        node("Gather", ["y", "last"], ["total_out"], axis=1),
    ]
    inputs = [("x", T.FLOAT, [1, "t", 2]), ("total_in", T.FLOAT, [1, 1, 2])]
    outputs = [("y", T.FLOAT, [1, "t", 2]), ("total_out", T.FLOAT, [1, 1, 2])]
    weights = {"one": np.array(1), "last": np.array([-1])}
    foreign.save(tmp_path / MODEL_FILE, nodes, inputs, outputs, weights)
    runtime = described(
        tmp_path, 2, 2, rows="one", input={"name": "x"}, output={"name": "y"}, states=[state("total", [1, 2])]
    )
    x = np.arange(4 * 5 * 2, dtype=np.float32).reshape(4, 5, 2)
    blank = np.frombuffer(runtime.initial(4), np.uint8).reshape(4, -1)
    y, end = runtime.run(x, np.array([5, 3, 3, 0], np.int32), blank)
    for row, length in enumerate((5, 3, 3, 0)):
        np.testing.assert_array_equal(y[row, :length], x[row, :length].cumsum(axis=0))
    np.testing.assert_array_equal(
        end.view(np.float32), [*(x[r, :n].sum(axis=0) for r, n in ((0, 5), (1, 3), (2, 3))), [0, 0]]
    )


def test_a_hundred_states_go_through_the_same_buffers(tmp_path: Path) -> None:
    """State k grows by k * x; y is their sum."""
    names = [f"s{k}" for k in range(100)]
    nodes = [node("Mul", ["x", f"k{k}"], [f"grown{k}"]) for k in range(100)]
    nodes += [node("Add", [f"{name}_in", f"grown{k}"], [f"{name}_out"]) for k, name in enumerate(names)]
    nodes += [node("Sum", [f"{name}_out" for name in names], ["y"])]
    inputs = [("x", T.FLOAT, ["n", 2]), *((f"{name}_in", T.FLOAT, ["n", 2]) for name in names)]
    outputs = [("y", T.FLOAT, ["n", 2]), *((f"{name}_out", T.FLOAT, ["n", 2]) for name in names)]
    foreign.save(tmp_path / MODEL_FILE, nodes, inputs, outputs, {f"k{k}": np.array(k, np.float32) for k in range(100)})
    runtime = described(
        tmp_path,
        2,
        2,
        input={"name": "x", "time_axis": None},
        output={"name": "y", "time_axis": None},
        states=[state(name, [2]) for name in names],
    )
    y, states = stepped(runtime, np.ones((3, 5, 2), np.float32))
    np.testing.assert_array_equal(y, np.full((3, 5, 2), 4950) * np.array([1, 2, 3])[:, None, None])
    np.testing.assert_array_equal(states["s99"], np.full((5, 2), 297))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": {"name": "x", "batch_axis": 1, "time_axis": None, "shape": [7]}}, "does not hold 6 numbers"),
        ({"input": {"name": "x", "batch_axis": None, "time_axis": None}}, "have no batch axis"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, fields: Any, words: str) -> None:
    """A shape of another size, and a missing batch axis of a graph that is said to take many rows."""
    spectra(tmp_path)
    with pytest.raises(ValueError, match=words):
        described(tmp_path, 6, 6, **{**SPECTRA, **fields})


def test_another_type_than_the_graph_s_is_named(tmp_path: Path) -> None:
    """The manifest says float16, the graph has float32."""
    spectra(tmp_path)
    wrong = {**SPECTRA, "input": {**SPECTRA["input"], "dtype": "float16"}}
    with pytest.raises(ManifestError, match=r"input 'x' is float32 in model\.onnx, float16 in manifest\.json"):
        described(tmp_path, 6, 6, **wrong)
