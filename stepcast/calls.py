"""What the SDK asks over HTTP, as data: generators that yield requests and pauses, and take responses. No I/O.

Each call is described once, with its types and its documentation, here and in stepcast/session_calls.py;
stepcast/client.py makes of each a method that waits and one that is awaited, stepcast/transport.py carries them.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypedDict, TypeVar, overload
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from . import codec
from .codec import Layout
from .errors import (
    Draining,
    NotReady,
    QuotaExceeded,
    StepcastError,
    TooManyConnections,
    Unavailable,
    from_problem,
)
from .features import FeatureNames, Floats
from .inputs import Array, Columns, F, NamedColumns, NamedRow, O, Records, form
from .manifest import Manifest, Task
from .retry import Retry
from .wire import Broken, Call, Reply

T = TypeVar("T")

READY_PAUSE_S: Final = 0.1


class Pause(NamedTuple):
    """Wait before going on."""

    seconds: float


Steps = Generator[Call | Pause, Reply | Broken | None, T]


class Trial(TypedDict):
    """Rows alone against the same rows in batches of up to `rows`: bit-equal, or the largest absolute difference."""

    exact: bool
    rows: int
    difference: float


class BatchInvariance(TypedDict):
    """What a server found when it loaded a version; None for steps of a model without them, or if nothing was found."""

    steps: Trial | None
    calls: Trial | None


class ModelInfo(TypedDict):
    """A served model, as a list of models has it."""

    name: str
    version: int
    versions: list[int]
    task: Task
    streaming: bool
    device: str
    description: str
    batch_invariance: BatchInvariance


@dataclass(frozen=True, slots=True)
class BatchAnswer(Generic[O]):
    """The answer to a batch step.

    Attributes:
        outputs: Of K sessions, in the form of the inputs; NaN where there is an error.
        steps: The number of steps that each session has taken, None where there is an error.
        errors: Errors by index.
    """

    outputs: O
    steps: list[int | None]
    errors: dict[int, StepcastError]


# --- of a server ----------------------------------------------------------------------------------------------------


class Calls:
    """What can be asked of a server.

    Args:
        retry: How often, and after which pauses.
        clock: Seconds, for the policy's deadline.
    """

    def __init__(self, retry: Retry, clock: Callable[[], float] = time.monotonic) -> None:
        self.retry = retry
        self._clock = clock
        self._names: dict[tuple[str, int], FeatureNames] = {}

    def exchange(self, call: Call) -> Steps[dict[str, Any]]:
        """Send a request until it is answered for good; the decoded answer.

        Raises:
            StepcastError: the server's error, or Unavailable where it cannot be reached.
        """
        deadline = None if self.retry.deadline_s is None else self._clock() + self.retry.deadline_s
        attempt = 0
        while True:
            attempt += 1
            reply = yield call if deadline is None else call._replace(timeout_s=max(0.001, deadline - self._clock()))
            if isinstance(reply, Reply) and reply.status < 300:
                return codec.unpack(reply.content) if reply.content else {}
            error = _problem(reply) if isinstance(reply, Reply) else _unreachable(call, reply)
            if attempt > 1 and error.code == call.applied:
                return {}
            pause_s = self.retry.pause_s(attempt, error.retry_after_s)
            late = deadline is not None and self._clock() + pause_s >= deadline
            if late or attempt == self.retry.attempts or not _again(call, error):
                raise error
            yield Pause(pause_s)

    def wait_ready(self, timeout_s: float = 60.0) -> Steps[None]:
        """Wait until the server is up and its models are loaded.

        Raises:
            Unavailable: it is not within `timeout_s`; why.
        """
        deadline = self._clock() + timeout_s
        while True:
            reply = yield Call("GET", "/healthz/ready", timeout_s=max(0.001, deadline - self._clock()))
            if isinstance(reply, Reply) and reply.status == 200:
                return
            if self._clock() + READY_PAUSE_S >= deadline:
                why = f"HTTP {reply.status}" if isinstance(reply, Reply) else reply.reason if reply else "no reply"
                raise Unavailable(f"the server was not ready within {timeout_s} s: {why}")
            yield Pause(READY_PAUSE_S)

    def models(self) -> Steps[list[ModelInfo]]:
        """The served models."""
        return (yield from self.exchange(Call("GET", "/v1/models")))["models"]  # type: ignore[no-any-return]

    def manifest(self, model: str, version: int | None = None) -> Steps[Manifest]:
        """A version's manifest; the live one's if none is named."""
        return (yield from self.names(model, version)).manifest

    def names(self, model: str, version: int | None = None) -> Steps[FeatureNames]:
        """A version's features and outputs by name. Versions do not change: each is asked for once."""
        known = self._names.get((model, version)) if version else None
        if known is None:
            path = f"{model_path(model)}/versions/{version}" if version else model_path(model)
            known = FeatureNames(_manifest((yield from self.exchange(Call("GET", path)))))
            self._names[model, known.manifest.version] = known
        return known

    @overload
    def predict(self, model: str, inputs: Columns, mask: npt.ArrayLike | None = None) -> Steps[NamedColumns]: ...
    @overload
    def predict(self, model: str, inputs: Records, mask: npt.ArrayLike | None = None) -> Steps[list[NamedRow]]: ...
    @overload
    def predict(self, model: str, inputs: F, mask: npt.ArrayLike | None = None) -> Steps[F]: ...
    @overload
    def predict(
        self, model: str, inputs: Array, mask: npt.ArrayLike | None = None, layout: Layout = "NWC"
    ) -> Steps[Floats]: ...
    def predict(self, model: str, inputs: Any, mask: npt.ArrayLike | None = None, layout: Layout = "NWC") -> Steps[Any]:
        """The stateless full forward pass over whole sequences.

        Args:
            model: The model; its live version answers.
            inputs: [T,F] or [B,T,F]; by name columns [T] or [B,T], records, or a DataFrame with a row per step.
            mask: 0 where a step is absent.
            layout: NCW: [B,F,T] in and [B,O,T] out.

        Returns:
            Outputs in the form of the inputs.
        """
        asked = form(inputs)
        names = (yield from self.names(model)) if asked.named else None
        fields: dict[str, Any] = {"inputs": asked.array(names, "steps"), "format": codec.layout_of(asked, layout)}
        if names is not None:
            fields["version"] = names.manifest.version
        if mask is not None:
            fields["mask"] = np.asarray(mask).astype(int).tolist()
        made = yield from self.exchange(Call("POST", f"{model_path(model)}/predict", fields))
        return asked.outputs(codec.outputs(made), names)

    @overload
    def step_many(
        self, model: str, sessions: Sequence[str], inputs: Columns, seqs: Sequence[int | None] | None = None
    ) -> Steps[BatchAnswer[NamedColumns]]: ...
    @overload
    def step_many(
        self, model: str, sessions: Sequence[str], inputs: Records, seqs: Sequence[int | None] | None = None
    ) -> Steps[BatchAnswer[list[NamedRow]]]: ...
    @overload
    def step_many(
        self, model: str, sessions: Sequence[str], inputs: F, seqs: Sequence[int | None] | None = None
    ) -> Steps[BatchAnswer[F]]: ...
    @overload
    def step_many(
        self, model: str, sessions: Sequence[str], inputs: Array, seqs: Sequence[int | None] | None = None
    ) -> Steps[BatchAnswer[Floats]]: ...
    def step_many(
        self, model: str, sessions: Sequence[str], inputs: Any, seqs: Sequence[int | None] | None = None
    ) -> Steps[BatchAnswer[Any]]:
        """One step for each of K sessions, in one call.

        Args:
            model: The model.
            sessions: K ids.
            inputs: [K,F]; by name columns [K], K records, or a DataFrame of K rows. Names are the live version's.
            seqs: The numbers of the steps. Without them a lost answer is not asked for again.
        """
        asked = form(inputs)
        names = (yield from self.names(model)) if asked.named else None
        fields: dict[str, Any] = {"sessions": list(sessions), "inputs": asked.array(names)}
        if seqs is not None:
            fields["seq"] = list(seqs)
        numbered = seqs is not None and all(seq is not None for seq in seqs)
        message = yield from self.exchange(Call("POST", f"{model_path(model)}/step", fields, safe=numbered))
        errors = {int(i): from_problem(problem) for i, problem in message["errors"].items()}
        return BatchAnswer(asked.outputs(codec.outputs(message), names), message["steps"], errors)

    def sessions(self, model: str, prefix: str = "") -> Steps[list[str]]:
        """Ids of all sessions that start with `prefix`."""
        found: list[str] = []
        cursor = ""
        while True:
            query = f"limit=1000&prefix={quote(prefix, safe='')}&cursor={quote(cursor, safe='')}"
            page = yield from self.exchange(Call("GET", f"{model_path(model)}/sessions?{query}"))
            found += page["sessions"]
            cursor = page["cursor"] or ""
            if not cursor:
                return found


