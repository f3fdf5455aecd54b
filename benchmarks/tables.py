"""`stepcast score` on a table of the benchmark's model: from the file to the finished output, on the server's core."""

import time
from pathlib import Path

import numpy as np

from service.engine.repository import Repository
from service.settings import Settings
from stepcast.manifest import read_manifest

from . import model, requests
from .bare import POOL, pool
from .contenders import SESSIONS, Bench, Contender, Measure, Run
from .machine import pinned
from .requests import WrongAnswer

STEPS = 1024


def _table(path: Path, by_key: bool) -> None:
    """SESSIONS of STEPS rows each, with the pool's inputs as everywhere."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    step, session = (grid.ravel() for grid in np.indices((STEPS, SESSIONS)))
    if by_key:
        session, step = (grid.ravel() for grid in np.indices((SESSIONS, STEPS)))
    names = [feature.name for feature in read_manifest(model.ensure()).features]
    x = pool()[(13 * session + step) % POOL]
    columns = {"key": [f"s{n:03}" for n in session], "when": (step * 3600).astype("datetime64[s]")}
    table = pa.table(columns | {name: np.ascontiguousarray(x[:, at]) for at, name in enumerate(names)})
    (csv.write_csv if path.suffix == ".csv" else parquet.write_table)(table, path)


def _outputs(path: Path, by_key: bool) -> np.ndarray:
    """(STEPS, SESSIONS, O) of the finished output."""
    from pyarrow import csv, parquet

    table = csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)
    y = np.stack([column.to_numpy() for column in table.columns[3:]], axis=1)
    return y.reshape(SESSIONS, STEPS, -1).swapaxes(0, 1) if by_key else y.reshape(STEPS, SESSIONS, -1)


def _score(suffix: str, by_key: bool = False) -> Contender:
    def prepare(bench: Bench) -> Run:
        from service.scoring.layout import Wanted  # these need pyarrow, without which the contender is absent
        from service.scoring.work import Plan, Work

        name = f"score-{by_key}"
        table, out = (bench.park.folder / f"{name}-{what}.{suffix}" for what in ("in", "out"))
        directory = model.ensure()
        with pinned(bench.park.server_core):  # so are the threads that are started here
            _table(table, by_key)
            served = Repository(directory.parents[1], device="cpu", threads=1).load("bench", 1)

        def run(seconds: float) -> Measure:
            bench.park.only()
            took, before = [], time.process_time()
            with pinned(bench.park.server_core):
                while sum(took) < seconds:
                    started = time.perf_counter()
                    work = Work(Plan(table, out, Wanted("key", "when"), force=True), served, Settings.read({}))
                    work.run(lambda done, of: None)
                    took.append(time.perf_counter() - started)
            rows, cpu_s = SESSIONS * STEPS, time.process_time() - before
            found, want = _outputs(out, by_key), bench.truth.outputs(STEPS)
            if not np.allclose(found, want, requests.RTOL, requests.ATOL):
                raise WrongAnswer("the output differs from the bare run's")
            return Measure(rows * len(took) / sum(took), 0.0, 0.0, 1e6 * cpu_s / (rows * len(took)), checked=found.size)

        return run

    order = "sorted by key" if by_key else "sorted by time"
    what = f"Stepcast, score, {suffix.upper() if suffix == 'csv' else 'Parquet'}, {SESSIONS} sessions, {order}"
    return Contender(f"score-{'key-' if by_key else ''}{suffix}", "table", what, prepare, "pyarrow")


def everyone() -> list[Contender]:
    """A table by time in both kinds of files, and one by key."""
    return [_score("parquet"), _score("csv"), _score("parquet", by_key=True)]
