"""Consumers of streams, in a thread or as processes, and what tests say to their Redis."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import redis
import uvicorn
from doors import Answer, Array, Call, HttpDoor
from redis_servers import eventually
from serving import MODELS, ROOT

from service.app import ConsumerApp, Consuming
from service.settings import Settings
from service.store.streams import StreamPlace
from stepcast.errors import from_problem
from stepcast.shares import share_of

Fields = dict[bytes, bytes]


class Letter(NamedTuple):
    """What a sink has of a step."""

    session: str
    step: int
    entry: str
    outputs: Any  # as JSON says, or float32 (O,)
    version: int


class Streams:
    """Source, sink and dead letters of a test, in Redis; `apart`: the sink is in another one."""

    def __init__(self, url: str, name: str, shares: int = 1, apart: str | None = None) -> None:
        self.url, self.name, self.shares = url, name, shares
        self.namespace = name  # of the sessions
        self.sink_url = apart or url
        self.redis = redis.Redis.from_url(url)
        self.other = redis.Redis.from_url(self.sink_url)
        self.names = [name] if shares == 1 else [f"{name}:{i}" for i in range(shares)]
        self.entries = 0

    def stream(self, session: str) -> str:
        """The stream that a session's entries go to."""
        return self.names[share_of(session, self.shares)]

    def add(self, session: str, x: Any = None, **fields: Any) -> str:
        """Ask for a step: JSON inputs, or packed ones if `x` is an array."""
        if isinstance(x, np.ndarray):
            fields["packed"] = x.astype("<f4").tobytes()
        elif x is not None:
            fields["inputs"] = json.dumps(x)
        return str(self.add_all([(session, fields)])[0])

    def add_all(self, wanted: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Ask for many steps; the ids of their entries."""
        self.entries += len(wanted)
        with self.redis.pipeline(transaction=False) as pipe:
            for session, fields in wanted:
                pipe.xadd(self.stream(session), {"session": session, **fields})
            return [found.decode() for found in pipe.execute()]

    def letters(self) -> list[Letter]:
        """The whole sink."""
        return [letter(fields) for _, fields in self.other.xrange(f"{self.name}:out")]

    def dead(self) -> list[tuple[str, dict[str, Any], Fields]]:
        """All dead letters: the entry's id, the problem, the fields."""
        found = self.redis.xrange(f"{self.name}:dead")
        return [(fields[b"entry"].decode(), json.loads(fields[b"problem"]), fields) for _, fields in found]

    def pending(self) -> int:
        """Entries given and not acknowledged."""
        return sum(self.redis.xpending(name, "stepcast")["pending"] for name in self.names)

    def settled(self) -> bool:
        """Whether all that was asked for is given and acknowledged."""
        groups = [(name, self.redis.xinfo_groups(name)[0]) for name in self.names if self.redis.exists(name)]
        return all(
            not group["pending"] and group["last-delivered-id"] == self.redis.xinfo_stream(name)["last-generated-id"]
            for name, group in groups
        )

    def settle(self, timeout_s: float = 30.0) -> None:
        """Wait until all that was asked for is done with."""
        eventually(self.settled, timeout_s)

    def record(self, model: str, session: str) -> bytes | None:
        """A session's record, where the sessions are here too."""
        found: bytes | None = self.redis.get(f"stepcast:{{{self.namespace}/{model}/{session}}}")
        return found

    def close(self) -> None:
        """Disconnect."""
        self.redis.close()
        self.other.close()


def letter(fields: Fields) -> Letter:
    """What the fields of a sink's entry say."""
    outputs: Any = None
    if b"outputs" in fields:
        outputs = json.loads(fields[b"outputs"])
    elif b"packed" in fields:
        outputs = np.frombuffer(fields[b"packed"], "<f4")
    words = fields[b"session"].decode(), int(fields[b"step"]), fields[b"entry"].decode()
    return Letter(*words, outputs, int(fields[b"version"]))


def repository(folder: Path, *kinds: str) -> Path:
    """A repository of few models: a consumer steps one."""
    folder.mkdir(exist_ok=True)
    for kind in kinds:
        if not (folder / kind).exists():
            (folder / kind).symlink_to(MODELS / kind)
    return folder


@contextlib.contextmanager
def consuming(streams: Streams, model: str, models: Path, store: str | None = None, **more: Any) -> Iterator[str]:
    """A consumer in a thread, for as long as the block lasts; the URL of its metrics."""
    place = {name: more.pop(name) for name in ("lease_s", "keep", "deletes", "group") if name in more}
    most = more.pop("most", 4096)
    settings = Settings.read({}, models=models, store=store or streams.url, batch_rows=32, **more)
    at = StreamPlace(streams.name, f"{streams.name}:out", f"{streams.name}:dead", shares=streams.shares, **place)
    consumed = Consuming(model, at, streams.url, streams.sink_url, streams.namespace, most)
    app = ConsumerApp(settings, consumed, freezes=False)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the consumer did not start")
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


class ConsumerProcess:
    """`stepcast consume` as a process, to be killed or paused."""

    def __init__(self, streams: Streams, model: str, models: Path, *arguments: str, store: str | None = None) -> None:
        command = [sys.executable, "-m", "service", "consume", model, "--models", str(models)]
        command += ["--store", store or streams.url, "--url", streams.url, "--sink-url", streams.sink_url]
        command += ["--source", streams.name, "--sink", f"{streams.name}:out", "--shares", str(streams.shares)]
        command += ["--namespace", streams.namespace]
        environ = {**os.environ, "STEPCAST_BATCH_ROWS": "64", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "http://" not in line:
            self.kill()
            raise RuntimeError(f"the consumer did not start: {''.join(self._said)[-2000:]}")
        self.url = line[line.index("http://") :].strip()
        self.announced = line

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._said.append(line)

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self.send(signal.SIGKILL)
        self.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.send(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end; the exit status."""
        status = self.process.wait(30)
        self._reader.join(10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return status


class StreamDoor:
    """A stream: steps by the way of it, packed or as JSON, everything else through HTTP."""

    ranks: ClassVar[tuple[int, ...]] = (1,)

    def __init__(self, streams: Streams, url: str, model: str, packed: bool) -> None:
        self._streams, self._packed = streams, packed
        self._http = HttpDoor(url, model, packed=False)

    def together(self, calls: Sequence[Call]) -> list[Answer]:
        if any(call.op != "step" for call in calls):
            return self._http.together(calls)
        after = (self._last("out"), self._last("dead"))
        ids = self._streams.add_all([(call.session, self._fields(call)) for call in calls])
        found: dict[str, Answer] = {}
        until = time.monotonic() + 20
        while not found.keys() >= set(ids):
            self._look(after, found)
            assert time.monotonic() < until, "no answer"
            time.sleep(0.002)
        shapes = dict(zip(ids, (call.fields["inputs"].shape for call in calls), strict=True))
        return [self._shaped(found[at], shapes[at]) for at in ids]

    def drop(self, call: Call) -> None:
        self._streams.add_all([(call.session, self._fields(call))])
        self.close()

    def close(self) -> None:
        self._http.close()

    def _last(self, kind: str) -> bytes:
        last = self._place(kind).xrevrange(f"{self._streams.name}:{kind}", count=1)
        return last[0][0] if last else b"0-0"

    def _place(self, kind: str) -> Any:
        return self._streams.other if kind == "out" else self._streams.redis

    def _look(self, after: tuple[bytes, bytes], found: dict[str, Answer]) -> None:
        for kind, last in zip(("out", "dead"), after, strict=True):
            for _, fields in self._place(kind).xrange(f"{self._streams.name}:{kind}", b"(" + last):
                at = fields[b"entry"].decode()
                if kind == "dead":
                    found[at] = from_problem(json.loads(fields[b"problem"]))
                else:
                    told = letter(fields)
                    found[at] = {"outputs": told.outputs, "step": told.step, "version": told.version}

    def _fields(self, call: Call) -> dict[str, Any]:
        x: Array = call.fields["inputs"]
        fields: dict[str, Any] = {k: json.dumps(v) for k, v in call.fields.items() if k in ("seq", "mask")}
        if self._packed:
            shape = {} if x.ndim == 1 else {"shape": json.dumps(list(x.shape))}
            return {**fields, **shape, "packed": x.astype("<f4").tobytes()}
        return {**fields, "inputs": json.dumps(_plain(x.tolist()))}

    def _shaped(self, answer: Answer, shape: tuple[int, ...]) -> Answer:
        if isinstance(answer, dict) and self._packed:
            return {**answer, "outputs": answer["outputs"].reshape(*shape[:-1], -1)}
        return answer


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if value != value else value
