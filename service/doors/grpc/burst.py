"""Requests that come together are handed on together, so that their steps share a run."""

import asyncio
from typing import Final

from ..oip.infer import Inference, Inferred, Pending, Reply
from ..oip.requests import Request
from ..steps import Way

MOST: Final = 256
"""Requests that are handed on at the latest."""


class Burst:
    """Requests of all calls, until a turn of the event loop brings no other one.

    gRPC reads one message of a stream per turn. Were each handed on at once, it would start a run of its own, and 16
    requests in flight on a stream took two to three times the processor time. A lone request waits for one idle turn.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._waiting: list[tuple[Way, Request, Reply]] = []
        self._seen = 0

    def take(self, way: Way, request: Request, reply: Reply) -> None:
        """Take a request; all that comes of it, the reply hears."""
        waiting = self._waiting
        waiting.append((way, request, reply))
        if len(waiting) == 1:
            self._seen = 0
            asyncio.get_running_loop().call_soon(self._look)

    async def infer(self, way: Way, request: Request) -> Inferred:
        """The answer to a request; raises what it is refused with. One that is cancelled before its run is dropped."""
        pending = Pending()
        self.take(way, request, pending)
        return await pending.future

    def _look(self) -> None:
        """Hand on what waits, unless more of it came since the last look."""
        waiting = self._waiting
        if self._seen < len(waiting) < MOST:
            self._seen = len(waiting)
            asyncio.get_running_loop().call_soon(self._look)
            return
        self._waiting = []
        for each in waiting:
            self._inference.take(*each)
