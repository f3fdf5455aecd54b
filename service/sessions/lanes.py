"""Where the steps of each served version go, and how many may wait."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from stepcast.errors import Draining, NotStreaming, QueueFull

from ..engine.batcher import Batcher
from ..engine.repository import Served
from ..records.digest import Digests
from ..records.layout import Shapes
from ..settings import Settings
from ..telemetry import Metrics
from .core import Batch, Lane, Load

QUEUE_SHARE: Final = 0.4
"""The share of deadline_s that a step may have to wait in a queue at its present pace, or it is refused at once."""

Finish = Callable[[Batch], "asyncio.Future[None] | None"]
Drop = Callable[[Batch, Sequence[int]], None]


class Lanes:
    """The lanes of a server; `finish` takes a batch that has run, `clock` is a wall clock in ns.

    `drop` refuses rows of a batch that are too late to be run.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, clock: Callable[[], int], finish: Finish, drop: Drop
    ) -> None:
        self.settings, self._metrics, self._clock = settings, metrics, clock
        self._finish, self._drop = finish, drop
        self.digests = Digests(settings.digest_key.encode())
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._loads: dict[str, Load] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.draining = False

    def admit(self, served: Served, count: int) -> Load:
        """The steps of a model that wait, where `count` more may; raises NotStreaming, QueueFull or Draining."""
        check_streams(served)
        return self.room(served.name, count)

    def room(self, model: str, count: int) -> Load:
        """The same of rows that are of no session."""
        load = self.load(model)
        if load.waiting + count > load.limit:
            if self.draining:
                raise Draining("the server is shutting down. Connect again.", retry_after_s=1.0)
            raise full(f"model {model!r}", load.waiting, load.limit, count)
        return load

    def load(self, model: str) -> Load:
        """The steps of a model that wait."""
        load = self._loads.get(model)
        if load is None:
            limit = 0 if self.draining else self.settings.queue_limit
            load = self._loads[model] = Load(limit, self.settings.deadline_s * QUEUE_SHARE)
        return load

    def of(self, served: Served) -> Lane:
        """The lane of a served version."""
        lane = self._lanes.get((served.name, served.version))
        if lane is None or lane.served is not served:
            lane = self._lanes[served.name, served.version] = self._lane(served)
        return lane

    def _lane(self, served: Served) -> Lane:
        manifest, settings = served.manifest, self.settings
        run, rows, chunk_s = served.runtime.run, settings.batch_rows, settings.chunk_s if manifest.streaming else None
        inline_s = settings.inline_s if served.runtime.device == "cpu" else -1.0
        batcher = Batcher(run, self._finish, batch_rows=rows, chunk_s=chunk_s, inline_s=inline_s)
        sizes = manifest.state_row_bytes, served.input_bytes, manifest.n_outputs
        shapes = Shapes(*sizes, settings.log_steps, settings.ttl_s)
        load, version = self.load(served.name), served.version
        return Lane(served, batcher, shapes, load, self.digests, settings, self._clock, self._drop, version)

    def count(self) -> int:
        """Bring the counters of steps up to date; how many steps wait."""
        for lane in self._lanes.values():
            self._flush(lane)
        return sum(load.waiting for load in self._loads.values())

    def _flush(self, lane: Lane) -> None:
        name, metrics, runs = lane.served.name, self._metrics, lane.batcher.take_runs()
        metrics.calls.labels(name).inc(lane.calls)
        metrics.steps.labels(name).inc(lane.rows)
        metrics.commit_seconds.observe(lane.commits)
        metrics.batch_rows.observe([rows for rows, _ in runs], name)
        metrics.run_seconds.observe([took for _, took in runs], name)
        lane.calls, lane.rows, lane.commits = 0, 0, []

    def retire(self, served: Served) -> None:
        """A version is not served any more: nothing here keeps it once its batches are finished."""
        lane = self._lanes.pop((served.name, served.version), None)
        if lane is not None:
            self._flush(lane)
            task = asyncio.ensure_future(lane.batcher.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def drain(self) -> None:
        """Refuse new steps and wait until the accepted ones are answered."""
        self.draining = True
        for load in self._loads.values():
            load.limit = 0
        for load in list(self._loads.values()):
            while load.waiting:
                load.left.clear()
                await load.left.wait()
        for lane in list(self._lanes.values()):
            await lane.batcher.close()


def check_streams(served: Served) -> None:
    """Raises NotStreaming where the model cannot be stepped."""
    if not served.manifest.streaming:
        what = f"model {served.name!r} version {served.version}"
        raise NotStreaming(f"{what} reads sequences from both ends. Use predict.", model=served.name)


def full(what: str, waiting: int, limit: int, count: int = 1) -> QueueFull:
    """The error for a queue that does not take `count` more."""
    asked = f", got {count} more" if count > 1 else ""
    text = f"{what} has {waiting} steps waiting (limit {limit}){asked}. Retry after 0.05 s."
    return QueueFull(text, waiting=waiting, limit=limit, retry_after_s=0.05)
