"""A run from its tables to its output: read a chunk, step it, write it, and now and then a checkpoint."""

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from stepcast.errors import ConfigError, InvalidRequest
from stepcast.features import FeatureNames

from ..engine.arrays import Floats
from ..engine.repository import Served
from ..sessions.edits import SESSION_ID, check_id
from ..sessions.lanes import check_streams
from ..settings import Settings
from . import files
from .files import Table
from .landing import Landing
from .layout import Layout, Wanted, layout_of
from .order import Segments, check_moments, grid_us
from .output import Shape, Spool
from .rows import RowReader, Rows
from .runs import Runner, Turns
from .scratch import Reached, Scratch
from .states import BEFORE, States

FOLDER: Final = ".unfinished"
ROWS: Final = "rows"
MOST_TOLD: Final = 10
_CHUNK_BYTES: Final = 2**26
_CHUNK_ROWS: Final = 2**18
_SHARE: Final = 0.05
"""Of the time that checkpoints may take."""

Tell = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        session: What all rows are of, if the tables have no key.
        any_time: Rows may lie off the grid of the model's steps.
        store: Whether final states go to the store of the settings.
        goes_on: Sessions that the store has go on from there.
        chunk_rows: Rows that are stepped together; 0: by their size.
        state_bytes: Memory for states; the rest lies on the disk.
        checkpoint_s: Time between checkpoints, at least.
        skip: Leave out rows that cannot be stepped, instead of ending there.
    """

    data: Path
    out: Path
    wanted: Wanted = field(default_factory=Wanted)
    session: str = "all"
    namespace: str = "default"
    prefix: str = ""
    any_time: bool = False
    store: bool = False
    goes_on: bool = False
    force: bool = False
    skip: bool = False
    chunk_rows: int = 0
    state_bytes: int = 2**30
    checkpoint_s: float = 15.0


@dataclass
class Result:
    """What was done.

    Attributes:
        skipped: Rows that were left out; `told`: what is wrong with the first ones.
        kept: Sessions that others have changed in the store during the run: they stay as they are there.
    """

    rows: int = 0
    skipped: int = 0
    told: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


class Work:
    """One run; `run` may be called once.

    Raises:
        ConfigError: the plan does not fit the tables, the model or what lies where the output is to be.
        NotStreaming, InvalidSessionId.
    """

    def __init__(self, plan: Plan, served: Served, settings: Settings) -> None:
        check_streams(served)
        check_id(plan.session)
        self.plan, self._served, self._settings = plan, served, settings
        self._paths = files.find(plan.data)
        self._names = FeatureNames(served.manifest)
        header = files.header(self._paths[0])
        self.layout: Layout = layout_of(served.manifest, self._names, self._paths[0], header, plan.wanted)
        self._shape = Shape(self._names, self.layout.carried, plan.prefix)
        self._chunk_rows = plan.chunk_rows or max(256, min(_CHUNK_ROWS, _CHUNK_BYTES // served.input_bytes))
        self._every_us = grid_us(served.manifest, self.layout, plan.any_time)
        allowed = SESSION_ID.fullmatch if plan.store else bool
        self._reader = RowReader(served.manifest, self._names, self.layout, plan.session, allowed)
        self._runner = Runner(served.runtime, settings.batch_rows)
        self._result = Result()

    def run(self, tell: Tell) -> Result:
        """Do it, or finish what was begun; `tell` hears how many rows are done, and of about how many."""
        folder = self._folder()
        with ExitStack() as stack:
            scratch = Scratch(folder / "progress.db", self._described(), secrets.token_bytes(16))
            stack.callback(scratch.close)
            landing = self._landing(scratch.nonce)
            if landing is not None:
                stack.callback(landing.close)
            reached = scratch.reached()
            if reached.spooled and not (folder / ROWS).exists():  # it was killed when all was done
                shutil.rmtree(folder)
                return Result(reached.rows, reached.skipped)
            spool = Spool(folder / ROWS, self.plan.out, reached.spooled)
            stack.callback(spool.close)
            begun = landing.begun if landing else (lambda _: [])
            states = States(scratch, self._served.runtime.initial(1), begun, self.plan.state_bytes)
            self._result.skipped = reached.skipped
            reached = self._through(states, spool, reached, tell)
            if not reached.rows:
                raise ConfigError(f"{self.plan.data}: no row")
            if landing is not None:
                self._save(states, spool, reached)
                self._result.kept = landing.land(scratch.everyone())
            spool.finish()
            self._result.rows = reached.rows
        shutil.rmtree(folder)
        return self._result

    def _folder(self) -> Path:
        """Where an unfinished run keeps what it knows."""
        plan = self.plan
        folder = plan.out.with_name(plan.out.name + FOLDER)
        if plan.force:
            shutil.rmtree(folder, ignore_errors=True)
        elif plan.out.exists() and not folder.exists():
            raise ConfigError(f"{plan.out}: is there already. Write over it by --force.")
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be made ({error.strerror})") from error
        return folder

    def _described(self) -> str:
        """What has to be the same when a run goes on."""
        plan, stats = asdict(self.plan), [(str(path), path.stat()) for path in self._paths]
        for free in ("force", "skip", "state_bytes", "checkpoint_s"):
            del plan[free]
        said = {
            "plan": plan,
            "model": [self._served.name, self._served.version, self._served.fingerprint.hex()],
            "store": self._settings.store if self.plan.store else None,
            "rows": [self._chunk_rows, self._settings.batch_rows, self._served.runtime.device],
            "files": [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
        }
        return json.dumps(said, sort_keys=True, default=str)

    def _landing(self, nonce: bytes) -> Landing | None:
        plan = self.plan
        if not plan.store:
            return None
        return Landing(self._settings, self._served, plan.namespace, nonce, plan.goes_on)

    def _through(self, states: States, spool: Spool, reached: Reached, tell: Tell) -> Reached:
        """Step all rows from where the run is; who mends what ends it goes on from there."""
        saved, pause_s, sound = time.monotonic(), self.plan.checkpoint_s, True
        read = files.chunks(self._paths, self.layout.columns, reached.position, self._chunk_rows)
        try:
            for rows in _ahead(self._reader.read(chunk) for chunk in read):
                segments = self._in_turn(rows, states, reached)
                sound = False
                table = self._stepped(rows, segments, states)
                spooled = spool.append(table)
                reached = Reached(rows.chunk.end, spooled, reached.rows + table.num_rows, self._result.skipped)
                sound = True
                tell(reached.rows, round(reached.rows / rows.chunk.share) if rows.chunk.share else None)
                if time.monotonic() - saved >= pause_s:
                    started = time.monotonic()
                    self._save(states, spool, reached)
                    saved = time.monotonic()
                    pause_s = max(self.plan.checkpoint_s, (saved - started) / _SHARE)
        except BaseException:
            if sound:
                self._save(states, spool, reached)
            raise
        return reached

    def _save(self, states: States, spool: Spool, reached: Reached) -> None:
        spool.keep()
        states.checkpoint(reached)

    def _in_turn(self, rows: Rows, states: States, reached: Reached) -> Segments:
        """The rows of a chunk by session, which are in memory from now on; nothing else changes."""
        self._refuse(rows)
        segments = Segments.of(rows)
        segments.slots[:] = states.ready([rows.keys[place] for place in segments.whose], reached)
        check_moments(rows, segments, states.moment[segments.slots], self._every_us)
        if not self._refuse(rows):
            return segments
        good = Segments.of(rows)
        good.slots[:] = segments.slots[np.searchsorted(segments.whose, good.whose)]
        return good

    def _stepped(self, rows: Rows, segments: Segments, states: States) -> Table:
        """Step a chunk: its part of the output. If this raises, states mean nothing any more."""
        outputs = self._run(rows, segments, states)
        self._refuse(rows)
        numbers, slots = np.zeros(len(rows.x), np.int64), segments.slots
        if len(segments.rows):
            made = ~rows.faults.bad[segments.rows]
            before = np.repeat(states.step[slots], segments.sizes)
            numbers[segments.rows] = np.where(made, before + segments.ranks(made), 0)
            self._note_last(rows, segments, made, states)
            counts = segments.sums(made)
            states.step[slots] += counts
            states.changed(slots[counts > 0])
        self._result.skipped += len(rows.faults)
        return self._shape.table(rows.carried, numbers, outputs)

    def _run(self, rows: Rows, segments: Segments, states: States) -> Floats:
        """Outputs (R, O) of all rows, NaN where there are none; notes what fails."""
        there = np.ones(len(segments.rows), np.bool_) if rows.present is None else rows.present[segments.rows]
        if not there.any():
            return np.full((len(rows.x), self._served.manifest.n_outputs), np.nan, np.float32)
        counts = segments.sums(there)
        turns = Turns(segments.rows[there], np.cumsum(counts) - counts, counts)
        outputs, failed = self._runner.run(rows.x, turns, states.state, segments.slots)
        says = "the model's outputs or its state would not be finite"
        rows.faults.add(failed, lambda row: f"{rows.chunk.line(row)}: {says}")
        return outputs

    def _note_last(self, rows: Rows, segments: Segments, made: npt.NDArray[np.bool_], states: States) -> None:
        """The sessions' last moments."""
        if rows.moments is None:
            return
        reached = np.where(made, rows.moments[segments.rows], BEFORE)
        latest = np.maximum.reduceat(reached, segments.starts)  # they ascend
        states.moment[segments.slots] = np.maximum(states.moment[segments.slots], latest)

    def _refuse(self, rows: Rows) -> bool:
        """Whether rows have faults, which are told.

        Raises:
            InvalidRequest: rows with faults are not to be left out.
        """
        faults, told = rows.faults, self._result.told
        if not len(faults):
            return False
        for _, text in faults.first():
            if not self.plan.skip:
                raise InvalidRequest(f"{text}. Mend the row, or leave such rows out by --skip-bad-rows.")
            if text not in told and len(told) < MOST_TOLD:
                told.append(text)
        return True


def _ahead(rows: Iterator[Rows]) -> Iterator[Rows]:
    """The same; the next one is read by a thread meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="stepcast-read") as pool:
        coming = pool.submit(next, rows, None)
        while (here := coming.result()) is not None:
            coming = pool.submit(next, rows, None)
            yield here
