"""Every metric and log field, declared once, units in the name."""

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from stepcast.errors import Internal, StepcastError

log = logging.getLogger("stepcast")

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
WORKERS: Final = "_STEPCAST_WORKERS"
"""Environment variable: a private folder where the worker processes of one server tell each other their metrics."""
ANSWER_S: Final = 1.0
"""How long a worker may take to tell its metrics; without them it is left out of that scrape."""
_SECONDS: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)


def as_ours(error: BaseException, otherwise: str = "the server has a defect; its log tells more") -> StepcastError:
    """The error itself if it is one for callers; else it is logged, and `otherwise` is what they are told."""
    if isinstance(error, StepcastError):
        return error
    log.error("%s", otherwise, exc_info=error)
    return Internal(otherwise)


class Histogram(Collector):
    """A histogram under labels; written from one thread. `bounds` are upper bounds of the buckets, ascending.

    It counts many values at once, at a tenth of a library's cost: there are several at every run.
    """

    def __init__(
        self, name: str, about: str, bounds: Sequence[float], *labels: str, registry: CollectorRegistry
    ) -> None:
        self._name, self._about, self._bounds, self._labels = f"stepcast_{name}", about, bounds, labels
        self._seen: dict[tuple[str, ...], tuple[npt.NDArray[np.int64], float]] = {}
        if not labels:
            self.observe([])
        registry.register(self)

    def observe(self, values: Sequence[float], *labels: str) -> None:
        """Count values under these labels."""
        found = np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._bounds) + 1)
        counts, total = self._seen.get(labels, (0, 0.0))
        self._seen[labels] = counts + found, total + sum(values)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._about, labels=self._labels)
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for labels in sorted(self._seen):
            counts, total = self._seen[labels]
            family.add_metric(labels, list(zip(bounds, counts.cumsum(), strict=True)), total)
        yield family


class Metrics:
    """The server's metrics in a registry of their own, so that one process can hold several servers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        counter = partial(Counter, namespace="stepcast", labelnames=["model"], registry=registry)
        gauge = partial(Gauge, namespace="stepcast", registry=registry)
        histogram = partial(Histogram, registry=registry)

        self.steps = counter("steps", "Time steps committed, times examples.")
        self.calls = counter("step_calls", "Step calls committed.")
        self.retries = counter("step_retries", "Step calls answered from a kept answer.")
        self.conflicts = counter("store_conflicts", "Steps computed again: another writer came first.")
        self.errors = counter("errors", "Errors answered, by code.", labelnames=["code"])
        self.errors_of = cache(self.errors.labels)  # the library looks a label up for longer than it counts
        self.batch_rows = histogram("batch_rows", "Rows in one run.", [2**i for i in range(11)], "model")
        self.run_seconds = histogram(
            "run_seconds", "Time of one run, gather and scatter included, waiting excluded.", _SECONDS, "model"
        )
        bounds = *_SECONDS, 2
        self.commit_seconds = histogram("commit_seconds", "Time of one store commit (a batch of sessions).", bounds)
        self.waiting = gauge("waiting_steps", "Step calls accepted and not answered.")
        self.hot = gauge("hot_sessions", "Sessions kept ready in this process.")
        self.hot_bytes = gauge("hot_bytes", "Memory of those sessions, about.")
        self.dropped = gauge(
            "dropped_sessions", "At durability 'interval': sessions whose unwritten steps were lost to another writer."
        )
        self.stream_entries = counter(
            "stream_entries",
            "Entries of a stream by outcome: stepped, redelivered, buried (dead letters), retried.",
            labelnames=["outcome"],
        )
        self.stream_lag = gauge("stream_lag", "Entries of a stream not acknowledged.", labelnames=["stream"])
        self.stream_lag_seconds = gauge(
            "stream_lag_seconds", "Age of a stream's oldest entry not done with.", labelnames=["stream"]
        )
        self.stream_in_hand = gauge("stream_in_hand", "Entries read and not done with.")
        self.stream_shares = gauge("stream_shares", "Streams that this consumer reads.")
        self.sockets = gauge("open_websockets", "WebSocket connections.")
        self.grpc_streams = gauge("open_grpc_streams", "Streams of steps over gRPC.")
        self.ready = gauge("ready", "Worker processes that take requests.")
        gauge("workers", "Worker processes whose metrics these are.").set(1)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class Scrape:
    """What /metrics answers: the sums over all worker processes of a server, whichever is asked.

    A worker tells its metrics to whoever connects to its socket in `folder` (None: it is alone). One that is gone or
    does not answer in time is left out; `stepcast_workers` says how many are in the sums. `fresh` updates the gauges.
    """

    def __init__(self, metrics: Metrics, fresh: Callable[[], None], folder: str | None) -> None:
        self._metrics, self._fresh = metrics, fresh
        self._path = None if folder is None else Path(folder) / f"{os.getpid()}.sock"
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Be there for the others."""
        if self._path is None:
            return
        try:
            self._server = await asyncio.start_unix_server(self._tell, self._path)
        except OSError as error:  # such as a path that is too long for a socket's name
            log.warning("this worker cannot tell its metrics to the others: %s", error)

    def close(self) -> None:
        """Be there no more."""
        if self._server is not None and self._path is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        self._fresh()
        mine = self._metrics.text()
        if self._path is None:
            return mine
        others = [path for path in self._path.parent.glob("*.sock") if path != self._path]
        return generate_latest(_Summed([_parsed(mine), *await asyncio.gather(*map(_ask, others))]))

    async def _tell(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._fresh()
        writer.write(self._metrics.text())
        writer.close()


async def _ask(path: Path) -> list[Metric]:
    """What another worker tells; nothing where it does not."""
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(path)
            with contextlib.closing(writer):
                return _parsed(await reader.read())
    except (OSError, TimeoutError, ValueError) as error:
        log.warning("worker %s did not tell its metrics: %r", path.stem, error)
        return []


def _parsed(text: bytes) -> list[Metric]:
    return list(text_string_to_metric_families(text.decode()))


@dataclass
class _Summed(Collector):
    """The families of several workers as one; of the times at which counters were made the first."""

    workers: Sequence[list[Metric]]

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        sums: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
        for family in chain.from_iterable(self.workers):
            found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                key = family.name, sample.name, tuple(sample.labels.items())
                both = sums.get(key, math.inf if family.name.endswith("_created") else 0.0), sample.value
                sums[key] = min(both) if family.name.endswith("_created") else sum(both)
        for (name, sample_name, labels), value in sums.items():
            found[name].add_sample(sample_name, dict(labels), value)
        return found.values()
