"""Consumers of a stream are killed and put to sleep, its Redis is killed, entries are given again; then all is counted.

    make chaos-streams ARGS="--entries 1000000 --sessions 1000 --seed 1"

Three consumers share a source of four streams. What must hold: the sink has each good entry once, each session's in
order, with the outputs of one offline pass; the dead letters are the bad entries, each once.
"""

import argparse
import json
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import redis
from redis_servers import RedisServer
from serving import MODELS
from streams import ConsumerProcess, Letter, Streams, letter, repository

from service.engine.model import Runtime
from stepcast.shares import share_of

KIND, SHARES, CONSUMERS, LEASE_S = "lstm", 4, 3, 1.0
BAD_SHARE = 0.002
PIECE = 500
PATIENCE_S = 30.0
GHOST = "a-consumer-that-is-gone"
BAD: tuple[dict[str, Any], ...] = (
    {"inputs": "[1, 2]"},
    {"inputs": "[1, 2"},
    {"packed": b"12345"},
    {"inputs": "[1, 2, 3]", "seq": "987654321"},
    {"inputs": "[1, 2, 3]", "tiem": "now"},
)
SET_BACK = """
local group = redis.call('XINFO', 'GROUPS', KEYS[1])[1]
local ids = {}
for _, entry in ipairs(redis.call('XREVRANGE', KEYS[1], group[8], '-', 'COUNT', ARGV[2])) do
  ids[#ids + 1] = entry[1]
end
if #ids > 0 then redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], ids[#ids]) end
return ids
"""
"""Set a group some entries back, all at once; the ids of those that are given again, and one before them."""


@dataclass
class Count:
    """What happened."""

    entries: int = 0
    bad: int = 0
    kills: int = 0
    naps: int = 0
    restarts: int = 0
    given_again: int = 0
    told_twice: int = 0
    seconds: float = 0.0
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    different: int = 0
    dead_lost: int = 0
    dead_doubled: int = 0
    dead_wrong: int = 0

    @property
    def wrong(self) -> int:
        """How much was not as it must be."""
        stepped = self.lost + self.doubled + self.disordered + self.different
        return stepped + self.dead_lost + self.dead_doubled + self.dead_wrong

    def __str__(self) -> str:
        return (
            f"entries {self.entries}, {self.bad} of them bad, in {self.seconds:.0f} s; consumers killed {self.kills}, "
            f"put to sleep {self.naps}, Redis killed {self.restarts}, entries given again {self.given_again}, "
            f"told twice {self.told_twice}; lost = {self.lost}, stepped twice = {self.doubled}, "
            f"out of order = {self.disordered}, different = {self.different}, dead letters lost = {self.dead_lost}, "
            f"doubled = {self.dead_doubled}, wrong = {self.dead_wrong}"
        )


class Script:
    """What is written, by share: session, its number among the session's good entries (None: bad), and the fields."""

    def __init__(self, entries: int, sessions: int, seed: int) -> None:
        random, numbers = Random(seed), np.random.default_rng(seed)
        self.names = [f"pump-{seed}-{i}" for i in range(sessions)]
        turns = [random.randrange(sessions) for _ in range(entries)]
        self.bad = {place for place in range(entries) if random.random() < BAD_SHARE}
        counts = np.bincount([turn for place, turn in enumerate(turns) if place not in self.bad], minlength=sessions)
        self.x = [numbers.normal(size=(count, 3)).astype(np.float32) for count in counts]
        self.shares: list[list[tuple[str, int | None, dict[str, Any]]]] = [[] for _ in range(SHARES)]
        taken = [0] * sessions
        for place, turn in enumerate(turns):
            name = self.names[turn]
            if place in self.bad:
                entry = name, None, random.choice(BAD)
            else:
                row = self.x[turn][taken[turn]]
                as_json = {"inputs": json.dumps([float(str(value)) for value in row])}
                entry = name, taken[turn], as_json if random.random() < 0.1 else {"packed": row.tobytes()}
                taken[turn] += 1
            self.shares[share_of(name, SHARES)].append(entry)


