"""uvicorn as Stepcast runs it, and the model as a hand-written service would run it."""

from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from benchmarks import bare, model

STATES = [f"lstm_{layer}.{key}" for layer in (0, 1) for key in "hc"]
INPUTS = [f"{name}.in" for name in STATES]
OUTPUTS = ["y", *(f"{name}.out" for name in STATES)]
WIDTH = 128
ROW_BYTES = 4 * WIDTH * len(STATES)
EMPTY = bytes(ROW_BYTES)


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
    """The model, stepped for B rows whose states are bytes."""

    def __init__(self, directory: Path | None = None) -> None:
        self._session = bare.session(directory or model.ensure())

    def step(self, rows: list[list[float]], states: list[bytes]) -> tuple[Any, list[bytes]]:
        """Outputs (B, O) and new states."""
        x = np.array(rows, np.float32)[:, None]
        table = np.frombuffer(b"".join(states), np.float32).reshape(len(rows), len(STATES), WIDTH)
        feeds = {name: np.ascontiguousarray(table[:, i]) for i, name in enumerate(INPUTS)}
        y, *new = self._session.run(OUTPUTS, {"x": x, "lengths": np.ones(len(rows), np.int32), **feeds})
        packed = np.stack(new, axis=1)
        return y[:, 0], [packed[i].tobytes() for i in range(len(rows))]
