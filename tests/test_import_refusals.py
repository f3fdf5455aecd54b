"""import: what cannot be taken in ends in one clear line, quickly, and the repository is as it was."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from serving import ROOT

from service.engine.onnx_session import open_session, run_within
from stepcast.__main__ import main
from stepcast.errors import ManifestError

pytestmark = pytest.mark.service

X, H = ("x", T.FLOAT, ["n", 3]), ("h", T.FLOAT, ["n", 3])
Y, H_NEXT = ("y", T.FLOAT, ["n", 3]), ("h_next", T.FLOAT, ["n", 3])
CELL = [helper.make_node("Add", ["x", "h"], ["h_next"]), helper.make_node("Tanh", ["h_next"], ["y"])]


def graph(
    path: Path,
    nodes: list[Any] = CELL,
    inputs: tuple[Any, ...] = (X, H),
    outputs: tuple[Any, ...] = (Y, H_NEXT),
    weights: tuple[Any, ...] = (),
    opset: tuple[tuple[str, int], ...] = (("", 17),),
) -> Path:
    """A graph, unchecked."""
    info = [
        [p if isinstance(p, onnx.ValueInfoProto) else helper.make_tensor_value_info(*p) for p in side]
        for side in (inputs, outputs)
    ]
    made = helper.make_graph(nodes, "graph", *info, list(weights))
    model = helper.make_model(made, opset_imports=[helper.make_opsetid(*o) for o in opset], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def written(content: bytes) -> Callable[[Path], Path]:
    """A file with this content."""

    def write(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return write


def elsewhere(location: str) -> Callable[[Path], Path]:
    """A graph whose weight lies in another file."""

    def write(path: Path) -> Path:
        weight = T(name="w", data_type=T.FLOAT, dims=[3], data_location=T.EXTERNAL)
        entry = weight.external_data.add()
        entry.key, entry.value = "location", location
        (path.parent.parent / "secret.bin").write_bytes(bytes(12))
        nodes = [helper.make_node("Add", ["x", "w"], ["xw"]), helper.make_node("Add", ["xw", "h"], ["h_next"]), CELL[1]]
        return graph(path, nodes, weights=(weight,))

    return write


def truncated(path: Path) -> Path:
    """The first two thirds of a good graph."""
    content = foreign.torch_lstm(path).read_bytes()
    path.write_bytes(content[: 2 * len(content) // 3])
    return path


def zipped(path: Path) -> Path:
    """A zip of something."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no model")
    return path


def fifo(path: Path) -> Path:
    """A pipe: whoever reads it waits forever."""
    os.mkfifo(path)
    return path


def folder(path: Path) -> Path:
    """A directory."""
    path.mkdir()
    return path


def loop(path: Path) -> Path:
    """A symbolic link to itself."""
    path.symlink_to(path)
    return path


def nested(path: Path) -> Path:
    """A graph inside a graph, twenty deep, whose condition nobody gives."""
    out = [helper.make_tensor_value_info("z", T.FLOAT, None)]
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "body", [], out)
    for _ in range(20):
        body = helper.make_graph([helper.make_node("If", ["yes"], ["z"], then_branch=body)], "body", [], out)
    return graph(path, [helper.make_node("If", ["yes"], ["y"], then_branch=body), CELL[0]])


def summed(path: Path, features: int) -> Path:
    """A running sum of all features."""
    nodes = [
        helper.make_node("ReduceSum", ["x", "one"], ["s"], keepdims=1),
        helper.make_node("Add", ["s", "h"], ["h_next"]),
    ]
    weights = (numpy_helper.from_array(np.array([1]), "one"),)
    return graph(path, [*nodes, CELL[1]], (("x", T.FLOAT, ["n", features]), H), weights=weights)


