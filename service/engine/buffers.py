"""Single steps on the CPU: buffers that are bound to the graph once, so that a run is copies in, the model, copies out.

onnxruntime's `run` makes its outputs anew and copies them each time; with IO binding it reads and writes these buffers.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from stepcast.manifest import Manifest

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_LEAST_ROWS: Final = 64
_MOST_ROOMS: Final = 1024


class Room(NamedTuple):
    """The buffers for B rows, and the graph bound to them."""

    binding: Any
    x: Floats
    states_in: list[Floats]
    states_out: list[Floats]
    y: Floats
    made: Floats
    """All that the graph writes, flat: the new states, tensor by tensor, then the outputs."""


class BoundSteps:
    """Runs of B rows by one step, B of any size.

    Args:
        session: The graph; batch first, time second, all states float32. It may do without `lengths`.
        constants: Further inputs, by name.
    """

    def __init__(self, session: Any, manifest: Manifest, constants: dict[str, npt.NDArray[Any]]) -> None:
        self._session, self._manifest, self._constants = session, manifest, constants
        ports = {port.name for port in session.get_inputs()}
        self._lengths_port = manifest.lengths if manifest.lengths in ports else None
        self._cuts: list[slice] = []
        self._size = 0
        for state in manifest.states:
            self._cuts.append(slice(self._size, self._size + state.size))
            self._size += state.size
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
        room = self._rooms.get(rows) or self._bind(rows)
        room.x[:] = x
        at = 0
        for part in before:
            old, end = part.view(np.float32), at + len(part)
            for buffer, cut in zip(room.states_in, self._cuts, strict=True):
                buffer[at:end] = old[:, cut]
            at = end
        self._session.run_with_iobinding(room.binding)
        at = 0
        for part in after:
            new, end = part.view(np.float32), at + len(part)
            for buffer, cut in zip(room.states_out, self._cuts, strict=True):
                new[:, cut] = buffer[at:end]
            at = end
        return room.y.copy(), is_finite(room.made)

    def step_one(self, x: bytes, record: bytes, at: int) -> tuple[Floats, bytes, bool]:
        """Advance one row by one step; its buffers lie as a packed state does.

        Args:
            x: (F) float32.
            record: Bytes with the packed state at offset `at`.

        Returns:
            Outputs (1, O), the caller's own, the new packed state, and whether both are finite.
        """
        room = self._rooms.get(1) or self._bind(1)
        room.x[0] = np.frombuffer(x, np.float32)
        self._read[: self._size] = np.frombuffer(record, np.float32, self._size, at)
        self._session.run_with_iobinding(room.binding)
        return room.y.copy(), room.made[: self._size].tobytes(), is_finite(room.made)

    def _grow(self, rows: int) -> None:
        """Make room for that many rows."""
        self._most = rows = 1 << (rows - 1).bit_length()
        manifest = self._manifest
        self._x = np.zeros((rows, manifest.n_features), np.float32)
        self._lengths = np.ones(rows, np.int32)
        self._read = np.zeros(rows * self._size, np.float32)
        self._written = np.zeros(rows * (self._size + manifest.n_outputs), np.float32)
        self._rooms: dict[int, Room] = {}

    def _bind(self, rows: int) -> Room:
        """The buffers' beginnings as the inputs and outputs of `rows` rows."""
        if rows > self._most:
            self._grow(rows)
        manifest, binding = self._manifest, self._session.io_binding()
        states_in, states_out = self._split(self._read, rows), self._split(self._written, rows)
        made = self._written[: rows * (self._size + manifest.n_outputs)]
        room = Room(binding, self._x[:rows], states_in, states_out, made[rows * self._size :].reshape(rows, -1), made)

        def bind(to: Any, name: str, buffer: npt.NDArray[Any], *shape: int) -> None:
            to(name, "cpu", 0, buffer.dtype, (rows, *shape), buffer.ctypes.data)

        into, out_of = binding.bind_input, binding.bind_output
        bind(into, manifest.input.name, room.x, 1, manifest.n_features)
        if self._lengths_port is not None:
            bind(into, self._lengths_port, self._lengths)
        for state, before, after in zip(manifest.states, states_in, states_out, strict=True):
            bind(into, state.input, before, *state.shape)
            bind(out_of, state.output, after, *state.shape)
        bind(out_of, manifest.output.name, room.y, 1, manifest.n_outputs)
        for name, value in self._constants.items():
            binding.bind_cpu_input(name, value)
        if len(self._rooms) >= _MOST_ROOMS:
            self._rooms.clear()
        self._rooms[rows] = room
        return room

    def _split(self, flat: Floats, rows: int) -> list[Floats]:
        """State tensors (rows, size), one behind the other."""
        return [flat[rows * cut.start : rows * cut.stop].reshape(rows, -1) for cut in self._cuts]


def is_finite(flat: Floats) -> bool:
    """Whether all of a flat float32 array is finite."""
    # The product overflows first, cheaply; vdot, unlike dot, does not warn of it.
    return math.isfinite(np.vdot(flat, flat)) or bool(np.isfinite(flat).all())
