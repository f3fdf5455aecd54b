"""Every metric and log field, declared once, units in the name."""

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from stepcast.errors import Internal, StepcastError

log = logging.getLogger("stepcast")


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)


def as_ours(error: BaseException, otherwise: str = "the server has a defect; its log tells more") -> StepcastError:
    """The error itself if it is one for callers; else it is logged, and `otherwise` is what they are told."""
    if isinstance(error, StepcastError):
        return error
    log.error("%s", otherwise, exc_info=error)
    return Internal(otherwise)


class Observed:
    """What a histogram saw under one label. A tenth of a library's cost: there are several at every run."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class Histogram(Collector):
    """A histogram with at most one label; written from one thread.

    Args:
        bounds: Upper bounds of the buckets, ascending.
        label: Its name; empty: none.
    """

    def __init__(
        self, name: str, help_text: str, bounds: Sequence[float], registry: CollectorRegistry, label: str = ""
    ) -> None:
        self._name, self._help, self._bounds, self._label = name, help_text, bounds, label
        self._seen: dict[str, Observed] = {}
        if not label:
            self.of("")
        registry.register(self)

    def of(self, value: str = "") -> Observed:
        """What is seen under a label's value."""
        seen = self._seen.get(value)
        if seen is None:
            seen = self._seen[value] = Observed(self._bounds)
        return seen

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the registry."""
        family = HistogramMetricFamily(self._name, self._help, labels=[self._label] if self._label else [])
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for value, seen in sorted(self._seen.items()):
            buckets = list(zip(bounds, accumulate(seen.counts), strict=True))
            family.add_metric([value] if self._label else [], buckets, seen.total)
        yield family


class Metrics:
    """The server's metrics in a registry of their own, so that one process can hold several servers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ["model"]
        self.steps = Counter("stepcast_steps", "Time steps committed, times examples.", model, registry=self.registry)
        self.calls = Counter("stepcast_step_calls", "Step calls committed.", model, registry=self.registry)
        self.retries = Counter(
            "stepcast_step_retries", "Step calls answered from a kept answer.", model, registry=self.registry
        )
        self.conflicts = Counter(
            "stepcast_store_conflicts",
            "Steps computed again: another writer came first.",
            model,
            registry=self.registry,
        )
        self.errors = Counter("stepcast_errors", "Errors answered, by code.", ["code"], registry=self.registry)
        self.batch_rows = Histogram(
            "stepcast_batch_rows",
            "Rows in one run.",
            [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024],
            self.registry,
            "model",
        )
        self.run_seconds = Histogram(
            "stepcast_run_seconds",
            "Time of one run, gather and scatter included, waiting excluded.",
            _SECONDS,
            self.registry,
            "model",
        )
        self.commit_seconds = Histogram(
            "stepcast_commit_seconds", "Time of one store commit (a batch of sessions).", [*_SECONDS, 2], self.registry
        ).of()
        self.waiting = Gauge("stepcast_waiting_steps", "Step calls accepted and not answered.", registry=self.registry)
        self.hot = Gauge("stepcast_hot_sessions", "Sessions kept ready in this process.", registry=self.registry)
        self.hot_bytes = Gauge("stepcast_hot_bytes", "Memory of those sessions, about.", registry=self.registry)
        self.dropped = Gauge(
            "stepcast_dropped_sessions",
            "At durability 'interval': sessions whose unwritten steps were lost to another writer.",
            registry=self.registry,
        )
        self.sockets = Gauge("stepcast_open_websockets", "WebSocket connections.", registry=self.registry)
        self.ready = Gauge("stepcast_ready", "1 while the server takes requests.", registry=self.registry)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
