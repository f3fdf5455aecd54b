"""load: steps many sessions for a while, and compares every answer with the offline result."""

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ..errors import ConfigError, StepcastError
from . import readings
from .connection import HERE, Key, Model, Url, connected, connected_async, manifest_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.progress import Progress, TaskID

    from ..client import AsyncClient, Client
    from ..manifest import Manifest, Tolerance
    from ..stream import AsyncStream

    Floats = npt.NDArray[np.float32]

_SEQUENCES: Final = 8
_SOCKETS: Final = 64


class Door(StrEnum):
    """How steps travel."""

    WEBSOCKET = "websocket"
    HTTP = "http"


def install(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Sessions of a server")(load)


@dataclass
class Tally:
    """What came back."""

    tolerance: "Tolerance"
    taken_s: list[float] = field(default_factory=list)
    wrong: int = 0
    failed: int = 0
    last_error: str = ""

    def compare(self, got: "Floats", want: "Floats", taken_s: float) -> None:
        """Count an answer; wrong is one that is not the offline result within the manifest's tolerance."""
        import numpy as np

        self.taken_s.append(taken_s)
        self.wrong += not np.allclose(got, want, self.tolerance.rtol, self.tolerance.atol, equal_nan=True)

    def report(self, seconds: float) -> str:
        """One line of figures."""
        import numpy as np

        p50, p99 = np.percentile(self.taken_s, (50, 99)) * 1000 if self.taken_s else (float("nan"), float("nan"))
        rate = len(self.taken_s) / seconds
        text = (
            f"{len(self.taken_s)} steps, {rate:.0f} steps/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms, wrong = {self.wrong}"
        )
        return text + (f", failed = {self.failed} ({self.last_error})" if self.failed else "")


@dataclass(frozen=True)
class Plan:
    """What is stepped: a few sequences [T,F], what they must give [T,O], through which door."""

    model: str
    sequences: "list[tuple[Floats, Floats]]"
    door: Door
    run: str
    deadline: float = math.inf


def load(
    model: Model,
    sessions: Annotated[int, typer.Option(min=1, help="Stepped at the same time, each one step after the other.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="How long.")] = 10.0,
    door: Annotated[Door, typer.Option(help="How steps travel.")] = Door.WEBSOCKET,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Of a session, before it ends and another begins.")] = 50,
    csv: Annotated[Path | None, typer.Option(help="Readings to step; by default drawn by the manifest.")] = None,
    seed: Annotated[int, typer.Option(help="Of the drawn readings.")] = 0,
    url: Url = HERE,
    key: Key = "",
) -> int:
    """Step sessions for a while; every answer is compared with the offline result. Status 1 if any is wrong."""
    with connected(url, key) as client:
        manifest = manifest_of(client, model)
        if not manifest.streaming:
            raise ConfigError(f"{model!r} reads sequences from both ends: it cannot be stepped")
        inputs = _drawn(manifest, steps, seed) if csv is None else _read(csv, manifest, steps)
        sequences = [(x, offline(client, model, x, manifest)) for x in inputs]
    tally = Tally(manifest.tolerance)
    plan = Plan(model, sequences, door, secrets.token_hex(4))
    taken_s = asyncio.run(_run(plan, sessions, connected_async(url, key), tally, seconds))
    print(tally.report(taken_s))
    return 1 if tally.wrong or tally.failed or not tally.taken_s else 0


def offline(client: "Client", model: str, x: "Floats", manifest: "Manifest") -> "Floats":
    """The outputs (T, O) of a sequence (T, F) by one stateless pass; of all its beginnings where only ends answer."""
    import numpy as np

    if manifest.readout == "each":
        return client.predict(model, x)
    beginnings = np.tril(np.ones((len(x), len(x)), dtype=np.int64))
    return client.predict(model, np.repeat(x[None], len(x), axis=0), beginnings)


def _drawn(manifest: "Manifest", steps: int, seed: int) -> "list[Floats]":
    """Sequences as the manifest says that readings are spread."""
    import numpy as np

    mean = np.concatenate([np.full(f.width, f.mean) for f in manifest.features])
    scale = np.concatenate([np.full(f.width, f.scale) for f in manifest.features])
    drawn = np.random.default_rng(seed).normal(size=(_SEQUENCES, steps, manifest.n_features))
    return list((mean + scale * drawn).astype(np.float32))


def _read(csv: Path, manifest: "Manifest", steps: int) -> "list[Floats]":
    import numpy as np

    found = list(islice(readings.rows(csv, manifest), _SEQUENCES * steps))
    if not found:
        raise ConfigError(f"{csv}: no row")
    values = np.array(found, np.float32)
    return [values[at : at + steps] for at in range(0, len(values), steps)]


async def _run(plan: Plan, sessions: int, entered: "AsyncClient", tally: Tally, seconds: float) -> float:
    """Step for so many seconds; how many it were."""
    from rich.console import Console
    from rich.progress import Progress

    async with entered as client:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(plan.model, total=seconds)
            began = time.monotonic()
            plan = replace(plan, deadline=began + seconds)
            shown = asyncio.create_task(_show(progress, task, plan.deadline, tally))
            try:
                if plan.door is Door.HTTP:
                    await asyncio.gather(*(_drive(plan, client, None, n, tally) for n in range(sessions)))
                else:
                    await _over_sockets(plan, client, sessions, tally)
            finally:
                shown.cancel()
            return time.monotonic() - began


async def _over_sockets(plan: Plan, client: "AsyncClient", sessions: int, tally: Tally) -> None:
    """Each socket has its share of the sessions."""

    async def share(first: int) -> None:
        async with client.stream(plan.model) as stream:
            mine = range(first, sessions, _SOCKETS)
            await asyncio.gather(*(_drive(plan, client, stream, number, tally) for number in mine))

    await asyncio.gather(*(share(first) for first in range(min(sessions, _SOCKETS))))


async def _drive(plan: Plan, client: "AsyncClient", stream: "AsyncStream | None", number: int, tally: Tally) -> None:
    """Step one session after the other until the time is over; each ends in the end."""
    turn = 0
    while time.monotonic() < plan.deadline:
        name = f"load-{plan.run}-{number}-{turn}"
        x, want = plan.sequences[(number + turn) % len(plan.sequences)]
        turn += 1
        session = client.session(plan.model, name)
        step = session.step if stream is None else partial(stream.step, session=name)
        try:
            await _sequence(plan, step, x, want, tally)
            await session.end()
        except StepcastError as error:
            tally.failed += 1
            tally.last_error = f"{type(error).__name__}: {error}"
            await asyncio.sleep(0.1)  # a server that refuses everything is not flooded


async def _sequence(
    plan: Plan, step: Callable[[Any], Awaitable[Any]], x: "Floats", want: "Floats", tally: Tally
) -> None:
    for number, (row, right) in enumerate(zip(x, want, strict=True)):
        if number and time.monotonic() >= plan.deadline:  # one step makes the session that is ended then
            return
        began = time.perf_counter()
        answer = await step(row)
        tally.compare(answer.outputs, right, time.perf_counter() - began)


async def _show(progress: "Progress", task: "TaskID", deadline: float, tally: Tally) -> None:
    total = progress.tasks[task].total or 0.0
    while True:
        left = max(0.0, deadline - time.monotonic())
        progress.update(task, completed=total - left, description=f"{len(tally.taken_s)} steps, wrong = {tally.wrong}")
        await asyncio.sleep(0.25)
