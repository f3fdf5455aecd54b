"""States that stay on the device: the same numbers as without, whatever leaves the table or is refused.

The graph is proved on the CPU; where there is a GPU, the same tests run there.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto as T
from onnx import helper
from serving import MODELS, golden
from test_runtime import COUNTER

from service.engine.gpu_states import CannotReside, Slots, resident_model
from service.engine.imports.onnx_graphs import import_onnx
from service.engine.model import Runtime
from service.engine.repository import Repository
from stepcast.errors import NonFinite
from stepcast.manifest import GOLDEN_FILE, Manifest, read_manifest

Array = np.ndarray[Any, Any]
MANIFESTS = {path.name: read_manifest(path / "1") for path in sorted(MODELS.iterdir())}
KINDS = [name for name, manifest in MANIFESTS.items() if manifest.states and manifest.lengths]
GPU = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and Path("/dev/nvidiactl").exists()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where models run; without a CUDA device half of the tests skip."""
    if request.param == "cuda" and not GPU:
        pytest.skip("NOT PROVED ON A GPU: no CUDA device, or no onnxruntime-gpu")
    return str(request.param)


class Rows:
    """Rows that are stepped through the table and, beside it, without: both must say the same.

    Args:
        rows: Rows of table that there is room for.
        grain: As for Runtime.reside.
    """

    def __init__(
        self, device: str, count: int, *, kind: str = "lstm", rows: int = 16, grain: int | None = None
    ) -> None:
        self.runtime = Runtime(MODELS / kind / "1", device=device)
        self.plain = Runtime(MODELS / kind / "1", device=device)
        assert self.runtime.reside(rows * self.runtime.row_bytes, grain=grain)
        assert self.runtime.resident is not None
        self.resident = self.runtime.resident
        self.x = golden(kind)["x"]  # (6, 7, F)
        self.states: Array = np.frombuffer(self.runtime.initial(count), np.uint8).reshape(count, -1).copy()
        self.tags = np.zeros(count, np.int64)
        self.fetched: list[int] = []
        self.fetched_before = self.resident.uploaded
        self.random = np.random.default_rng(3)

    def inputs(self, rows: int, steps: int) -> Array:
        """(rows, steps, F) readings as the model may meet them."""
        pick = self.random.integers(0, len(self.x), rows)
        return np.ascontiguousarray(np.nan_to_num(self.x[pick, :steps], nan=1.0))

    def step(self, pick: list[int], x: Array | None = None, lengths: Array | None = None, steps: int = 1) -> Array:
        """Advance these rows; the outputs."""
        x = self.inputs(len(pick), steps) if x is None else x
        tags, before = self.tags[pick], self.states[pick]

        def states_of(missing: Array) -> Array:
            self.fetched += [pick[row] for row in missing]
            return before[missing]

        y, new = self.runtime.run_resident(x, lengths, tags, states_of)
        want_y, want = self.plain.run(x, lengths, before)
        each = np.full(len(pick), x.shape[1]) if lengths is None else lengths
        valid = np.arange(x.shape[1]) < each[:, None]
        np.testing.assert_allclose(y[valid], want_y[valid], 1e-4, 1e-5)
        np.testing.assert_allclose(new.view(np.float32), want.view(np.float32), 1e-4, 1e-5)
        np.testing.assert_array_equal(new[each == 0], before[each == 0])
        self.tags[pick], self.states[pick] = tags, new
        return y

    def uploads(self) -> list[int]:
        """Rows uploaded since the last time this was asked."""
        fetched, self.fetched = self.fetched, []
        assert self.resident.uploaded - self.fetched_before == len(fetched)
        self.fetched_before = self.resident.uploaded
        return fetched

    def table(self) -> Array:
        """The table (capacity + 1, row_bytes) uint8 as it is on the device."""
        return self.resident._table.numpy().view(np.uint8).reshape(-1, self.runtime.row_bytes)


