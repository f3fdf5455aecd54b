"""Who calls, and how errors reach them: keys in the metadata, a status code, and the problem behind it."""

from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import unquote

import grpc

from stepcast.errors import StepcastError

from ...telemetry import Metrics
from ..answers import encode
from ..bodies import JSON
from ..keys import ANYBODY, Keys, Principal
from ..oip.errors import failure

PROBLEM: Final = "stepcast-problem-bin"
"""Trailing metadata of an error: its problem document as JSON."""
PUSHBACK: Final = "grpc-retry-pushback-ms"
"""Trailing metadata that clients with a retry policy heed: when to try again."""
LONGEST_PROBLEM: Final = 4096
"""Clients refuse metadata beyond 8 KiB; a longer document is left out."""
KNOWN_CALLERS: Final = 1024

_HEEDED: Final = frozenset({"authorization", "x-api-key"})
Context = Any  # grpc.aio.ServicerContext; the library has no types
Method = Callable[[Any, Context], Awaitable[Any]]


class Callers:
    """Finds whose key a call carries; what was found is kept until other keys hold."""

    def __init__(self, keys: Keys, metrics: Metrics) -> None:
        self._keys, self.metrics = keys, metrics
        self._known: dict[tuple[tuple[str, str | bytes], ...], Principal] = {}
        keys.on_change(self._known.clear)

    def of(self, context: Context, role: str) -> Principal:
        """The caller; Unauthorized, TooManyTries, or Forbidden where its role is less than `role`."""
        if not self._keys.needed:
            return ANYBODY
        said = tuple((name, value) for name, value in context.invocation_metadata() or () if name in _HEEDED)
        principal = self._known.get(said)
        if principal is None:
            given = {name.encode(): value if isinstance(value, bytes) else value.encode() for name, value in said}
            principal = self._keys.authenticate(given, _address(context.peer()))
            if len(self._known) >= KNOWN_CALLERS:
                self._known.clear()
            self._known[said] = principal
        return principal.require(role)

    async def refuse(self, context: Context, error: BaseException) -> None:
        """End a call with an error's status; raises grpc's AbortError."""
        failed = failure(error, self.metrics)
        await context.abort(grpc.StatusCode[failed.status], failed.text, _trailing(failed.error))

    def answered(self, method: Method) -> Method:
        """A method whose errors end the call with their status."""

        async def answer(request: Any, context: Context) -> Any:
            try:
                return await method(request, context)
            except grpc.aio.AbortError:  # it has its status
                raise
            except Exception as error:
                return await self.refuse(context, error)

        return answer


def _address(peer: str) -> str:
    """The host of a peer, such as `ipv4:10.0.0.1:54321` or `ipv6:%5B::1%5D:54321`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def problem_of(error: StepcastError) -> bytes:
    """The problem document as JSON; empty where it is too long to go with an error."""
    said = encode(error.problem(), JSON)
    return said if len(said) <= LONGEST_PROBLEM else b""


def _trailing(error: StepcastError) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata that come behind an error."""
    found: list[tuple[str, str | bytes]] = []
    if said := problem_of(error):
        found.append((PROBLEM, said))
    if error.retry_after_s is not None:
        found.append((PUSHBACK, str(max(1, round(1000 * error.retry_after_s)))))
    return tuple(found)
