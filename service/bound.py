"""Single steps on the CPU: buffers that are bound to the graph once, so that a run is copies in, the model, copies out.

onnxruntime's `run` makes its outputs anew and copies them each time; with IO binding it reads and writes these buffers.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stepcast.manifest import Manifest

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_LEAST_ROWS: Final = 64
_MOST_BINDINGS: Final = 1024


class BoundSteps:
    """Runs of B rows by one step, B of any size.

    Args:
        session: The graph; batch first, time second, all states float32.
        constants: Further inputs, by name.
    """

    def __init__(self, session: Any, manifest: Manifest, constants: dict[str, npt.NDArray[Any]]) -> None:
        self._session, self._manifest, self._constants = session, manifest, constants
        self._cuts: list[slice] = []
        at = 0
        for state in manifest.states:
            self._cuts.append(slice(at, at := at + state.size))
        self._grow(_LEAST_ROWS)

    def step(self, x: Floats, before: Sequence[Bytes], after: Sequence[Bytes]) -> tuple[Floats, bool]:
        """Advance rows by one step.

        Args:
            x: (B, F).
            before: Packed states, together B rows, each uint8 (rows, state_row_bytes) with rows of contiguous bytes.
            after: Where the new states go, in the same cuts. Written also where they are not finite.

        Returns:
            Outputs (B, O), the caller's own, and whether outputs and states are finite.
        """
        rows = len(x)
        if rows > self._rows:
            self._grow(rows)
        self._x[:rows] = x
        pairs = [(old.view(np.float32), new.view(np.float32)) for old, new in zip(before, after, strict=True)]
        if len(pairs) == 1:
            old = pairs[0][0]
            for buffer, cut in zip(self._in, self._cuts, strict=True):
                buffer[:rows] = old[:, cut]
        else:
            at = 0
            for old, _ in pairs:
                end = at + len(old)
                for buffer, cut in zip(self._in, self._cuts, strict=True):
                    buffer[at:end] = old[:, cut]
                at = end
        self._session.run_with_iobinding(self._bindings.get(rows) or self._bind(rows))
        at = 0
        for _, new in pairs:
            end = at + len(new)
            for buffer, cut in zip(self._out, self._cuts, strict=True):
                new[:, cut] = buffer[at:end]
            at = end
        y = self._y[:rows].copy()
        return y, all_finite([y, *(buffer[:rows] for buffer in self._out)])

    def _grow(self, rows: int) -> None:
        """Make room for that many rows."""
        self._rows = rows = 1 << (rows - 1).bit_length()
        manifest = self._manifest
        self._x = np.zeros((rows, manifest.n_features), np.float32)
        self._y = np.zeros((rows, manifest.n_outputs), np.float32)
        self._lengths = np.ones(rows, np.int32)
        self._in = [np.zeros((rows, state.size), np.float32) for state in manifest.states]
        self._out = [np.zeros((rows, state.size), np.float32) for state in manifest.states]
        self._bindings: dict[int, Any] = {}

    def _bind(self, rows: int) -> Any:
        """The first `rows` rows of the buffers, as the graph's inputs and outputs."""
        manifest, binding = self._manifest, self._session.io_binding()

        def bind(to: Any, name: str, buffer: npt.NDArray[Any], *shape: int) -> None:
            to(name, "cpu", 0, buffer.dtype, (rows, *shape), buffer.ctypes.data)

        into, out_of = binding.bind_input, binding.bind_output
        bind(into, manifest.input.name, self._x, 1, manifest.n_features)
        if manifest.lengths is not None:
            bind(into, manifest.lengths, self._lengths)
        for state, before, after in zip(manifest.states, self._in, self._out, strict=True):
            bind(into, state.input, before, *state.shape)
            bind(out_of, state.output, after, *state.shape)
        bind(out_of, manifest.output.name, self._y, 1, manifest.n_outputs)
        for name, value in self._constants.items():
            binding.bind_cpu_input(name, value)
        if len(self._bindings) >= _MOST_BINDINGS:
            self._bindings.clear()
        self._bindings[rows] = binding
        return binding


def all_finite(arrays: Sequence[Floats]) -> bool:
    """Whether contiguous float32 arrays have only finite numbers."""
    squares = 0.0
    with np.errstate(over="ignore"):
        for array in arrays:
            flat = array.reshape(-1)
            squares += flat.dot(flat)  # overflows first, cheaply
    return math.isfinite(squares) or all(np.isfinite(array).all() for array in arrays)
