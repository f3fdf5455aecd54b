"""The conversation on a socket as pure state machines: no I/O, no codec, no clock. Both ends use it.

The rules, which docs/protocol.md tells with examples:

- A client may keep many frames in flight. Steps of one session are applied in the order of their frames; steps of
  different sessions know no order.
- Any other operation on a session waits for all earlier frames of that session and holds the later ones back.
- The answers of one session come in the order of its frames. A marker is echoed when all that came before it on the
  socket is answered.
- A step has a number (`seq`), so that a client that lost its socket sends again what was not acknowledged, and gets
  the stored answer where the step had been applied.
"""

from collections import deque
from itertools import islice
from typing import Any, Final, Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")

MARKER: Final = "marker"
STEP: Final = "step"

IDLE_LANES: Final = 1024
"""Sessions without a frame in flight that a socket remembers; making them anew for every frame costs time."""

# --- the server's side ----------------------------------------------------------------------------------------------


class Ticket(Generic[Q, A]):
    """A frame on its way: `request` is what the server is asked, `answer` comes by ServerConversation.finish."""

    __slots__ = ("answer", "answered", "epoch", "lane", "request", "step")

    lane: "_Lane[Q, A]"
    epoch: "_Epoch[A]"
    """The conversation's own."""

    def __init__(self, request: Q, step: bool) -> None:
        self.request, self.step = request, step
        self.answer: A | None = None
        self.answered = False


class _Lane(Generic[Q, A]):
    """The frames of one session: all unanswered ones in order, and those of them that may not start yet."""

    __slots__ = ("alone", "held", "open", "running", "session")

    def __init__(self, session: str) -> None:
        self.session = session
        self.open: deque[Ticket[Q, A]] = deque()
        self.held: deque[Ticket[Q, A]] = deque()
        self.running = 0
        self.alone = False  # what runs is no step


class _Epoch(Generic[A]):
    """The frames between two markers: how many are unanswered, and the marker's echo once it came."""

    __slots__ = ("echo", "unanswered")

    def __init__(self) -> None:
        self.unanswered = 0
        self.echo: A | None = None


