"""Batch steps: a single step of many sessions of one example each, in one call."""

import time
from collections.abc import Callable, Sequence
from functools import partial

from stepcast.errors import StepcastError

from ..engine.repository import Repository, Served
from ..settings import Settings
from .cache import SessionCache
from .core import Address, Floats, Lane, Mask, Roster, Rows, Session, Waiter
from .lanes import Lanes
from .many import Columns, Many
from .roster import Rosters, roster_name

Ask = Callable[[Address, Floats, Mask | None, int | None, Waiter, str | None, Served | None], None]


class BatchSteps:
    """The batch steps of a server; `ask` queues a call behind those of its session."""

    few = 32  # batch steps of fewer sessions form no batch of their own, their steps join those of other calls

    def __init__(
        self, repository: Repository, cache: SessionCache, rosters: Rosters, lanes: Lanes, settings: Settings, ask: Ask
    ) -> None:
        self._repository, self._cache, self._rosters = repository, cache, rosters
        self._lanes, self._settings, self._ask = lanes, settings, ask

    def admit(self, served: Served, count: int) -> None:
        """Raises NotStreaming, QueueFull or Draining where a batch step of so many sessions would be refused."""
        self._lanes.admit(served, count)

    def step(
        self,
        namespace: str,
        model: str,
        sessions: bytes,
        names: Callable[[], list[str]],
        read: Callable[[int], Columns],
        address: Callable[[str], Address],
        then: Callable[[Many], None],
    ) -> None:
        """Queue a single step of many sessions of one example each.

        Args:
            sessions: Their list, as the request has it; the same bytes mean the same sessions.
            names: Reads it. read: Reads the columns of that many sessions, checked against the live version.
            address: The address of one of them; raises InvalidSessionId.
            then: Gets the answer, maybe before this returns.

        Raises ModelNotFound, NotStreaming, QueueFull, Draining, and what `names` and `read` raise: nothing was queued.
        """
        served, name = self._repository.live(model), roster_name(namespace, model, sessions)
        rosters = self._rosters.find(name)
        listed = [] if rosters else names()
        count = len(listed) or sum(len(roster.keys) for roster in rosters)
        self._lanes.admit(served, count)
        columns, lane = read(count), self._lanes.of(served)
        many = Many(count, served.manifest.n_outputs, then)
        if rosters and not columns.refused and self._step_rosters(lane, rosters, columns, many):
            return
        listed = listed or names()
        others = self._step_ready(lane, f"{namespace}/{model}/", listed, columns, many)
        if not others and not columns.refused and served.runtime.resident is None and self._rosters.came_before(name):
            many.form = partial(self._rosters.form, name, {}, count)
        for place in others:
            try:
                row, seq = columns.x[place : place + 1, None], None if columns.seqs is None else columns.seqs[place]
                self._ask(address(listed[place]), row, None, seq, many.waiter(place), None, columns.named)
            except StepcastError as error:
                many.refuse(place, error)
        for place, refusal in columns.refused.items():
            many.refuse(place, refusal)

    def _step_rosters(self, lane: Lane, rosters: list[Roster], columns: Columns, many: Many) -> bool:
        """Queue a batch step of rosters; False: nothing was done, their sessions have to be looked at."""
        if any(roster.lane is not lane for roster in rosters):
            return False
        if columns.seqs is not None and columns.seqs != [step for roster in rosters for step in roster.following]:
            return False
        start = 0
        for roster in rosters:
            end = start + len(roster.keys)
            roster.busy = True
            _submit(lane, roster.sessions, columns, many, range(start, end), roster)
            start = end
        return True

    def _step_ready(self, lane: Lane, prefix: str, names: list[str], columns: Columns, many: Many) -> Sequence[int]:
        """Queue the steps of sessions that are ready and idle; the places of the others."""
        everyone = range(len(names))
        if len(names) < self.few:  # they join those of other calls
            return [place for place in everyone if place not in columns.refused]
        get, seqs, refused = self._cache.get, columns.seqs, columns.refused
        others, places = [], []
        sessions: list[Session] = []
        for place in everyone:
            session = get(prefix + names[place])
            if session is not None and session.roster is not None:
                session.roster.split()
            if place in refused:
                continue
            if session is not None and not session.busy and session.lane is lane and session.examples == 1:
                seq = None if seqs is None else seqs[place]
                if seq is None or seq == session.step + 1:
                    session.busy = session.used = True
                    sessions.append(session)
                    places.append(place)
                    continue
            others.append(place)
        for start in range(0, len(sessions), self._settings.batch_rows):
            cut = slice(start, start + self._settings.batch_rows)
            there = everyone if len(sessions) == len(names) else places
            _submit(lane, sessions[cut], columns, many, there[cut], None)
        return others


def _submit(
    lane: Lane, sessions: list[Session], columns: Columns, many: Many, places: Sequence[int], roster: Roster | None
) -> None:
    """Queue a batch of sessions that are ready, at these places of a batch step."""
    at = slice(places.start, places.stop) if isinstance(places, range) else places  # a slice is no copy
    seqs: list[int | None] = [None] * len(places)
    if columns.seqs is not None:
        seqs = [columns.seqs[place] for place in places]
    batch, count = lane.closed(time.monotonic()), len(sessions)
    batch.steps = Rows(sessions, seqs=seqs, x=columns.x[at], many=many, places=places, roster=roster)
    batch.rows = count
    lane.load.waiting += count
    lane.batcher.submit(batch)
