"""Steps that a source gives: where they came from is committed with the state, so none is taken twice."""

from typing import TYPE_CHECKING

from stepcast.errors import SourceConflict

from ..records.block import Letter, Outbox
from ..records.layout import POSITION, source_of

if TYPE_CHECKING:
    from .core import Address, Answers, Group


class Feed:
    """The waiter (core.Waiter) of a step that came from a source.

    Attributes:
        position: Where it came from, as a record keeps it (layout.POSITION).
        outbox: Where the store tells of the step in the operation that commits it; None: it does not.
    """

    __slots__ = ("outbox", "position")
    creates = True

    def __init__(self, position: bytes, outbox: Outbox | None) -> None:
        self.position, self.outbox = position, outbox

    def stepped(self, answers: "Answers", row: int, step: int) -> None:
        """The session is at `step` now: row `row` of the answers."""
        raise NotImplementedError

    def redelivered(self, answers: "Answers | None", step: int) -> None:
        """The record has taken it in before; nothing was done.

        `step` is what it became and `answers` its kept answer (None: no longer kept); `step` 0: a later position was
        taken in since.
        """
        raise NotImplementedError

    def refused(self, error: BaseException) -> None:
        """The step was not made, or it is unknown whether it was."""
        raise NotImplementedError

    def done(self) -> bool:
        """Whether nobody waits any more."""
        return False

    def letter(self, answers: "Answers", row: int, step: int) -> Letter:
        """What the store tells of the step, as `outbox` says; must not raise."""
        raise NotImplementedError


def address_letters(group: "Group") -> None:
    """Let the store tell of a source's steps together with their records, if their outbox asks for it."""
    feeds, taken = group.rows.feeds(), group.block.advance.steps
    if feeds[0].outbox is not None:
        group.block.outbox = feeds[0].outbox
        steps = [session.step + taken for session in group.rows.sessions]
        group.block.letters = [
            feed.letter(group.answers, row, step) for row, (feed, step) in enumerate(zip(feeds, steps, strict=True))
        ]


def is_next(record: bytes, position: bytes) -> bool:
    """Whether a position is behind that of a record, which is of the same source or has none yet."""
    found = source_of(record)
    if found is None:
        return True
    name, first, second = POSITION.unpack(position)
    return found[0] == name and (first, second) > found[1:3]


def step_there(record: bytes, position: bytes, address: "Address") -> int:
    """The step that a position became which is not the next, 0 where a later one has been taken in.

    Raises SourceConflict: the record's position is of another source.
    """
    name, first, second = POSITION.unpack(position)
    found = source_of(record)
    if found is None or found[0] != name:
        raise SourceConflict(
            f"session {address.session!r} is fed from another source. End it, or feed a fork of it.",
            session=address.session,
        )
    return found[3] if (first, second) == found[1:3] else 0