class ServerConversation(Generic[Q, A]):
    """The server's side of one socket.

    After every call take what is in `ready` (tickets to start, now) and `answers` (to be sent, in this order).

    Args:
        limit: Frames in flight at which the socket is not read any more.
    """

    def __init__(self, limit: int) -> None:
        self.ready: deque[Ticket[Q, A]] = deque()
        self.answers: list[A] = []
        self.in_flight = 0
        self.draining = False
        self._limit = limit
        self._lanes: dict[str, _Lane[Q, A]] = {}
        self._epochs: deque[_Epoch[A]] = deque([_Epoch()])

    @property
    def room(self) -> int:
        """How many frames may still come until reading must pause."""
        return self._limit - self.in_flight

    @property
    def close_due(self) -> bool:
        """Whether the socket is to be closed with 1012: the server drains, and all accepted frames are answered."""
        return self.draining and not self.in_flight

    def drain(self) -> None:
        """The server stops. What is accepted will be answered; the caller refuses what comes from now on."""
        self.draining = True

    def ask(self, session: str, request: Q, step: bool) -> None:
        """A frame came: a step, or an operation that waits for earlier frames of its session and holds later ones."""
        ticket: Ticket[Q, A] = Ticket(request, step)
        if self.begin(session, ticket):
            self.ready.append(ticket)

    def begin(self, session: str, ticket: Ticket[Q, A]) -> bool:
        """The same with a ticket that the caller made.

        Returns:
            Whether it starts now, which the caller sees to; if not, it will be in `ready` when its time has come.
        """
        lane = ticket.lane = self._lanes.get(session) or self._lane(session)
        epoch = ticket.epoch = self._epochs[-1]
        lane.open.append(ticket)
        epoch.unanswered += 1
        self.in_flight += 1
        if lane.held or lane.alone or (lane.running and not ticket.step):
            lane.held.append(ticket)
            return False
        lane.running += 1
        lane.alone = not ticket.step
        return True

    def refuse(self, session: str | None, answer: A) -> None:
        """A frame came whose answer is known already: it is given in its turn, at once where it names no session."""
        if session is None:
            self.answers.append(answer)
            return
        lane = self._lane(session)
        ticket: Ticket[Q, A] = Ticket(None, True)  # type: ignore[arg-type]  # never started: nobody asks for it
        ticket.lane, ticket.epoch = lane, self._epochs[-1]
        lane.open.append(ticket)
        ticket.epoch.unanswered += 1
        self.in_flight += 1
        ticket.answer, ticket.answered = answer, True
        self._answer(lane)

    def mark(self, echo: A) -> None:
        """A marker came; `echo` is its answer."""
        self._epochs[-1].echo = echo
        self._epochs.append(_Epoch())
        self.in_flight += 1
        self._echo()

    def finish(self, ticket: Ticket[Q, A], answer: A) -> None:
        """A started ticket has its answer."""
        lane = ticket.lane
        ticket.answer, ticket.answered = answer, True
        lane.running -= 1
        lane.alone = False
        self._answer(lane)
        if lane.held:
            self._release(lane)

    def end(self, ticket: Ticket[Q, A]) -> bool:
        """Take leave of a started ticket that nothing else of its session waits behind, nor any marker.

        Returns:
            Whether it was such a one: its answer is to be sent now, before any other. If not, `finish` it.
        """
        lane = ticket.lane
        if len(lane.open) > 1 or len(self._epochs) > 1:
            return False
        lane.open.clear()
        lane.running -= 1
        lane.alone = False
        ticket.epoch.unanswered -= 1
        self.in_flight -= 1
        if len(self._lanes) > IDLE_LANES:
            del self._lanes[lane.session]
        return True

    def _lane(self, session: str) -> _Lane[Q, A]:
        lane = self._lanes.get(session)
        if lane is None:
            lane = self._lanes[session] = _Lane(session)
        return lane

    def _release(self, lane: _Lane[Q, A]) -> None:
        """Start what may start: steps up to the next other operation, or that operation once nothing runs."""
        while lane.held and not lane.alone and (lane.held[0].step or not lane.running):
            ticket = lane.held.popleft()
            lane.running += 1
            lane.alone = not ticket.step
            self.ready.append(ticket)

    def _answer(self, lane: _Lane[Q, A]) -> None:
        """Give the answers whose turn it is."""
        tickets = lane.open
        while tickets and tickets[0].answered:
            ticket = tickets.popleft()
            self.answers.append(ticket.answer)  # type: ignore[arg-type]  # answered
            ticket.epoch.unanswered -= 1
            self.in_flight -= 1
        if not tickets and len(self._lanes) > IDLE_LANES:
            del self._lanes[lane.session]
        if len(self._epochs) > 1:
            self._echo()

    def _echo(self) -> None:
        epochs = self._epochs
        while not epochs[0].unanswered and len(epochs) > 1:
            self.answers.append(epochs.popleft().echo)  # type: ignore[arg-type]  # all but the last epoch have one
            self.in_flight -= 1


# --- the client's side ----------------------------------------------------------------------------------------------

WINDOW_STEPS: Final = 16
WINDOW_BYTES: Final = 64 * 1024
"""What the server keeps of a session's answers: with more in flight, a broken connection could not be resumed."""

_TEMPORARY: Final = frozenset({429, 503, 504})
_RESETS: Final = frozenset({"state.set", "clear", "rewind", "end"})
"""Operations that a session can go on from although an earlier step was refused."""


def _may_pass(problem: dict[str, Any]) -> bool:
    """Whether the same request may be taken later; a quota is used up until sessions are ended."""
    return problem.get("status") in _TEMPORARY and problem.get("code") != "quota_exceeded"