@pytest.mark.service
@pytest.mark.parametrize("grain", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_resident_runs_equal_plain_ones(device: str, kind: str, grain: int | None) -> None:
    """Single steps and chunks of different lengths, 0 among them, in changing company; uploaded once each."""
    rows = Rows(device, 6, kind=kind, grain=grain)
    rows.step([0, 1, 2])
    rows.step([2, 4])
    rows.step([5, 3, 1, 0, 2], steps=4, lengths=np.array([4, 0, 2, 1, 3], np.int32))
    rows.step([4, 5], lengths=np.array([0, 1], np.int32))
    rows.step([1, 2, 3], steps=7)
    for _ in range(3):
        rows.step([0, 1, 2, 3, 4, 5])
    assert sorted(rows.uploads()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.service
@pytest.mark.parametrize("grain", [None, 2])
def test_the_table_is_changed_in_place_and_nowhere_else(device: str, grain: int | None) -> None:
    """Same address in and out; a run's slots hold its new states, all others what they held."""
    rows = Rows(device, 16, rows=16, grain=grain)
    rows.step(list(range(16)))
    address = rows.resident._table.data_ptr()
    for pick in ([3], [4, 9, 0], [15, 1, 2, 7, 8], list(range(16))):
        before = rows.table()
        rows.step(pick)
        after = rows.table()
        slots = rows.tags[pick] & 0xFFFFFF
        np.testing.assert_array_equal(after[slots], rows.states[pick])
        others = np.setdiff1d(np.arange(17), slots)
        np.testing.assert_array_equal(after[others], before[others])
        assert after[16].tobytes() == rows.runtime.initial(1), "padding steps the scratch row by nothing"
    assert rows.resident._table.data_ptr() == address
    for buffers in rows.resident._buffers.values():
        outputs = dict(zip(("table", "y", "new", "sound"), buffers._binding.get_outputs(), strict=True))
        assert outputs["table"].data_ptr() == address


@pytest.mark.service
def test_rows_that_gave_way_are_uploaded_again(device: str) -> None:
    """Room for four: the one unused for longest goes."""
    rows = Rows(device, 6, rows=4)
    rows.step([0, 1, 2, 3])
    rows.step([0])
    rows.step([2, 3])
    assert rows.uploads() == [0, 1, 2, 3]
    rows.step([4])
    assert rows.uploads() == [4]
    rows.step([0, 2, 3, 4])
    assert rows.uploads() == []
    rows.step([5, 1])
    assert rows.uploads() == [5, 1]
    rows.step([0, 1, 4, 5])
    assert len(rows.uploads()) == 2
    for _ in range(10):
        rows.step(rows.random.permutation(6)[:3].tolist())


@pytest.mark.service
def test_more_rows_than_the_table_has_run_without_it(device: str) -> None:
    """Right all the same, and nothing is said to be resident."""
    rows = Rows(device, 6, rows=4)
    tags = rows.tags.copy()
    x = rows.inputs(6, 1)
    y, new = rows.runtime.run_resident(x, None, tags, lambda missing: rows.states[missing])
    want = rows.plain.run(x, None, rows.states)
    np.testing.assert_allclose(y, want[0], 1e-4, 1e-5)
    np.testing.assert_allclose(new.view(np.float32), want[1].view(np.float32), 1e-4, 1e-5)
    assert tags.tolist() == [0] * 6


@pytest.mark.service
def test_a_batch_that_is_not_finite_leaves_every_row_as_it_was(device: str) -> None:
    """Law 3: tags stay, the others step right and so does the guilty one, from states that are uploaded again."""
    rows = Rows(device, 3, kind="conv1d")  # its state holds the last readings
    rows.step([0, 1, 2])
    rows.step([0, 1, 2], steps=3)
    rows.uploads()
    tags, states = rows.tags.copy(), rows.states.copy()
    x = rows.inputs(3, 1)
    bad = x.copy()
    bad[1] = np.inf
    with pytest.raises(NonFinite):
        rows.runtime.run_resident(bad, None, rows.tags, lambda missing: rows.states[missing])
    np.testing.assert_array_equal(rows.tags, tags)
    np.testing.assert_array_equal(rows.states, states)
    with pytest.raises(NonFinite):
        rows.runtime.run_resident(bad[1:2], None, rows.tags[1:2], lambda missing: rows.states[1:2][missing])
    rows.fetched_before = rows.resident.uploaded
    for row in range(3):
        rows.step([row], x[row : row + 1])
    assert rows.uploads() == [0, 1, 2]
    rows.step([0, 1, 2])
    assert rows.uploads() == []


@pytest.mark.service
def test_a_step_that_was_not_committed_is_computed_again_from_the_state_before(device: str) -> None:
    """The caller forgets the refused result's tag; the state before is no longer in the table and is uploaded."""
    rows = Rows(device, 2)
    rows.step([0, 1])
    rows.uploads()
    tags, states = rows.tags.copy(), rows.states.copy()
    rows.step([0, 1])
    rows.tags[0], rows.states[0] = tags[0], states[0]
    rows.step([0, 1])
    assert rows.uploads() == [0]


@pytest.mark.service
def test_copies_of_one_state_in_one_batch_do_not_share_a_slot(device: str) -> None:
    """A fork carries its parent's tag: one of the two is uploaded, both go their own way."""
    rows = Rows(device, 3)
    rows.step([0, 1])
    rows.tags[2], rows.states[2] = rows.tags[0], rows.states[0]
    rows.uploads()
    rows.step([0, 1, 2])
    assert len(rows.uploads()) == 1
    assert len(set(rows.tags.tolist())) == 3
    rows.step([2, 1, 0])
    assert rows.uploads() == []


@pytest.mark.service
def test_sessions_of_several_rows_step_in_the_table(device: str) -> None:
    """`step` with a tag per row: sessions of one, of three and of two rows, strided; uploaded once."""
    rows = Rows(device, 9, rows=16)
    size, cuts = rows.runtime.row_bytes, [(1, 1), (2, 3), (1, 2)]
    matrices = [np.zeros((sessions, 8 + n * size), np.uint8) for sessions, n in cuts]
    parts = [matrix[:, 4 : 4 + n * size] for matrix, (_, n) in zip(matrices, cuts, strict=True)]
    for part in parts:
        part[:] = np.frombuffer(rows.runtime.initial(part.size // size), np.uint8).reshape(part.shape)
    for _ in range(3):
        x = rows.inputs(9, 1)[:, 0]
        y = rows.runtime.step(x, parts, parts, rows.tags)
        want, rows.states = rows.plain.run(x[:, None], None, rows.states)
        np.testing.assert_allclose(y, want[:, 0], 1e-4, 1e-5)
        got = np.frombuffer(b"".join(part.tobytes() for part in parts), np.float32)
        np.testing.assert_allclose(got, rows.states.reshape(-1).view(np.float32), 1e-4, 1e-5)
        assert len(set(rows.tags.tolist())) == 9
    assert rows.resident.uploaded == rows.fetched_before + 9


@pytest.mark.service
def test_tags_of_another_table_are_never_found() -> None:
    """A session that moves to another version takes its old tag along."""
    first, second = Rows("cpu", 4, rows=64), Rows("cpu", 4, rows=5)
    for _ in range(3):
        first.step([0, 1, 2, 3])
        second.step([0, 1, 2, 3])
        second.uploads()
        second.tags[:] = first.tags
        second.step([0, 1, 2, 3])
        assert sorted(second.uploads()) == [0, 1, 2, 3]


@pytest.mark.service
def test_batches_come_in_few_shapes() -> None:
    """Powers of two."""
    rows = Rows("cpu", 16)
    for count in range(1, 17):
        rows.step(list(range(count)))
    assert sorted(rows.resident._buffers) == [1, 2, 4, 8, 16]


@pytest.mark.service
def test_new_states_are_those_of_the_run() -> None:
    """They are valid until the next run; outputs are the caller's own."""
    rows = Rows("cpu", 1)
    x = rows.inputs(1, 1)
    y, _ = rows.runtime.run_resident(x, None, rows.tags, lambda missing: rows.states[missing])
    kept = y.copy()
    rows.runtime.run_resident(x + 1, None, rows.tags, lambda missing: rows.states[missing])
    np.testing.assert_array_equal(y, kept)


@pytest.mark.service
@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_the_slots_that_give_way_are_those_unused_for_longest(capacity: int) -> None:
    """Random batches of three times as many rows as slots, some of them refused; what is there is found."""
    random, slots = np.random.default_rng(capacity), Slots(capacity)
    tags, used, holds = np.zeros(3 * capacity, np.int64), np.zeros(capacity, int), np.full(capacity, -1)
    for claim in range(1, 400):
        pick = random.permutation(3 * capacity)[: random.integers(1, capacity + 1)]
        got, missing = slots.claim(tags[pick])
        assert len(set(got.tolist())) == len(pick)
        assert missing.tolist() == [i for i, row in enumerate(pick) if row not in holds]
        found = np.setdiff1d(np.arange(len(pick)), missing)
        np.testing.assert_array_equal(holds[got[found]], pick[found])
        rest = np.setdiff1d(np.arange(capacity), got)
        if len(missing) and len(rest):
            assert used[got[missing]].max() <= used[rest].min()
        used[got], holds[got] = claim, -1
        if random.random() < 0.9:
            tags[pick], holds[got] = slots.keep(got), pick


def refused(caplog: pytest.LogCaptureFixture, runtime: Runtime, budget_bytes: int = 2**20) -> str:
    """What the log says about a model whose states do not stay."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "stepcast.runtime"):
        assert not runtime.reside(budget_bytes)
    assert runtime.resident is None
    return caplog.text


def plain_run(runtime: Runtime) -> None:
    """Tags are taken and do nothing."""
    x = np.ones((2, 1, runtime.manifest.n_features), np.float32)
    states = np.frombuffer(runtime.initial(2), np.uint8).reshape(2, -1)
    tags = np.array([0, 7])
    y, new = runtime.run_resident(x, None, tags, lambda missing: states[missing])
    want_y, want = runtime.run(x, None, states)
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(new, want)
    assert tags.tolist() == [0, 0]


def test_a_model_that_cannot_be_wrapped_runs_plainly_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Foreign axes, no state, no room, a wrong golden file."""
    partial = tmp_path / "partial.json"
    partial.write_text(json.dumps(COUNTER))
    directory = import_onnx(foreign.counter(tmp_path / "c.onnx"), tmp_path / "models", "counter", 1, partial).directory
    counter = Runtime(directory, device="cpu")
    assert "it takes no lengths" in refused(caplog, counter)
    plain_run(counter)
    assert "it has no state" in refused(caplog, Runtime(MODELS / "bidirectional" / "1", device="cpu"))
    lstm = Path(shutil.copytree(MODELS / "lstm" / "1", tmp_path / "lstm" / "1"))
    runtime = Runtime(lstm, device="cpu")
    assert "resident_bytes is 31, one row's state takes 32" in refused(caplog, runtime, 31)
    arrays = golden("lstm")
    arrays["state_out.lstm_0.h"] = arrays["state_out.lstm_0.h"] + 0.01
    np.savez(lstm / GOLDEN_FILE, **arrays)
    assert "differ from golden.npz" in refused(caplog, runtime)
    plain_run(runtime)


def test_a_graph_whose_order_would_not_be_certain_is_not_wrapped(tmp_path: Path) -> None:
    """A new state that is made of the input alone could be scattered before the old one is gathered."""

    def graph(last: list[Any], batch: Any = "B") -> tuple[Path, Manifest]:
        nodes = [
            *last,
            helper.make_node("Unsqueeze", ["s_in", "one"], ["s_step"]),
            helper.make_node("Add", ["x", "s_step"], ["y"]),
        ]
        inputs = [("x", T.FLOAT, [batch, "T", 1]), ("lengths", T.INT32, ["B"]), ("s_in", T.FLOAT, ["B", 1])]
        outputs = [("y", T.FLOAT, ["B", "T", 1]), ("s_out", T.FLOAT, ["B", 1])]
        path = foreign.save(tmp_path / "g.onnx", nodes, inputs, outputs, {"one": np.array([1])})
        manifest = Manifest.model_validate(
            {
                "name": "g",
                "version": 1,
                "features": [{"name": "x"}],
                "outputs": [{"name": "y"}],
                "task": "regression",
                "states": [{"layer": "s", "key": "s", "input": "s_in", "output": "s_out", "shape": [1]}],
                "sha256": "0" * 64,
            }
        )
        return path, manifest

    alone = [helper.make_node("ReduceSum", ["x", "one"], ["s_out"], keepdims=0)]
    both = [
        helper.make_node("ReduceSum", ["x", "one"], ["total"], keepdims=0),
        helper.make_node("Add", ["total", "s_in"], ["s_out"]),
    ]
    with pytest.raises(CannotReside, match="do not depend"):
        resident_model(*graph(alone), 1)
    with pytest.raises(CannotReside, match="fixed batch size"):
        resident_model(*graph(both, batch=1), 1)
    assert resident_model(*graph(both), 1)


@pytest.mark.service
def test_on_the_cpu_nothing_resides_by_itself() -> None:
    """The setting is for CUDA."""
    repository = Repository(MODELS, device="cpu", threads=1, resident_bytes=2**20)
    assert all(served.runtime.resident is None for served in repository.scan())


@pytest.mark.gpu
def test_on_a_gpu_every_wrapped_model_resides() -> None:
    """The server's own way to it."""
    if not GPU:
        pytest.skip("NOT PROVED ON A GPU: no CUDA device, or no onnxruntime-gpu")
    repository = Repository(MODELS, device="cuda", threads=1, resident_bytes=2**20)
    served = repository.scan()
    assert repository.failures == {}
    assert {s.name for s in served if s.runtime.resident is not None} == set(KINDS)