class Writer(threading.Thread):
    """Writes the script to the source, at about `rate` entries/s, whatever becomes of Redis; `written` so far."""

    def __init__(self, streams: Streams, script: Script, rate: float) -> None:
        super().__init__(daemon=True)
        self._streams, self._script, self._rate = streams, script, rate
        self.written, self.error = 0, ""

    def run(self) -> None:
        """Piece by piece, the shares in turn."""
        begun, left = time.monotonic(), [0] * SHARES
        total = sum(map(len, self._script.shares))
        while self.written < total:
            for share, entries in enumerate(self._script.shares):
                left[share] = self._write(share, entries[left[share] : left[share] + PIECE], left[share])
            self.written = sum(left)
            time.sleep(max(0.0, self.written / self._rate - (time.monotonic() - begun)))

    def _write(self, share: int, piece: list[Any], before: int) -> int:
        """How many entries the share has afterwards."""
        name = self._streams.names[share]
        with self._streams.redis.pipeline(transaction=False) as pipe:
            for session, _, fields in piece:
                pipe.xadd(name, {"session": session, **fields})
            try:
                pipe.execute()
                return before + len(piece)
            except redis.RedisError:
                pass  # some are there
        while True:
            with suppress(redis.RedisError):
                return int(self._streams.redis.xlen(name))
            time.sleep(0.05)


class Fleet:
    """Consumers that are killed and come back."""

    def __init__(self, streams: Streams, models: Path, stack: ExitStack) -> None:
        self._streams, self._models = streams, models
        self.processes = [self._start() for _ in range(CONSUMERS)]
        stack.callback(self.end)

    def _start(self) -> ConsumerProcess:
        deadline = time.monotonic() + 60
        while True:
            try:
                return ConsumerProcess(
                    self._streams, KIND, self._models, "--lease-s", str(LEASE_S), "--in-hand", "1000"
                )
            except RuntimeError:  # Redis is away
                if time.monotonic() > deadline:
                    raise

    def kill(self, index: int) -> None:
        """kill -9, then start another one."""
        self.processes[index].kill()
        self.processes[index] = self._start()

    def nap(self, index: int, seconds: float) -> None:
        """Let one sleep through its lease."""
        self.processes[index].send(signal.SIGSTOP)
        time.sleep(seconds)
        self.processes[index].send(signal.SIGCONT)

    def end(self) -> None:
        """Kill those that run."""
        for process in self.processes:
            if process.process.poll() is None:
                process.send(signal.SIGCONT)
                process.kill()


def give_again(streams: Streams, random: Random, count: Count) -> set[tuple[str, bytes]]:
    """Set the group of a stream some entries back, and hand what is pending to a consumer that is gone.

    Returns what was acknowledged maybe and is given again: of these, dead letters may be written again.
    """
    name, again = random.choice(streams.names), set[tuple[str, bytes]]()
    with suppress(redis.RedisError):
        again = {(name, at) for at in streams.redis.eval(SET_BACK, 1, name, "stepcast", 300)}
        count.given_again += len(again)
        pending = streams.redis.xpending_range(name, "stepcast", "-", "+", 200)
        ids = [entry["message_id"] for entry in pending]
        if ids:
            streams.redis.xclaim(name, "stepcast", GHOST, 0, ids, justid=True)
            count.given_again += len(ids)
    return again


def run(
    folder: Path, *, entries: int, sessions: int, seed: int, rate: float, pause_s: float, apart: bool = False
) -> Count:
    """Consume a script while faults happen, then count."""
    count, random, script = Count(entries=entries), Random(seed), Script(entries, sessions, seed)
    count.bad = len(script.bad)
    with ExitStack() as stack:
        server, sink = RedisServer(folder / "one"), RedisServer(folder / "two")
        for one in (server, sink) if apart else (server,):
            stack.callback(one.kill)
            one.start()
        streams = Streams(server.url, "readings", SHARES, sink.url if apart else None)
        stack.callback(streams.close)
        fleet = Fleet(streams, repository(folder / "models", KIND), stack)
        writer, begun = Writer(streams, script, rate), time.monotonic()
        writer.start()
        turn, again = 0, set[tuple[str, bytes]]()
        while writer.is_alive() or turn < 4:
            time.sleep(random.uniform(0.5, 1.5) * pause_s)
            again |= give_again(streams, random, count)
            index = random.randrange(CONSUMERS)
            if turn == 1:
                server.kill()
                time.sleep(random.uniform(0.0, 1.0))
                server.start()
                count.restarts += 1
            elif turn % 4 == 3:
                fleet.nap(index, LEASE_S * 1.5)
                count.naps += 1
            else:
                fleet.kill(index)
                count.kills += 1
            turn += 1
        assert not writer.error, writer.error
        finish(streams)
        count.seconds = time.monotonic() - begun
        for process in fleet.processes:
            assert process.terminate() in (0, -15)
        judge(streams, script, count, again)
    return count


