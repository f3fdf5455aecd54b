"""What the SDK asks over HTTP, as data: generators that yield requests and pauses, and take responses. No I/O.

Each call is described here once, with its types and its documentation; stepcast/client.py makes of each a method that
waits and one that is awaited, stepcast/transport.py carries them.
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, NamedTuple, TypedDict, TypeVar, Unpack, overload
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from . import codec
from .codec import Answer, Forecast, LayerState, Layout, Rows, SessionState
from .errors import (
    Conflict,
    Draining,
    NotReady,
    SessionNotFound,
    StateVersionMismatch,
    StepcastError,
    Unavailable,
    from_problem,
)
from .features import FeatureNames, Floats
from .inputs import Array, Columns, F, Form, NamedColumns, NamedRow, O, Records, Row, form
from .manifest import Manifest
from .retry import Retry
from .wire import Broken, Call, Reply

T = TypeVar("T")

READY_PAUSE_S: Final = 0.1


class Pause(NamedTuple):
    """Wait before going on."""

    seconds: float


Steps = Generator[Call | Pause, Reply | Broken | None, T]


class ModelInfo(TypedDict):
    """A served model, as a list of models has it."""

    name: str
    version: int
    versions: list[int]
    task: Literal["regression", "classification"]
    streaming: bool
    device: str
    description: str


class SessionInfo(TypedDict):
    """What is known of a session; times are seconds since 1970."""

    session: str
    model: str
    version: int
    step: int
    examples: int | None
    bytes: int
    created_at: float
    used_at: float
    expires_at: float | None


class StepOptions(TypedDict, total=False):
    """What a step may say besides its inputs."""

    mask: npt.ArrayLike | None
    layout: Layout
    rows: Rows
    version_policy: str | None


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
            StepcastError: the server's error, or Unavailable where it can not be reached.
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
            path = f"{_path(model)}/versions/{version}" if version else _path(model)
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
        fields: dict[str, Any] = {"inputs": asked.array(names), "format": codec.layout_of(asked, layout)}
        if names is not None:
            fields["version"] = names.manifest.version
        if mask is not None:
            fields["mask"] = np.asarray(mask).astype(int).tolist()
        made = yield from self.exchange(Call("POST", f"{_path(model)}/predict", fields))
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
        message = yield from self.exchange(Call("POST", f"{_path(model)}/step", fields, safe=numbered))
        errors = {int(i): from_problem(problem) for i, problem in message["errors"].items()}
        return BatchAnswer(asked.outputs(codec.outputs(message), names), message["steps"], errors)

    def sessions(self, model: str, prefix: str = "") -> Steps[list[str]]:
        """Ids of all sessions that start with `prefix`."""
        found: list[str] = []
        cursor = ""
        while True:
            query = f"limit=1000&prefix={quote(prefix, safe='')}&cursor={quote(cursor, safe='')}"
            page = yield from self.exchange(Call("GET", f"{_path(model)}/sessions?{query}"))
            found += page["sessions"]
            cursor = page["cursor"] or ""
            if not cursor:
                return found


# --- of a session ---------------------------------------------------------------------------------------------------


class SessionCalls:
    """What can be asked of one session. It numbers the session's steps, so its calls go one at a time."""

    def __init__(self, calls: Calls, model: str, session: str) -> None:
        self.calls, self.model, self.session = calls, model, session
        self._path = f"{_path(model)}/sessions/{quote(session, safe='')}"
        self._step: int | None = None
        self._version: int | None = None

    def create(self, fields: dict[str, Any], own_id: bool) -> Steps[SessionInfo]:
        """Create it; `own_id`: nobody else can have created a session of this id."""
        path = self._path.rpartition("/")[0]
        given = {name: value for name, value in fields.items() if value is not None}
        call = Call("POST", path, {"session": self.session, **given}, own_id, "session_exists" if own_id else "")
        made = yield from self.calls.exchange(call)
        return self._learn(made or (yield from self.calls.exchange(Call("GET", self._path))))

    def info(self) -> Steps[SessionInfo]:
        """Step, examples, version, size and times.

        Raises:
            SessionNotFound.
        """
        return (yield from self.calls.exchange(Call("GET", self._path)))  # type: ignore[return-value]  # its word

    @overload
    def step(self, inputs: Row, **options: Unpack[StepOptions]) -> Steps[Answer[NamedRow]]: ...
    @overload
    def step(self, inputs: Columns, **options: Unpack[StepOptions]) -> Steps[Answer[NamedColumns]]: ...
    @overload
    def step(self, inputs: Records, **options: Unpack[StepOptions]) -> Steps[Answer[list[NamedRow]]]: ...
    @overload
    def step(self, inputs: F, **options: Unpack[StepOptions]) -> Steps[Answer[F]]: ...
    @overload
    def step(self, inputs: Array, **options: Unpack[StepOptions]) -> Steps[Answer[Floats]]: ...
    def step(
        self,
        inputs: Any,
        mask: npt.ArrayLike | None = None,
        layout: Layout = "NWC",
        rows: Rows = "examples",
        version_policy: str | None = None,
    ) -> Steps[Answer[Any]]:
        """Advance the session; applied exactly once, however often it must be sent.

        A call that failed with Unavailable may be repeated with the same inputs: if it had been applied, the answer is
        the stored one.

        Args:
            inputs: [F], [N,F] or [N,T,F]; by name numbers, columns [N] or [N,T], a list of records, or a DataFrame.
                None and NaN are missing readings. Names may be left out where the model takes missing readings.
            mask: 0 where a step is absent; it leaves the state as it is.
            layout: NCW: [N,F,T] in and [N,O,T] out.
            rows: What the rows of a DataFrame, of records or of [N,F] are: examples at one step, or the steps of one
                example.
            version_policy: What happens if the session's version is gone: refuse, restart or replay.

        Returns:
            Outputs in the form of the inputs, and the number of steps taken.

        Raises:
            StepConflict: someone else stepped the session. The next call goes on from there.
        """
        asked = form(inputs)
        taken = yield from self._taken()
        names = (yield from self.calls.names(self.model, self._version)) if asked.named else None
        made = codec.step_inputs(asked, names, mask, layout, rows)
        fields = made.fields if version_policy is None else {**made.fields, "version_policy": version_policy}
        message = yield from self._numbered("step", {**fields, "seq": taken + made.steps})
        self._step, self._version = message["step"], message["version"]
        if names is not None:
            names = yield from self._answered_by(message["version"], names)
        return codec.answer(message, made, names)

    @overload
    def rollout(
        self,
        steps: int,
        inputs: Columns,
        *,
        commit: bool = False,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Steps[Forecast[NamedColumns]]: ...
    @overload
    def rollout(
        self,
        steps: int,
        inputs: Array | None = None,
        *,
        commit: bool = False,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Steps[Forecast[Floats]]: ...
    def rollout(
        self,
        steps: int,
        inputs: Any = None,
        *,
        commit: bool = False,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Steps[Forecast[Any]]:
        """Run free for H steps, feeding predictions back.

        Args:
            steps: H.
            inputs: What is known of the future, NaN where nothing is: [H,F] or [N,H,F], or columns [H] or [N,H] by
                name, any of which may be left out.
            commit: Whether the session moves on; if not, it stays as it is.
            temperature: For a classifier, how classes are drawn; 0: the likeliest.
            seed: Of the draws.
        """
        fields: dict[str, Any] = {"steps": steps, "commit": commit, "temperature": temperature}
        asked: Form[Any] | None = None if inputs is None else form(inputs)
        if seed is None and commit and temperature:
            seed = secrets.randbits(62)  # so that a retry draws the same
        if seed is not None:
            fields["seed"] = seed
        if commit:
            fields["seq"] = (yield from self._taken()) + steps
        names = None
        if asked is not None:
            if asked.named:
                yield from self._taken()
                names = yield from self.calls.names(self.model, self._version)
            fields["inputs"] = asked.array(names, partial=True)
        message = yield from self._numbered("rollout", fields)
        if commit:
            self._step, self._version = message["step"], message["version"]
        if names is not None:
            names = yield from self._answered_by(message["version"], names)
        return codec.forecast(message, asked, names)

    def _numbered(self, op: str, fields: dict[str, Any]) -> Steps[dict[str, Any]]:
        try:
            return (yield from self.calls.exchange(Call("POST", f"{self._path}/{op}", fields)))
        except Conflict:
            self._step = None  # others step this session, too: ask again
            raise

    def _taken(self) -> Steps[int]:
        """The number of steps that the session has taken."""
        if self._step is None:
            try:
                self._learn((yield from self.calls.exchange(Call("GET", self._path))))
            except SessionNotFound:
                self._step, self._version = 0, None
        return self._step or 0

    def _answered_by(self, version: int, names: FeatureNames) -> Steps[FeatureNames]:
        """The names of the version that answered, which need not be the one that the inputs were arranged for."""
        if version == names.manifest.version:
            return names
        theirs = yield from self.calls.names(self.model, version)
        return same_features(names, theirs)

    def forget_step(self) -> None:
        """The session is stepped by other means: the next call asks for its number."""
        self._step = None

    def names(self) -> Steps[FeatureNames]:
        """Features and outputs by name of the session's version; of the live one before its first step."""
        yield from self._taken()
        return (yield from self.calls.names(self.model, self._version))

    def get_state(self) -> Steps[SessionState]:
        """All layers' state (rnnGetPreviousState)."""
        message = yield from self.calls.exchange(Call("GET", f"{self._path}/state"))
        return codec.session_state(message, (yield from self.calls.manifest(self.model, message["version"])))

    def set_state(self, state: Mapping[str, Mapping[str, npt.ArrayLike]] | SessionState) -> Steps[SessionInfo]:
        """Set all layers' state (rnnSetPreviousState), by arrays alone or by what `get_state` gave."""
        version = state.version if isinstance(state, SessionState) else None
        fields = codec.state_fields(state, (yield from self.calls.manifest(self.model, version)))
        return (yield from self._changed(Call("PUT", f"{self._path}/state", fields)))

    def get_layer(self, layer: str) -> Steps[LayerState]:
        """One layer's state by key, each (N, *shape).

        Raises:
            LayerNotFound.
        """
        message = yield from self.calls.exchange(Call("GET", f"{self._path}/state/{quote(layer, safe='')}"))
        manifest = yield from self.calls.manifest(self.model, message["version"])
        return codec.layer_state(message, manifest, layer)

    def set_layer(self, layer: str, state: Mapping[str, npt.ArrayLike]) -> Steps[SessionInfo]:
        """Set one layer's state by key; the others stay as they are.

        Raises:
            LayerNotFound.
        """
        manifest = (yield from self.names()).manifest
        fields = {"state": codec.layer_fields(layer, state, manifest)}
        return (yield from self._changed(Call("PUT", f"{self._path}/state/{quote(layer, safe='')}", fields)))

    def clear(self) -> Steps[SessionInfo]:
        """Forget the state (rnnClearPreviousState); the session stays, its step number too."""
        return (yield from self._changed(Call("DELETE", f"{self._path}/state")))

    def rewind(self, to: str) -> Steps[SessionInfo]:
        """Go back to a checkpoint."""
        return (yield from self._changed(Call("POST", f"{self._path}/rewind", {"to": to})))

    def _changed(self, call: Call) -> Steps[SessionInfo]:
        self._step = None
        return self._learn((yield from self.calls.exchange(call)))

    def _learn(self, info: dict[str, Any]) -> SessionInfo:
        self._step, self._version = info["step"], info["version"]
        return info  # type: ignore[return-value]  # its word

    def fork(self, to: str | None = None) -> Steps[str]:
        """A new session with the same state; its id."""
        child = to or new_id()
        applied = "" if to else "session_exists"
        yield from self.calls.exchange(Call("POST", f"{self._path}/fork", {"to": child}, to is None, applied))
        return child

    def checkpoint(self, name: str | None = None) -> Steps[str]:
        """Name the session as it is now; the name, step-k unless given."""
        fields = {} if name is None else {"name": name}
        made = yield from self.calls.exchange(Call("POST", f"{self._path}/checkpoints", fields, safe=False))
        return str(made["name"])

    def checkpoints(self) -> Steps[dict[str, int]]:
        """Step numbers by checkpoint."""
        found = yield from self.calls.exchange(Call("GET", f"{self._path}/checkpoints"))
        return {entry["name"]: entry["step"] for entry in found["checkpoints"]}

    def end(self) -> Steps[None]:
        """End and forget the session.

        Raises:
            SessionNotFound.
        """
        self._step = self._version = None
        yield from self.calls.exchange(Call("DELETE", self._path, applied="session_not_found"))

    def end_if_there(self) -> Steps[None]:
        """The same; it is well if there is no such session."""
        with contextlib.suppress(SessionNotFound):
            yield from self.end()


# --- in common ------------------------------------------------------------------------------------------------------


def new_id() -> str:
    """An id that no other session has."""
    return secrets.token_urlsafe(16)


def same_features(arranged: FeatureNames, answered: FeatureNames) -> FeatureNames:
    """The names of the version that answered, if inputs arranged for another one were right for it.

    Raises:
        StateVersionMismatch.
    """
    ours, theirs = arranged.manifest, answered.manifest
    if [(f.name, f.width) for f in ours.features] != [(f.name, f.width) for f in theirs.features]:
        raise StateVersionMismatch(
            f"inputs were named for version {ours.version} of model {ours.name!r}, but version {theirs.version}, whose "
            "features are others, took the step. Clear or rewind the session.",
            version=theirs.version,
        )
    return answered


def _path(model: str) -> str:
    return f"/v1/models/{quote(model, safe='')}"


def _manifest(message: dict[str, Any]) -> Manifest:
    """A manifest as the server gives it; what a newer server adds is left out."""
    try:
        return Manifest.model_validate({key: message[key] for key in message if key in Manifest.model_fields})
    except ValidationError as error:
        raise StepcastError(f"the manifest of model {message.get('name')!r} can not be read: {error}") from error


def _again(call: Call, error: StepcastError) -> bool:
    if error.status == 429 or isinstance(error, (Draining, NotReady)):  # refused: certainly not applied
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
