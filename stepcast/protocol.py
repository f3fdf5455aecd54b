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
from typing import Final, Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")

MARKER: Final = "marker"
STEP: Final = "step"

# --- the server's side ----------------------------------------------------------------------------------------------


class Ticket(Generic[Q, A]):
    """A frame on its way: `request` is what the server is asked, `answer` comes by ServerConversation.finish."""

    __slots__ = ("answer", "answered", "epoch", "lane", "request", "step")

    def __init__(self, request: Q, step: bool, lane: "_Lane[Q, A]", epoch: "_Epoch[A]") -> None:
        self.request, self.step, self.lane, self.epoch = request, step, lane, epoch
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
    def full(self) -> bool:
        """Whether reading must pause."""
        return self.in_flight >= self._limit

    @property
    def close_due(self) -> bool:
        """Whether the socket is to be closed with 1012: the server drains, and all accepted frames are answered."""
        return self.draining and not self.in_flight

    def drain(self) -> None:
        """The server stops. What is accepted will be answered; the caller refuses what comes from now on."""
        self.draining = True

    def ask(self, session: str, request: Q, step: bool) -> None:
        """A frame came: a step, or an operation that waits for earlier frames of its session and holds later ones."""
        lane = self._lane(session)
        ticket = self._accept(lane, request, step)
        if lane.held or lane.alone or (lane.running and not step):
            lane.held.append(ticket)
        else:
            self._start(lane, ticket)

    def refuse(self, session: str | None, answer: A) -> None:
        """A frame came whose answer is known already: it is given in its turn, at once where it names no session."""
        if session is None:
            self.answers.append(answer)
            return
        lane = self._lane(session)
        ticket = self._accept(lane, None, True)  # type: ignore[arg-type]  # never started: nobody asks for it
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

    def _lane(self, session: str) -> _Lane[Q, A]:
        lane = self._lanes.get(session)
        if lane is None:
            lane = self._lanes[session] = _Lane(session)
        return lane

    def _accept(self, lane: _Lane[Q, A], request: Q, step: bool) -> Ticket[Q, A]:
        epoch = self._epochs[-1]
        ticket = Ticket(request, step, lane, epoch)
        lane.open.append(ticket)
        epoch.unanswered += 1
        self.in_flight += 1
        return ticket

    def _start(self, lane: _Lane[Q, A], ticket: Ticket[Q, A]) -> None:
        lane.running += 1
        lane.alone = not ticket.step
        self.ready.append(ticket)

    def _release(self, lane: _Lane[Q, A]) -> None:
        """Start what may start: steps up to the next other operation, or that operation once nothing runs."""
        while lane.held and not lane.alone and (lane.held[0].step or not lane.running):
            self._start(lane, lane.held.popleft())

    def _answer(self, lane: _Lane[Q, A]) -> None:
        """Give the answers whose turn it is."""
        tickets = lane.open
        while tickets and tickets[0].answered:
            ticket = tickets.popleft()
            self.answers.append(ticket.answer)  # type: ignore[arg-type]  # answered
            ticket.epoch.unanswered -= 1
            self.in_flight -= 1
        if not tickets:
            del self._lanes[lane.session]
        if len(self._epochs) > 1:
            self._echo()

    def _echo(self) -> None:
        epochs = self._epochs
        while not epochs[0].unanswered and len(epochs) > 1:
            self.answers.append(epochs.popleft().echo)  # type: ignore[arg-type]  # all but the last epoch have one
            self.in_flight -= 1
