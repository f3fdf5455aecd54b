"""How many bytes an idle session costs: its record, Redis' overhead, and the server's memory.

    PYTHONPATH=. .venv/bin/python tests/footprint.py --sessions 100000

Sessions of a 2 x LSTM(128) model with all the answers that are kept, written through the store; then a server with a
small hot cache steps many of them in random order.
"""

import argparse
import asyncio
import re
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from statistics import mean

import httpx
import msgspec
import numpy as np
import torch
from make_models import Toy
from redis_servers import RedisServer
from serving import Process

from service.engine.model import Runtime
from service.records.layout import ANSWER_BYTES, DIGEST_BYTES, HEADER_BYTES, KEPT_ANSWERS
from service.records.record import encode_answer, new_record
from service.store import Write
from service.store.urls import open_store
from stepcast.manifest import MODEL_FILE, sha256_of
from training.config import Config
from training.export import describe, publish, stage
from training.network import Network

NAME = "large"
UNITS = 128
STEPS = 1000
PER_CALL = 500


@dataclass(frozen=True)
class Footprint:
    """All in bytes; per session where not said otherwise."""

    sessions: int
    state: int
    answers: int  # the outputs alone: what tells a retry counts as overhead
    record: int
    overhead: int  # record less state and kept answers
    redis_slack: int  # what Redis' allocator rounds the record up by
    redis_key: float  # MEMORY USAGE less the record
    redis_all: float  # growth of used_memory less the record
    hot_limit: int  # of the server
    hot: int  # of the server: what it says its hot sessions take
    touched: int  # how many sessions the server has stepped
    growth: int  # of the server's resident memory while it did
    growth_unbounded: int  # the same with room for all of them

    def __str__(self) -> str:
        return "\n".join(f"{f.name:>18} {getattr(self, f.name):>12,.0f}" for f in fields(self))


def make_model(folder: Path) -> None:
    """Export 2 x LSTM(128), untrained."""
    layer = {"kind": "lstm", "units": UNITS}
    data = {"kind": "python", "class": "make_models:Toy", "options": {}}
    config = Config.model_validate(
        {"name": NAME, "description": "", "data": data, "network": [layer, layer, {"kind": "rnn_output"}]}
    )
    torch.manual_seed(7)
    source = Toy()
    network = Network.of(config.network, source)
    folder.mkdir()
    staged = stage(network, source, folder)
    publish(
        staged, describe(network, source, config, sha256=sha256_of(staged / MODEL_FILE), version=1, metrics={}), folder
    )


