"""uvicorn as Stepcast runs it, and the model as a hand-written service would run it."""

from typing import Any

import numpy as np
import uvicorn

from benchmarks import bare, model

WIDTH = 128
STATES = 4
EMPTY = bytes(4 * WIDTH * STATES)
"""The state of a new session."""


def run_uvicorn(app: Any, port: int) -> None:
    """uvloop, httptools, no access log, no date and server headers: as Stepcast."""
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        ws="websockets-sansio",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
    )


class Stepper:
    """A model, stepped for B rows whose states are bytes."""

    def __init__(self, shape: model.Shape | None = None) -> None:
        self._shape = shape or model.Shape()
        self._session = bare.session(model.ensure(self._shape))
        self._outputs = ["y", *(state.output for state in self._shape.states)]

    def step(self, rows: list[list[float]], states: list[bytes]) -> tuple[Any, list[bytes]]:
        """Outputs (B, O) and new states."""
        x = np.array(rows, np.float32)[:, None]
        table = np.frombuffer(b"".join(states), np.float32).reshape(len(rows), STATES, WIDTH)
        feeds = {state.input: np.ascontiguousarray(table[:, i]) for i, state in enumerate(self._shape.states)}
        if self._shape.kind == "foreign":
            y, *new = self._session.run(self._outputs, {"x": x, **{name: h[None] for name, h in feeds.items()}})
            packed = np.concatenate(new).transpose(1, 0, 2)
        else:
            lengths = np.ones(len(rows), np.int32)
            y, *new = self._session.run(self._outputs, {"x": x, "lengths": lengths, **feeds})
            packed = np.stack(new, axis=1)
        return y[:, 0], [packed[i].tobytes() for i in range(len(rows))]
