"""Request ids: the caller's own if it names one, else one of ours; every answer has it, so that logs can be joined."""

import re
import secrets
from collections.abc import Callable
from itertools import count
from typing import Final

HEADER: Final = b"x-request-id"
_GOOD: Final = re.compile(rb"[\x21-\x7e]{1,128}")

PREFIX: Final = secrets.token_hex(6).encode()
"""Of the ids that this process makes; a number follows."""
next_number: Final[Callable[[], int]] = count(1).__next__
"""The number of the next id: no function of ours, for it is called at every step."""


def new_id() -> bytes:
    """A new id."""
    return b"%s-%x" % (PREFIX, next_number())


class RequestId(bytes):
    """An id that a caller gave."""


def given_id(value: bytes) -> RequestId | None:
    """The id in a header's value; None where it is longer than 128 characters or not of visible ASCII."""
    return RequestId(value) if _GOOD.fullmatch(value) else None