async def fill(url: str, runtime: Runtime, sessions: int) -> tuple[int, int, int]:
    """Write idle sessions; bytes of state, kept answers and record of each."""
    numbers = np.random.default_rng(1)
    outputs = 4 * runtime.manifest.n_outputs
    served = bytes.fromhex(runtime.manifest.fingerprint)
    store = open_store(url)
    await store.open()
    sizes = set()

    def write(number: int) -> Write:
        state = numbers.normal(size=runtime.row_bytes // 4).astype(np.float32).tobytes()
        made = [(numbers.bytes(DIGEST_BYTES), numbers.bytes(outputs)) for _ in range(KEPT_ANSWERS)]
        answers = tuple(encode_answer(digest, 1, outputs // 4, kept) for digest, kept in made)
        record = new_record(1, served, examples=1, state=state, step=STEPS)
        record = replace(record, answers=answers, revision=1 + STEPS)
        data = record.encode()
        sizes.add((len(record.state), sum(map(len, answers)), len(data)))
        return Write(f"default/{NAME}/{session(number)}", None, data)

    for start in range(0, sessions, PER_CALL):
        assert all(await store.change([write(n) for n in range(start, min(start + PER_CALL, sessions))]))
    await store.close()
    (size,) = sizes
    return size


def session(number: int) -> str:
    """An id as long as one that the server makes."""
    return f"session-{number:014d}"


def touch(url: str, numbers: list[int]) -> None:
    """Step each of these sessions once."""
    with httpx.Client(base_url=url, timeout=60, verify=False) as client:
        for start in range(0, len(numbers), PER_CALL):
            names = [session(number) for number in numbers[start : start + PER_CALL]]
            inputs = np.zeros((len(names), 3), "<f4").tobytes()
            body = msgspec.msgpack.encode({"sessions": names, "inputs": inputs})
            response = client.post(
                f"/v1/models/{NAME}/step", content=body, headers={"content-type": "application/msgpack"}
            )
            answer = msgspec.msgpack.decode(response.content)
            assert response.status_code == 200, answer
            assert not answer["errors"], answer["errors"]
            assert set(answer["steps"]) <= {STEPS + 1, STEPS + 2}  # the second server steps them again


def resident(process: Process) -> int:
    """A process's resident memory."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]


def hot_bytes(process: Process) -> int:
    """What the server says its hot sessions take."""
    text = httpx.get(f"{process.url}/metrics", verify=False).text
    return int(float(re.search(r"^stepcast_hot_bytes (\S+)$", text, re.MULTILINE)[1]))  # type: ignore[index]


def serve(url: str, models: Path, order: list[int], limit: int) -> tuple[int, int]:
    """Step sessions in an order; growth of the server's memory, and what its hot sessions take."""
    process = Process(url, models=models, hot_bytes=str(limit))
    try:
        warm = order[: len(order) // 5]
        touch(process.url, warm)
        before = resident(process)
        touch(process.url, order[len(warm) :])
        return resident(process) - before, hot_bytes(process)
    finally:
        process.kill()


def measure(folder: Path, sessions: int, hot_limit: int, version: str | None = None) -> Footprint:
    """Fill a Redis and step `sessions` sessions through a server with a small and one with a large hot cache."""
    with ExitStack() as stack:
        make_model(folder / "models")
        redis = RedisServer(folder / "redis", version=version)
        stack.callback(redis.kill)
        redis.start()
        before = used_memory(redis)
        runtime = Runtime(folder / "models" / NAME / "1", device="cpu")
        state, answers, record = asyncio.run(fill(redis.url, runtime, sessions))
        grown, rounded = used_memory(redis) - before, slack(redis, record)
        random = Random(1)
        keys = [f"stepcast:{{default/{NAME}/{session(n)}}}" for n in random.sample(range(sessions), 50)]
        usage = mean(int(redis.cli("MEMORY", "USAGE", key)) for key in keys)
        order = random.sample(range(sessions), sessions)
        growth, hot = serve(redis.url, folder / "models", order, hot_limit)
        unbounded, _ = serve(redis.url, folder / "models", order, 2**40)
    return Footprint(
        sessions=sessions,
        state=state,
        answers=answers,
        record=record,
        overhead=record - state - answers,
        redis_slack=rounded,
        redis_key=usage - record,
        redis_all=grown / sessions - record,
        hot_limit=hot_limit,
        hot=hot,
        touched=len(order),
        growth=growth,
        growth_unbounded=unbounded,
    )


def used_memory(redis: RedisServer) -> int:
    """What Redis has allocated."""
    return int(re.search(r"used_memory:(\d+)", redis.cli("INFO", "memory"))[1])  # type: ignore[index]


def slack(redis: RedisServer, record: int) -> int:
    """Bytes by which jemalloc's size classes, four to each doubling, exceed a record; libc's malloc is exact."""
    if "mem_allocator:jemalloc" not in redis.cli("INFO", "memory"):
        return 0
    wanted = record + 6  # the head and the end of Redis' string
    step = 2 ** max(4, (wanted - 1).bit_length() - 3)
    return -(-wanted // step) * step - record


def check(found: Footprint) -> None:
    """What is promised."""
    assert found.state == 2 * 2 * UNITS * 4
    assert found.answers == KEPT_ANSWERS * (ANSWER_BYTES + 2 * 4)
    assert found.overhead == HEADER_BYTES
    assert found.redis_key - found.redis_slack < 200
    assert found.redis_all - found.redis_slack < 300
    assert found.hot <= found.hot_limit
    assert found.growth < found.hot_limit + 16 * 2**20
    assert found.growth_unbounded > found.growth + 0.5 * found.sessions * found.record


def main() -> None:
    """Measure, print, check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sessions", type=int, default=100_000)
    parser.add_argument("--hot-bytes", type=int, default=16 * 2**20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.sessions, arguments.hot_bytes)
    print(found)
    check(found)


if __name__ == "__main__":
    main()
