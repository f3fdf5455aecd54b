"""Every error a caller can meet: one class, one code, one HTTP status, one WebSocket close code.

    StepcastError
    +-- BadRequest 400
    |   +-- Malformed                 the bytes are not what the content type says
    |   +-- SequenceNotStarted        a step of a sequence that was never started, has ended or has expired
    +-- Unauthorized 401              no key, or an unknown one
    +-- Forbidden 403                 the key's role does not allow this
    +-- NotFound 404
    |   +-- ModelNotFound
    |   +-- SessionNotFound
    |   +-- LayerNotFound
    |   +-- CheckpointNotFound
    |   +-- RouteNotFound
    +-- MethodNotAllowed 405
    +-- RequestTimeout 408            the request did not come whole in time; nothing of it was applied
    +-- Conflict 409
    |   +-- StepConflict              a gap in seq, or the same seq with another payload
    |   +-- ExamplesMismatch          another N than the session's
    |   +-- StateVersionMismatch      the state belongs to a model version that is not served
    |   +-- SessionExists
    |   +-- CheckpointExists
    |   +-- SourceConflict            the session is fed from another stream
    |   +-- SessionBusy               another writer kept winning; nothing was applied
    |   +-- VersionInUse              sessions hold the version that is to be removed
    |   +-- VersionFailed             the version's files do not prove themselves: it is not served
    +-- PreconditionFailed 412        If-Match named another revision
    +-- TooLarge 413
    |   +-- AddressTooLong 414
    |   +-- HeadTooLarge 431
    +-- UnsupportedMediaType 415
    +-- UnknownHost 421               a name that this server does not go by
    +-- Unprocessable 422
    |   +-- InvalidRequest            well-formed, but a field is missing, unknown or of the wrong type
    |   +-- InvalidSessionId
    |   +-- ShapeMismatch
    |   +-- StateMismatch             layers, keys, shapes or fingerprint of a state do not fit the model
    |   +-- NotStreaming              the model cannot be stepped (bidirectional)
    |   +-- NoFeedback                the model cannot run free
    |   +-- NonFinite                 an input, output or state is infinite (or NaN where that is no reading)
    +-- QueueFull 429                 with retry_after_s
    |   +-- IntakeFull                too many bytes of requests in flight
    |   +-- TooManyTries              too many wrong keys from one address
    +-- QuotaExceeded 429             the namespace has as many sessions or bytes as it may
    +-- Internal 500                  a defect of ours; never caused by an input
    +-- Unavailable 503
    |   +-- StoreUnavailable          with retry_after_s; whether the step was applied shows on retry with seq
    |   +-- TooManyConnections
    |   +-- NotReady
    |   +-- Draining
    +-- DeadlineExceeded 504          the step was not applied

    ManifestError                     a model directory is not what its manifest says (start-up and training)
    ConfigError                       a setting or a training configuration is wrong (start-up and training)

A message says facts first (what, which, got, wanted), then one imperative if the caller can act. The same facts
travel as fields of the problem document (RFC 9457).
"""

from collections.abc import Iterator
from typing import Any, ClassVar


class StepcastError(Exception):
    """Base of everything a caller can meet.

    Args:
        message: Facts, then at most one imperative.
        facts: The same facts as fields of the problem document.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Error"
    close_code: ClassVar[int] = 1011

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which a retry makes sense, None where a retry alone changes nothing."""
        value = self.facts.get("retry_after_s")
        return None if value is None else float(value)

    def problem(self) -> dict[str, Any]:
        """The application/problem+json document of this error (RFC 9457), `code` and facts included."""
        return {
            "type": f"urn:stepcast:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.message,
            "code": self.code,
            **self.facts,
        }


class BadRequest(StepcastError):
    code, status, title, close_code = "bad_request", 400, "Bad request", 1007


class Malformed(BadRequest):
    code, title = "malformed", "Malformed body"


class SequenceNotStarted(BadRequest):
    code, title = "sequence_not_started", "Sequence not started"


class Unauthorized(StepcastError):
    code, status, title, close_code = "unauthorized", 401, "Unauthorized", 1008


class Forbidden(StepcastError):
    code, status, title, close_code = "forbidden", 403, "Forbidden", 1008


class NotFound(StepcastError):
    code, status, title, close_code = "not_found", 404, "Not found", 1008


class RouteNotFound(NotFound):
    code, title = "route_not_found", "No such route"


class ModelNotFound(NotFound):
    code, title = "model_not_found", "No such model"


class SessionNotFound(NotFound):
    code, title = "session_not_found", "No such session"


class LayerNotFound(NotFound):
    code, title = "layer_not_found", "No such layer"


class CheckpointNotFound(NotFound):
    code, title = "checkpoint_not_found", "No such checkpoint"


class MethodNotAllowed(StepcastError):
    code, status, title, close_code = "method_not_allowed", 405, "Method not allowed", 1008