class Request:
    """What a caller asks of a session: an operation and its fields; once it is in `done`, an answer or a problem.

    Args:
        steps: By how many steps it advances the session; 0: it has no number.
        answer_bytes: Size of its outputs as the server keeps them; None: not known.
    """

    __slots__ = (
        "answer",
        "answer_bytes",
        "fields",
        "hidden",
        "id",
        "op",
        "problem",
        "seq",
        "session",
        "steps",
        "tries",
    )

    def __init__(
        self, session: str, op: str, fields: dict[str, Any], steps: int = 0, answer_bytes: int | None = None
    ) -> None:
        self.session, self.op, self.fields, self.steps, self.answer_bytes = session, op, fields, steps, answer_bytes
        self.id = self.tries = 0
        self.seq: int | None = None
        self.hidden = False
        self.answer: dict[str, Any] | None = None
        self.problem: dict[str, Any] | None = None

    @property
    def settled(self) -> bool:
        """Whether its answer or problem is known."""
        return self.answer is not None or self.problem is not None


class _Session:
    """The unanswered requests of a session in order; the first `in_flight` of them are on the open socket."""

    __slots__ = ("in_flight", "paused", "refused", "requests", "step")

    def __init__(self) -> None:
        self.step: int | None = None  # acknowledged; None: not known
        self.requests: deque[Request] = deque()
        self.in_flight = 0
        self.paused = False  # until `retry`
        self.refused = False  # a numbered request was: no new number before the older ones are answered


