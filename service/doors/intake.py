"""Bytes of requests that have come and are not answered: bounded for each tenant and in all."""

from types import TracebackType
from typing import Self

from stepcast.errors import IntakeFull


class Intake:
    """Counts the bytes in flight of a server; `settings` say how many may be."""

    def __init__(self, limit: int, tenant_limit: int) -> None:
        self._limit, self._tenant_limit = limit, tenant_limit
        self.held = 0
        self._by_tenant: dict[str, int] = {}

    def take(self, tenant: str, size: int) -> None:
        """Count `size` bytes more; IntakeFull where a bound is passed, and nothing is counted."""
        own = self._by_tenant.get(tenant, 0)
        for what, held, limit in (
            (f"namespace {tenant!r}", own, self._tenant_limit),
            ("the server", self.held, self._limit),
        ):
            if held + size > limit and size > 0:
                text = f"{what} has {held} bytes of requests in flight (limit {limit}), got {size} more. Retry later."
                raise IntakeFull(text, held=held, limit=limit, retry_after_s=1.0)
        self.held += size
        self._by_tenant[tenant] = own + size
        if not own + size:
            del self._by_tenant[tenant]


class Share:
    """What one request, or one socket, holds of it. As a context manager it is given back at the end."""

    __slots__ = ("_intake", "_tenant", "held")

    def __init__(self, intake: Intake, tenant: str) -> None:
        self._intake, self._tenant, self.held = intake, tenant, 0

    def add(self, size: int) -> None:
        """Hold so many bytes more; IntakeFull where they are too many."""
        self._intake.take(self._tenant, size)
        self.held += size

    def hold(self, size: int) -> None:
        """Hold so many bytes from now on; IntakeFull where they are too many."""
        if size != self.held:
            self.add(size - self.held)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.hold(0)