class RequestTimeout(StepcastError):
    code, status, title, close_code = "request_timeout", 408, "Request timeout", 1008


class Conflict(StepcastError):
    code, status, title, close_code = "conflict", 409, "Conflict", 1008


class StepConflict(Conflict):
    code, title = "step_conflict", "Step number conflict"


class ExamplesMismatch(Conflict):
    code, title = "examples_mismatch", "Another number of examples"


class StateVersionMismatch(Conflict):
    code, title = "state_version_mismatch", "State of another model version"


class SourceConflict(Conflict):
    code, title = "source_conflict", "Fed from another source"


class SessionExists(Conflict):
    code, title = "session_exists", "Session exists"


class CheckpointExists(Conflict):
    code, title = "checkpoint_exists", "Checkpoint exists"


class SessionBusy(Conflict):
    code, title = "session_busy", "Session is being changed by others"


class VersionInUse(Conflict):
    code, title = "version_in_use", "Sessions hold this version"


class VersionFailed(Conflict):
    code, title = "version_failed", "Version does not prove itself"


class PreconditionFailed(StepcastError):
    code, status, title, close_code = "precondition_failed", 412, "Precondition failed", 1008


class TooLarge(StepcastError):
    code, status, title, close_code = "too_large", 413, "Too large", 1009


class AddressTooLong(TooLarge):
    code, status, title = "address_too_long", 414, "Address too long"


class HeadTooLarge(TooLarge):
    code, status, title = "head_too_large", 431, "Head too large"


class UnsupportedMediaType(StepcastError):
    code, status, title, close_code = "unsupported_media_type", 415, "Unsupported media type", 1003


class UnknownHost(StepcastError):
    code, status, title, close_code = "unknown_host", 421, "Unknown host name", 1008


class Unprocessable(StepcastError):
    code, status, title, close_code = "unprocessable", 422, "Unprocessable", 1008


class InvalidRequest(Unprocessable):
    code, title = "invalid_request", "Invalid request"


class InvalidSessionId(Unprocessable):
    code, title = "invalid_session_id", "Invalid session id"


class ShapeMismatch(Unprocessable):
    code, title = "shape_mismatch", "Wrong shape"


class StateMismatch(Unprocessable):
    code, title = "state_mismatch", "State does not fit the model"


class NotStreaming(Unprocessable):
    code, title = "not_streaming", "Model cannot be stepped"


class NoFeedback(Unprocessable):
    code, title = "no_feedback", "Model cannot run free"


class NonFinite(Unprocessable):
    code, title = "non_finite", "Not a finite number"


class QueueFull(StepcastError):
    code, status, title, close_code = "queue_full", 429, "Queue full", 1013


class IntakeFull(QueueFull):
    code, title = "intake_full", "Too many bytes in flight"


class TooManyTries(QueueFull):
    code, title, close_code = "too_many_tries", "Too many wrong keys", 1008


class QuotaExceeded(StepcastError):
    code, status, title, close_code = "quota_exceeded", 429, "Quota exceeded", 1008


class Internal(StepcastError):
    code, status, title, close_code = "internal", 500, "Internal error", 1011


class Unavailable(StepcastError):
    code, status, title, close_code = "unavailable", 503, "Unavailable", 1013


class StoreUnavailable(Unavailable):
    code, title = "store_unavailable", "Session store unavailable"


class TooManyConnections(Unavailable):
    code, title = "too_many_connections", "Too many connections"


class NotReady(Unavailable):
    code, title = "not_ready", "Not ready"


class Draining(Unavailable):
    code, title, close_code = "draining", "Server is draining", 1012


class DeadlineExceeded(StepcastError):
    code, status, title, close_code = "deadline_exceeded", 504, "Deadline exceeded", 1013


class ManifestError(Exception):
    """A model directory is not what its manifest says; the server does not serve it, the trainer does not write it."""


class ConfigError(Exception):
    """A setting or configuration is wrong; the process refuses to start. The message has the path of the value."""


def every_error() -> Iterator[type[StepcastError]]:
    """All error classes that can travel to a caller, base included, parents first."""
    todo: list[type[StepcastError]] = [StepcastError]
    while todo:
        error = todo.pop(0)
        yield error
        todo.extend(error.__subclasses__())


BY_CODE: dict[str, type[StepcastError]] = {error.code: error for error in reversed(list(every_error()))}


def from_problem(problem: dict[str, Any]) -> StepcastError:
    """The error that a problem document stands for; what the client raises.

    An unknown code becomes a plain StepcastError with the document's facts.
    """
    known = {"type", "title", "status", "detail", "code"}
    facts = {key: value for key, value in problem.items() if key not in known}
    error = BY_CODE.get(str(problem.get("code")), StepcastError)
    return error(str(problem.get("detail") or problem.get("title") or problem), **facts)
