"""Request ids: the caller's own if it names one, else one of ours; every answer has it, so that logs can be joined."""

import re
import secrets
from collections.abc import Callable
from itertools import count
from typing import Final

HEADER: Final = b"x-request-id"
_GOOD: Final = re.compile(rb"[\x21-\x7e]{1,128}")

new_id: Final[Callable[[], bytes]] = map(f"{secrets.token_hex(6)}-%x".encode().__mod__, count(1)).__next__
"""A new id: a random prefix of this process and a counter. No function of ours runs: it is made at every step."""


class RequestId(bytes):
    """An id that a caller gave."""


def given_id(value: bytes) -> RequestId | None:
    """The id in a header's value; None where it is longer than 128 characters or not of visible ASCII."""
    return RequestId(value) if _GOOD.fullmatch(value) else None