def finish(streams: Streams) -> None:
    """Wait until all is acknowledged, as long as there is progress."""
    seen, until = -1, time.monotonic() + PATIENCE_S
    while not streams.settled():
        told = streams.other.xlen(f"{streams.name}:out")
        if told != seen:
            seen, until = told, time.monotonic() + PATIENCE_S
        if time.monotonic() > until:
            groups = {name: streams.redis.xinfo_groups(name) for name in streams.names}
            leases = {name: streams.redis.get(f"stepcast:{{{name}}}:stepcast:reader") for name in streams.names}
            raise AssertionError(f"no progress for {PATIENCE_S:g} s after {told} letters: {groups}, {leases}")
        time.sleep(0.1)


def judge(streams: Streams, script: Script, count: Count, again: set[tuple[str, bytes]]) -> None:
    """Compare the sink and the dead letters with the script."""
    told: dict[str, list[Letter]] = {name: [] for name in script.names}
    for fields in scan(streams.other, f"{streams.name}:out"):
        one = letter(fields)
        told[one.session].append(one)
    runtime = Runtime(MODELS / KIND / "1", device="cpu")
    asked: dict[str, list[bytes]] = {name: [] for name in script.names}  # good entries' ids, in order
    bad: list[tuple[str, bytes]] = []
    for name, entries in zip(streams.names, script.shares, strict=True):
        ids = [at for at, _ in scan_ids(streams.redis, name)]
        assert len(ids) == len(entries), (name, len(ids), len(entries))
        for at, (session, number, _) in zip(ids, entries, strict=True):
            if number is None:
                bad.append((name, at))
            else:
                asked[session].append(at)
    for turn, name in enumerate(script.names):
        judge_session(told[name], [at.decode() for at in asked[name]], script.x[turn], runtime, count)
    found = [(fields[b"stream"].decode(), fields[b"entry"]) for fields in scan(streams.redis, f"{streams.name}:dead")]
    count.dead_lost += len(set(bad) - set(found))
    count.dead_wrong += len(set(found) - set(bad))
    once = [letter for letter in found if letter not in again]
    count.dead_doubled += len(once) - len(set(once))


def judge_session(told: list[Letter], asked: list[str], x: Any, runtime: Runtime, count: Count) -> None:
    """One session: each entry once, in order, as the offline pass has it. A letter told twice must be the same."""
    first: dict[int, Letter] = {}
    for one in told:
        known = first.setdefault(one.step, one)
        if known is not one:
            count.told_twice += 1
            count.different += known.entry != one.entry or not np.array_equal(_row(known), _row(one))
    kept = list(first.values())
    entries = [one.entry for one in kept]
    count.doubled += len(entries) - len(set(entries))
    count.lost += len(set(asked) - set(entries))
    count.disordered += [one.step for one in kept] != list(range(1, len(kept) + 1)) or entries != asked
    if entries != asked or not len(x):
        return
    start = np.frombuffer(runtime.initial(1), np.uint8).reshape(1, -1)
    want = runtime.run(x[None], None, start)[0][0]
    got, tolerance = np.stack([_row(one) for one in kept]), runtime.manifest.tolerance
    count.different += not np.allclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol)


def _row(one: Letter) -> Any:
    return np.asarray(one.outputs, np.float32)


def scan_ids(server: Any, name: str) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
    """All entries of a stream, piece by piece."""
    last = b"-"
    while piece := server.xrange(name, last, count=5000):
        yield from piece
        last = b"(" + piece[-1][0]


def scan(server: Any, name: str) -> Iterator[dict[bytes, bytes]]:
    """The fields of all entries of a stream."""
    return (fields for _, fields in scan_ids(server, name))


def main() -> None:
    """One run with everything in one Redis, one with the sink apart; exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e6, help="entries per second that are written, at most")
    parser.add_argument("--pause-s", type=float, default=3.0, help="between two faults, about")
    parser.add_argument("--only", choices=("one", "apart"), help="one Redis, or the sink apart; default: both")
    arguments = vars(parser.parse_args())
    wrong, only = 0, arguments.pop("only")
    for name, apart in (("one", False), ("apart", True)):
        if only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                count = run(Path(folder), apart=apart, **arguments)
            print(f"{'sink in another Redis' if apart else 'all in one Redis'}: {count}", flush=True)
            wrong += count.wrong
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
