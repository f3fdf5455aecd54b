"""The demo: train on real weather, serve the model, replay November 2013 hour by hour through one session.

The three airports of New York are the three examples of one session. Every hour's readings go over a WebSocket with the
SDK; what comes back is the forecast of the next hour, shown beside the truth. At the end a rollout forecasts the day
after the month, from its moment alone, and the server stays up.

    python demo/replay.py               trains first (a minute); later runs take the trained model
    python demo/replay.py --committed   takes the model that the repository carries
"""

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stepcast.client import Client  # noqa: E402
from stepcast.errors import SessionNotFound  # noqa: E402
from stepcast.stream import Stream  # noqa: E402
from training.config import load  # noqa: E402
from training.data.table import TableSource  # noqa: E402

RECIPE = ROOT / "training" / "recipes" / "weather.yaml"
OWN = ROOT / ".cache" / "demo"
SESSION = "new-york"
MONTH = np.datetime64("2013-11-01T00", "h")
WARM_UP_HOURS = 168
WIDTH = 100
REFRESH_S = 0.05
AHEAD_HOURS = (1, 6, 12, 24)

Floats = npt.NDArray[np.float32]


@dataclass
class Month:
    """The readings to replay, S airports, L hours; `truth` and `persistence` (S, L, O) are of the hour after."""

    airports: tuple[str, ...]
    hours: npt.NDArray[np.datetime64]
    inputs: Floats
    present: npt.NDArray[np.bool_]
    truth: Floats
    persistence: Floats
    targets: tuple[str, ...]
    units: tuple[str, ...]

    @property
    def next_hour(self) -> str:
        """The moment after the last of the hours, in ISO 8601."""
        return f"{self.hours[-1] + np.timedelta64(1, 'h')}:00Z"


@dataclass
class Score:
    """Squared errors of the hours so far, by target."""

    forecast: list[Floats] = field(default_factory=list)
    persistence: list[Floats] = field(default_factory=list)

    def add(self, forecast: Floats, persistence: Floats, truth: Floats) -> None:
        """Take an hour, (S, O) each; hours without a truth are not measured."""
        self.forecast.append((forecast - truth) ** 2)
        self.persistence.append((persistence - truth) ** 2)

    def rmse(self) -> tuple[Floats, Floats]:
        """Root mean square errors (O,) of the forecast and of persistence, over the same hours."""
        forecast, persistence = np.stack(self.forecast), np.stack(self.persistence)
        measured = np.isfinite(forecast) & np.isfinite(persistence)
        ours, theirs = (
            np.sqrt(np.mean(e, axis=(0, 1), where=measured), dtype=np.float32) for e in (forecast, persistence)
        )
        return ours, theirs


# --- the data and the model -----------------------------------------------------------------------------------------


def read_month(days: int) -> Month:
    """November, with the week before it to warm up."""
    config = load(RECIPE, [])
    source = config.data.open(batch=1, seed=0, root=RECIPE.parent)
    assert isinstance(source, TableSource)
    times = source.times.tz_localize(None).to_numpy().astype("datetime64[h]")
    start = int(np.searchsorted(times, MONTH))
    cut = slice(start - WARM_UP_HOURS, start + 24 * days)
    columns = [[feature.name for feature in source.features].index(name) for name in source.targets]
    observed = np.where(source.grid.present[..., None], source.x[..., columns], np.nan)
    return Month(
        airports=source.series,
        hours=times[cut],
        inputs=source.x[:, cut],
        present=source.grid.present[:, cut],
        truth=source.y[:, cut, : len(columns)],  # of the first horizon
        persistence=last_observed(observed)[:, cut],
        targets=source.targets,
        units=tuple(output.unit for output in source.outputs[: len(columns)]),
    )


def last_observed(values: Floats) -> Floats:
    """Each hour's last reading (S, L, C): its own, or the last one before it."""
    hours = np.arange(values.shape[1])[None, :, None]
    at = np.maximum.accumulate(np.where(np.isfinite(values), hours, 0), axis=1)
    return np.take_along_axis(values, at, axis=1)


def models_directory(committed: bool) -> Path:
    """Where the model is; trains one where there is none yet."""
    if committed:
        return ROOT / "models"
    models = OWN / "models"
    if not (models / "weather").is_dir():
        command = ["-m", "training", "train", str(RECIPE), "--out", str(models), "--runs", str(OWN / "runs")]
        command += ["--set", "training.calibrate=null"]  # nine further trainings, for widths that nobody sees here
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return models


