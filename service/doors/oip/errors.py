"""Errors as the Open Inference Protocol knows them: a status of gRPC's, and HTTP's for it."""

from typing import Final, NamedTuple

from stepcast.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    NotFound,
    NotStreaming,
    QueueFull,
    QuotaExceeded,
    StepcastError,
    Unauthorized,
    Unavailable,
)

from ...telemetry import Metrics, as_ours

HTTP_STATUS: Final = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
}
_STATUS: Final[tuple[tuple[type[StepcastError], str], ...]] = (
    (NotFound, "NOT_FOUND"),
    (Conflict, "FAILED_PRECONDITION"),
    (NotStreaming, "UNIMPLEMENTED"),
    (Unauthorized, "UNAUTHENTICATED"),
    (Forbidden, "PERMISSION_DENIED"),
    (Unavailable, "UNAVAILABLE"),
    (QueueFull, "UNAVAILABLE"),
    (DeadlineExceeded, "UNAVAILABLE"),
    (QuotaExceeded, "RESOURCE_EXHAUSTED"),
)


class Failure(NamedTuple):
    """An error as a client of the protocol sees it."""

    status: str  # gRPC's name of it
    text: str
    error: StepcastError  # its code and facts

    @property
    def http_status(self) -> int:
        """HTTP's status."""
        return HTTP_STATUS[self.status]


def failure(error: BaseException, metrics: Metrics | None = None) -> Failure:
    """Any error as the protocol's; the metrics count it."""
    ours = as_ours(error)
    if metrics is not None:
        metrics.errors.labels(ours.code).inc()
    otherwise = "INVALID_ARGUMENT" if ours.status < 500 else "INTERNAL"
    status = next((status for kind, status in _STATUS if isinstance(ours, kind)), otherwise)
    return Failure(status, ours.message, ours)
