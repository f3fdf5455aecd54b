"""Every metric and log field, declared once, units in the name."""

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

log = logging.getLogger("stepcast")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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
            model,
            buckets=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024],
            registry=self.registry,
        )
        self.run_seconds = Histogram(
            "stepcast_run_seconds",
            "Time of one run, gather and scatter included, waiting excluded.",
            model,
            buckets=[0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5],
            registry=self.registry,
        )
        self.commit_seconds = Histogram(
            "stepcast_commit_seconds",
            "Time of one store commit (a batch of sessions).",
            buckets=[0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2],
            registry=self.registry,
        )
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