class ClientConversation:
    """The client's side, over any number of sockets one after another.

    After every call take what is in `outgoing` (frames to be sent, in this order), `done` (requests with their answer
    or problem; those of a session in order, each once) and `pauses` (sessions for which `retry` is due after s).

    A number, once given to a request, stays: the server applies it at most once, however often it is sent. Steps that
    wait behind a refused one are refused too, with step_conflict: they were meant for another state.

    Args:
        tries: How often a request is sent before a temporary problem (429, 503, 504) becomes the caller's.
    """

    def __init__(self, tries: int = 8) -> None:
        self.outgoing: deque[dict[str, Any]] = deque()
        self.done: list[Request] = []
        self.pauses: list[tuple[str, float]] = []
        self.connected = False
        self._tries = tries
        self._sessions: dict[str, _Session] = {}
        self._sent: dict[int, Request] = {}
        self._last_id = 0

    @property
    def unanswered(self) -> int:
        """Requests whose answer is not known."""
        return sum(len(session.requests) for session in self._sessions.values())

    def ask(self, request: Request) -> None:
        """Ask something of a session; a step is numbered when it is first sent."""
        session = self._sessions.setdefault(request.session, _Session())
        session.requests.append(request)
        self._send(session)

    def connect(self) -> None:
        """A socket is open: everything unanswered is sent, what was sent before with the same numbers."""
        self.connected = True
        for session in self._sessions.values():
            self._take_back(session)
            self._send(session)

    def lose(self) -> None:
        """The socket is gone: nothing is sent until the next one is open."""
        self.connected = False
        self.outgoing.clear()
        for session in self._sessions.values():
            self._take_back(session)

    def retry(self, name: str) -> None:
        """The pause of a session is over."""
        session = self._sessions.get(name)
        if session is not None:
            session.paused = False
            self._send(session)

    def receive(self, message: dict[str, Any]) -> None:
        """A message came. One that answers nothing that is waited for is ignored: it is an old one."""
        request = self._sent.pop(message.get("id") or 0, None)
        if request is None:
            return
        request.problem = message.get("error")
        request.answer = message if request.problem is None else None
        session = self._sessions[request.session]
        self._settle(session)
        self._send(session)

    def fail(self, problem: dict[str, Any]) -> None:
        """Give up: `problem` is what becomes of every unanswered request."""
        for session in self._sessions.values():
            self._take_back(session)
            for request in session.requests:
                request.problem = request.problem or problem
                if not request.hidden:
                    self.done.append(request)
        self._sessions.clear()

    # --- sending ------------------------------------------------------------------------------------------------

    def _send(self, session: _Session) -> None:
        requests = session.requests
        if requests and requests[0].seq is None:
            session.refused = False
        while self._may_send(session):
            request = requests[session.in_flight]
            if request.steps and session.step is None:
                request = Request(request.session, "info", {})  # to know the number of the first step
                request.hidden = True
                requests.appendleft(request)
            self.outgoing.append(self._frame(session, request))
            session.in_flight += 1

    def _may_send(self, session: _Session) -> bool:
        ahead = list(islice(session.requests, session.in_flight + 1))
        if not self.connected or session.paused or len(ahead) <= session.in_flight:
            return False
        request = ahead[-1]
        if request.settled or (session.refused and request.steps and request.seq is None):
            return False
        if not session.in_flight:
            return True
        sizes = [r.answer_bytes for r in ahead if r.op == STEP and r.answer_bytes is not None]
        return len(sizes) == len(ahead) <= WINDOW_STEPS and sum(sizes) <= WINDOW_BYTES

    def _frame(self, session: _Session, request: Request) -> dict[str, Any]:
        self._last_id += 1
        request.id = self._last_id
        request.tries += 1
        self._sent[request.id] = request
        frame = {"id": request.id, "session": request.session, "op": request.op, **request.fields}
        if request.steps and request.seq is None:
            before = sum(r.steps for r in islice(session.requests, session.in_flight))
            request.seq = (session.step or 0) + before + request.steps
        if request.seq is not None:
            frame["seq"] = request.seq
        return frame

    def _take_back(self, session: _Session) -> None:
        """What is in flight is to be sent again; answers that still come to it are not looked at."""
        for request in islice(session.requests, session.in_flight):
            self._sent.pop(request.id, None)
            request.answer = request.problem = None
        session.in_flight = 0

    # --- answers ------------------------------------------------------------------------------------------------

    def _settle(self, session: _Session) -> None:
        """Give the caller what is known of the oldest requests, in order."""
        requests = session.requests
        while requests and requests[0].settled:
            request = requests[0]
            if request.problem is None:
                session.step = (request.answer or {}).get("step", session.step)
            elif self._is_temporary(request):
                self._pause(session, request)
                return
            else:
                self._refuse(session, request)
            requests.popleft()
            session.in_flight = max(0, session.in_flight - 1)
            if request.op == "end" and request.problem is None:
                session.step = None
            if not request.hidden:
                self.done.append(request)

    def _is_temporary(self, request: Request) -> bool:
        return 0 < request.tries < self._tries and _may_pass(request.problem or {})

    def _pause(self, session: _Session, request: Request) -> None:
        """Send the oldest request, and what is behind it, again after a while: what the server asks for, doubling."""
        wait_s = float((request.problem or {}).get("retry_after_s") or 0.05)
        self.pauses.append((request.session, min(5.0, wait_s * 2 ** (request.tries - 1))))
        session.paused = True
        self._take_back(session)

    def _refuse(self, session: _Session, request: Request) -> None:
        problem = request.problem or {}
        code = problem.get("code")
        if code == "session_not_found" and (request.hidden or (request.op == "end" and request.tries > 1)):
            request.problem, session.step = None, 0  # a new session; or it was ended, and only that answer was lost
        elif request.steps or request.hidden:
            expected = problem.get("expected_seq")
            session.step = expected - 1 if isinstance(expected, int) else session.step
            session.refused = True
            self._refuse_behind(session, problem if request.hidden else _behind(request))

    def _refuse_behind(self, session: _Session, problem: dict[str, Any]) -> None:
        """Refuse the steps behind a refused one that were not sent, up to an operation that makes a new start."""
        for request in islice(session.requests, 1, None):
            if request.op in _RESETS:
                return
            if request.steps and request.seq is None:
                request.problem = problem


def _behind(refused: Request) -> dict[str, Any]:
    problem = refused.problem or {}
    detail = f"a step of session {refused.session!r} before this one was refused ({problem.get('code')}); not sent"
    return {"code": "step_conflict", "status": 409, "detail": detail, "session": refused.session}