def huge_constant(path: Path) -> Path:
    """A few bytes that become 400 terabytes when the graph is run, or made simpler."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("Add", ["x", "zero"], ["x0"]),
        helper.make_node("Add", ["x0", "h"], ["h_next"]),
    ]
    return graph(path, [*nodes, CELL[1]], weights=(numpy_helper.from_array(np.array([10**7, 10**7]), "shape"),))


def sequence_input() -> Any:
    """An input that is a sequence of tensors."""
    return helper.make_tensor_sequence_value_info("s", T.FLOAT, None)


def node(operator: str, inputs: list[str], outputs: list[str], **more: Any) -> Any:
    """A node."""
    return helper.make_node(operator, inputs, outputs, **more)


HUGE = T(name="w", data_type=T.FLOAT, dims=[10**6, 10**6, 10**6], raw_data=bytes(12))

FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda path: path, "no such file"),
    "empty": (written(b""), "is empty"),
    "text": (written(b"import onnx\nprint('no graph')\n" * 9), "is no ONNX graph"),
    "picture": (written(b"\x89PNG\r\n\x1a\n" + bytes(99)), "is no ONNX graph"),
    "random": (written(np.random.default_rng(1).bytes(4096)), "is no ONNX graph"),
    "zip": (zipped, "no kind"),
    "truncated": (truncated, "is no ONNX graph"),
    "directory": (folder, "is a directory"),
    "pipe": (fifo, "is not a regular file"),
    "link to itself": (loop, "no such file"),
    "weights missing": (elsewhere("weights.bin"), "weights.bin"),
    "weights above": (elsewhere("../secret.bin"), "secret.bin"),
    "weights at root": (elsewhere("/etc/hostname"), "/etc/hostname"),
    "huge weight": (
        lambda p: graph(p, [*CELL, node("Add", ["w", "x"], ["z"])], weights=(HUGE,)),
        "onnxruntime cannot load it",
    ),
    "huge constant": (huge_constant, "allocate"),
    "huge input": (lambda p: summed(p, 2**40), "1099511627776"),
    "cycle": (
        lambda p: graph(p, [node("Add", ["x", "y"], ["h_next"]), node("Tanh", ["h_next"], ["y"])]),
        "onnxruntime cannot load it",
    ),
    "unknown operator": (lambda p: graph(p, [node("Wibble", ["x", "h"], ["h_next"]), CELL[1]]), "Wibble"),
    "unknown domain": (
        lambda p: graph(
            p,
            [node("Add", ["x", "h"], ["h_next"], domain="org.example"), CELL[1]],
            opset=(("", 17), ("org.example", 1)),
        ),
        "org.example",
    ),
    "opset of the future": (lambda p: graph(p, opset=(("", 999),)), "999"),
    "no outputs": (lambda p: graph(p, outputs=()), "outputs"),
    "no inputs": (
        lambda p: graph(p, [node("Constant", [], ["y"], value_float=1.0)], (), (("y", T.FLOAT, []),)),
        "inputs",
    ),
    "no nodes": (lambda p: graph(p, []), "x"),
    "sequence": (
        lambda p: graph(
            p,
            [node("SequenceAt", ["s", "at"], ["y"])],
            (sequence_input(),),
            (("y", T.FLOAT, ["n", 3]),),
            (numpy_helper.from_array(np.array(0), "at"),),
        ),
        "seq(tensor(float))",
    ),
    "text as input": (lambda p: graph(p, inputs=(X, H, ("words", T.STRING, ["n"]))), "tensor(string)"),
    "text as output": (
        lambda p: graph(p, [node("Cast", ["x"], ["y"], to=T.STRING)], (X,), (("y", T.STRING, ["n", 3]),)),
        "tensor(string)",
    ),
    "complex": (lambda p: graph(p, inputs=(X, H, ("z", T.COMPLEX64, ["n"]))), "complex64"),
    "not finite": (
        lambda p: graph(p, [CELL[0], node("Sub", ["h", "h"], ["zero"]), node("Div", ["zero", "zero"], ["y"])]),
        "finite",
    ),
    "next state not given": (lambda p: graph(p, outputs=(Y,)), "'h' float32 [n, 3]"),
    "state that grows": (
        lambda p: graph(
            p,
            [node("Concat", ["h", "x"], ["h_next"], axis=1), node("Tanh", ["x"], ["y"])],
            (X, ("h", T.FLOAT, ["n", "past"])),
            (Y, ("h_next", T.FLOAT, ["n", "now"])),
        ),
        "h",
    ),
    "no row": (lambda p: graph(p, inputs=(("x", T.FLOAT, [0, 3]), ("h", T.FLOAT, [0, 3]))), "x"),
    "no numbers in a row": (lambda p: summed(p, 0), "x"),
    "nested": (nested, "onnxruntime cannot load it"),
    "one name twice": (lambda p: graph(p, [*CELL, node("Add", ["x", "x"], ["y"])]), "onnxruntime cannot load it"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_taken_in_ends_in_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It says what is wrong, within seconds; no traceback, no line of onnxruntime's own, nothing in the repository."""
    build, words = FILES[name]
    (tmp_path / "in").mkdir()
    file, models = build(tmp_path / "in" / "g.onnx"), tmp_path / "models"
    began = time.monotonic()
    assert main(["import", str(file), "--name", "m", "--models", str(models)]) == 1
    took_s = time.monotonic() - began
    printed = capfd.readouterr()
    print(printed.err)
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("stepcast: ")
    assert words in lines[0]
    assert printed.out == ""
    assert not models.exists()
    assert took_s < 5


def turning(path: Path, turns: int) -> Path:
    """A running sum with a loop of additions inside, which takes its time."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["going_on"]),
            helper.make_node("Add", ["before", "tiny"], ["after"]),
        ],
        "body",
        [value("turn", T.INT64, []), value("go_on", T.BOOL, []), value("before", T.FLOAT, ["n", 3])],
        [value("going_on", T.BOOL, []), value("after", T.FLOAT, ["n", 3])],
    )
    nodes = [
        helper.make_node("Add", ["x", "h"], ["h_next"]),
        helper.make_node("Loop", ["turns", "", "h_next"], ["y"], body=body),
    ]
    arrays = {"turns": np.array(turns), "tiny": np.float32(1e-9)}
    return graph(path, nodes, weights=tuple(numpy_helper.from_array(value, name) for name, value in arrays.items()))


def test_a_graph_without_end_is_stopped(tmp_path: Path) -> None:
    """Nodes inside a loop are stopped too; the limit is a few seconds, here less."""
    session = open_session(turning(tmp_path / "g.onnx", 2**62).read_bytes(), "cpu")
    zeros = np.zeros((1, 3), np.float32)
    with pytest.raises(ManifestError, match=r"did not end within 0\.2 s"):
        run_within(session, ["y"], {"x": zeros, "h": zeros}, limit_s=0.2)


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_import_that_is_stopped_in_its_proof_leaves_nothing(
    tmp_path: Path, stop: signal.Signals, status: int
) -> None:
    """Ctrl-C and a crash: the repository has not even the model's folder."""
    file, models, scratch = turning(tmp_path / "slow.onnx", 40_000), tmp_path / "models", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "stepcast", "import", str(file), "--models", str(models)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as run:
        try:
            while not list(scratch.glob("*/*/manifest.json")):
                assert run.poll() is None
                time.sleep(0.02)
            run.send_signal(stop)
            _, said = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == status
    assert said == ""
    assert not models.exists()
    assert stop == signal.SIGKILL or not list(scratch.glob("stepcast-*"))
