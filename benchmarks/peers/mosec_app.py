"""mosec: its Rust front batches up to 64 requests for one worker, which does one MGET and one MSET per batch."""

import os
import sys
from typing import Any

from mosec import Server, Worker
from redis import Redis

from benchmarks import model
from benchmarks.peers.common import EMPTY, Stepper


class Step(Worker):
    """Steps the sessions of a batch; a session is in a batch once, since its caller waits for the answer."""

    shape = model.Shape()

    def __init__(self) -> None:
        self._redis = Redis.from_url(os.environ["BENCH_REDIS"])
        self._stepper = Stepper(self.shape)

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One batch."""
        keys = [f"mosec:{self.shape.name}:{each['session']}" for each in data]
        before: list[Any] = self._redis.mget(keys)
        outputs, after = self._stepper.step([each["inputs"] for each in data], [s or EMPTY for s in before])
        self._redis.mset(dict(zip(keys, after, strict=True)))
        return [{"outputs": row} for row in outputs.tolist()]


class ForeignStep(Step):
    """The same on the graph that others made."""

    shape = model.FOREIGN


def serve(port: int, redis: str, worker: type[Step] = Step) -> None:
    """Serve."""
    os.environ["BENCH_REDIS"] = redis
    sys.argv = [sys.argv[0], "--port", str(port), "--address", "127.0.0.1", "--log-level", "warning"]
    server: Any = Server()
    server.append_worker(worker, num=1, max_batch_size=64, max_wait_time=1)
    server.run()