# --- the server -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(models: Path, port: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The server as a child process; its URL. It is stopped at the end of the block."""
    OWN.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "service", "serve", "--models", str(models), "--port", str(port)]
    command += ["--store", f"sqlite:///{OWN / 'sessions.db'}"]
    with open(OWN / "server.log", "w") as log:
        # a group of its own, so that Ctrl-C reaches the server only through us
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit(f"the server did not start; see {OWN / 'server.log'}")
        yield line[line.index("http://") :].strip(), process
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def port_or_any(port: int) -> int:
    """The port if it is free, else 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return 0
    return port


# --- the replay -----------------------------------------------------------------------------------------------------


def replay(url: str, month: Month, console: Console, seconds: float) -> Score:
    """Step through the month; live in a terminal, quietly elsewhere."""
    score = Score()
    with Client(url) as client:
        with contextlib.suppress(SessionNotFound):
            client.session("weather", SESSION).end()
        with client.session("weather", SESSION).stream() as stream, shown(console) as show:
            for hour, forecast in forecasts(stream, month):
                score.add(forecast, month.persistence[:, hour], month.truth[:, hour])
                if console.is_terminal:
                    show(hour_table(month, hour, forecast))
                    time.sleep(seconds / len(month.hours))
        console.print(hour_table(month, hour, forecast))
    return score


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Callable[[Group], None]]:
    """A place in the terminal for what is live; a few pictures a second are enough."""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        shown_at = 0.0

        def show(picture: Group) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at > REFRESH_S:
                live.update(picture, refresh=True)
                shown_at = time.monotonic()

        yield show


def forecasts(stream: Stream, month: Month) -> Iterator[tuple[int, Floats]]:
    """The warm-up in one call, then hour by hour: the hour's index, and the forecast (S, O) of the hour after it."""
    stream.step(month.inputs[:, :WARM_UP_HOURS], mask=month.present[:, :WARM_UP_HOURS])
    for hour in range(WARM_UP_HOURS, len(month.hours)):
        answer = stream.step(month.inputs[:, hour], mask=month.present[:, hour])
        yield hour, answer.outputs[:, : len(month.targets)]  # behind them are quantiles, if the model has any


def hour_table(month: Month, hour: int, forecast: Floats) -> Group:
    """One hour's forecast against what came."""
    when = month.hours[hour] + np.timedelta64(1, "h")
    table = Table(title=f"{str(when).replace('T', ' ')}:00 UTC  forecast / truth", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("airport")
    for name, unit in zip(month.targets, month.units, strict=True):
        table.add_column(f"{name}\n{unit}", justify="right")
    for row, airport in enumerate(month.airports):
        cells = [f"{number(f)} / {number(t)}" for f, t in zip(forecast[row], month.truth[row, hour], strict=True)]
        table.add_row(airport, *cells)
    done = (hour + 1 - WARM_UP_HOURS) / (len(month.hours) - WARM_UP_HOURS)
    bar = "━" * round(40 * done)
    steps = hour + 1
    return Group(table, Text(f"{bar:<40} step {steps} of {SESSION!r}"))


def day_ahead(url: str, month: Month) -> Table:
    """The day behind the month: a rollout that is told when it begins, and knows the hours and the season from that."""
    with Client(url) as client:
        forecast = client.session("weather", SESSION).rollout(max(AHEAD_HOURS), {"time": month.next_hour}).outputs
    name, unit = month.targets[0], month.units[0]
    table = Table(title=f"a day from {month.next_hour}: {name} {unit}", box=SIMPLE_HEAD)
    table.add_column("airport")
    for hours in AHEAD_HOURS:
        table.add_column(f"+{hours} h", justify="right")
    for airport, row in zip(month.airports, forecast[name], strict=True):
        table.add_row(airport, *(number(row[hours - 1]) for hours in AHEAD_HOURS))
    return table


def number(value: Any) -> str:
    """A reading, a dash where there is none."""
    return f"{value:.1f}" if np.isfinite(value) else "-"


def skill_table(month: Month, score: Score) -> Table:
    """Forecast against truth over the whole replay, beside persistence."""
    ours, theirs = score.rmse()
    table = Table(
        title=f"{len(score.forecast)} hours, {len(month.airports)} airports: next hour's forecast", box=SIMPLE_HEAD
    )
    for name in ("target", "RMSE, forecast", "RMSE, persistence", "ratio", "skill"):
        table.add_column(name, justify="left" if name == "target" else "right")
    ratios = ours / theirs
    for i, (name, unit) in enumerate(zip(month.targets, month.units, strict=True)):
        cells = [f"{ours[i]:.3f}", f"{theirs[i]:.3f}", f"{ratios[i]:.3f}", f"{1 - ratios[i]:.1%}"]
        table.add_row(f"{name} ({unit})", *cells)
    table.add_row("average", "", "", f"{ratios.mean():.3f}", f"{1 - ratios.mean():.1%}")
    return table


# --- the command ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the demo; Ctrl-C ends it cleanly at any moment."""
    parser = argparse.ArgumentParser(description="Forecast New York's weather hour by hour.")
    parser.add_argument("--committed", action="store_true", help="take the committed model, do not train")
    parser.add_argument("--days", type=int, default=30, choices=range(1, 31), metavar="1..30", help="default: 30")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long the replay takes in a terminal")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000, or a free one where that is taken")
    parser.add_argument("--exit", action="store_true", help="end after the replay instead of leaving the server up")
    arguments = parser.parse_args(argv)
    for ending in (signal.SIGTERM, signal.SIGHUP):  # whatever ends us, the server is stopped, too
        signal.signal(ending, signal.default_int_handler)
    try:
        run(arguments, Console(width=None if sys.stdout.isatty() else WIDTH))
    except KeyboardInterrupt:
        print("\nstopped")
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Train if need be, serve, replay, and stay."""
    models = models_directory(arguments.committed)
    month = read_month(arguments.days)
    with serving(models, port_or_any(arguments.port)) as (url, server):
        score = replay(url, month, console, arguments.seconds)
        console.print(skill_table(month, score))
        console.print(day_ahead(url, month))
        if arguments.exit:
            return
        session = f"{url}/v1/models/weather/sessions/{SESSION}"
        console.print(
            f"The server stays up: [link={url}/docs]{url}/docs[/link]. Ctrl-C ends it. The session goes on, try:"
        )
        console.print(f"  curl -s {session}", f"  curl -s {session}/state", sep="\n", soft_wrap=True)
        server.wait()


if __name__ == "__main__":
    raise SystemExit(main())