# --- in common --------------------------------------------------------------------------------------------------------


def model_path(model: str) -> str:
    """The path of a model."""
    return f"/v1/models/{quote(model, safe='')}"


def _manifest(message: dict[str, Any]) -> Manifest:
    """A manifest as the server gives it; what a newer server adds is left out."""
    try:
        return Manifest.model_validate({key: message[key] for key in message if key in Manifest.model_fields})
    except ValidationError as error:
        raise StepcastError(f"the manifest of model {message.get('name')!r} cannot be read: {error}") from error


def _again(call: Call, error: StepcastError) -> bool:
    if isinstance(error, QuotaExceeded):  # time alone mends nothing
        return False
    if error.status in (408, 429) or isinstance(error, (Draining, NotReady, TooManyConnections)):
        # refused: certainly not applied
        return True
    return call.safe and error.status in (503, 504)


def _problem(reply: Reply) -> StepcastError:
    try:
        problem = msgspec.json.decode(reply.content)
    except msgspec.DecodeError:
        problem = None
    if not isinstance(problem, dict) or "code" not in problem:  # a proxy's answer, not the server's
        text = f"HTTP {reply.status}: {reply.content[:200]!r}"
        return Unavailable(text) if reply.status in (502, 503, 504) else StepcastError(text, http_status=reply.status)
    return from_problem(problem)


def _unreachable(call: Call, reply: Broken | None) -> Unavailable:
    return Unavailable(f"{call.method} {call.path} was not answered: {reply.reason if reply else 'no reply'}")
