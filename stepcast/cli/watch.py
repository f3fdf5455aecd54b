"""watch: a live plot in the terminal."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ..errors import SessionNotFound
from .connection import HERE, Key, Model, SessionId, Url, connected, manifest_of
from .readings import rows

if TYPE_CHECKING:
    from rich.table import Table

    from ..client import Session
    from ..manifest import Manifest

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_LINES: Final = 16
Values = Mapping[str, float]


def install(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Sessions of a server")(watch)


def watch(
    model: Model,
    session: SessionId,
    csv: Annotated[
        Path | None,
        typer.Option(help="Step the session by the rows of this CSV (-: standard input) and plot its outputs."),
    ] = None,
    rate: Annotated[float, typer.Option(min=0.01, help="Steps, or looks at the session, per second.")] = 5.0,
    seconds: Annotated[float, typer.Option(min=0, help="End after so long; 0: at the end of the CSV, or never.")] = 0,
    url: Url = HERE,
    key: Key = "",
) -> None:
    """Plot a session live: its outputs while it is stepped by a CSV, else its state as others step it."""
    from rich.live import Live

    with connected(url, key) as client:
        manifest = manifest_of(client, model)
        watched = client.session(model, session)
        points = _looked(watched, manifest) if csv is None else _stepped(watched, csv, manifest)
        end = time.monotonic() + seconds if seconds else None
        lines: dict[str, deque[float]] = {}
        with Live(refresh_per_second=min(rate, 20.0)) as live:
            for step, values in _paced(points, 1 / rate, end):
                for name, value in values.items():
                    lines.setdefault(name, deque(maxlen=200)).append(value)
                live.update(picture(f"{model}/{session} step {step}", lines, live.console.width))


def _stepped(session: "Session", csv: Path, manifest: "Manifest") -> Iterator[tuple[int, Values] | None]:
    for row in rows(csv, manifest):
        answer = session.step(row)
        yield answer.step, {o.name: float(v) for o, v in zip(manifest.outputs, answer.outputs, strict=True)}


def _looked(session: "Session", manifest: "Manifest") -> Iterator[tuple[int, Values] | None]:
    """The state after each step that is seen; None while there is nothing new."""
    seen = 0
    while True:
        try:
            step = int(session.info()["step"])
            held = session.get_state() if step != seen else None
        except SessionNotFound:
            held = None
        if held is None:
            yield None
            continue
        seen = held.step
        flat = {f"{t.layer}.{t.key}": held.state[t.layer][t.key].ravel().tolist() for t in manifest.states}
        yield seen, {f"{name}[{at}]": float(v) for name, values in flat.items() for at, v in enumerate(values)}


def _paced(
    points: Iterator[tuple[int, Values] | None], every_s: float, end: float | None
) -> Iterator[tuple[int, Values]]:
    """The points that are there, one each `every_s` at most, until the end."""
    due = time.monotonic()
    for point in points:
        if point is not None:
            yield point
        due = max(due + every_s, time.monotonic() - every_s)
        if end is not None and due > end:
            return
        time.sleep(max(0.0, due - time.monotonic()))


def picture(title: str, lines: Mapping[str, deque[float]], width: int) -> "Table":
    """A line of blocks for each name, the last values that fit; the first lines where there are many."""
    from rich.table import Table

    names = list(lines)[:_LINES]
    left_out = len(lines) - len(names)
    table = Table(
        title=title,
        caption=f"and {left_out} more" if left_out else None,
        box=None,
        show_header=False,
        min_width=len(title),
    )
    room = max(8, width - max((len(name) for name in names), default=0) - 16)
    for name in names:
        values = list(lines[name])
        table.add_row(name, blocks(values[-room:]), f"{values[-1]:.5g}")
    return table


def blocks(values: list[float]) -> str:
    """Values as blocks, the lowest as the lowest; a gap where there is none."""
    there = [value for value in values if value == value]
    low, high = (min(there), max(there)) if there else (0.0, 0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] if value == value else " " for value in values)
