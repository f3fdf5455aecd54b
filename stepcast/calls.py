"""What the SDK asks over HTTP, as data: generators that yield requests and pauses, and take responses. No I/O.

`Calls` and `SessionCalls` are carried by the clients of stepcast/client.py, one by waiting, one by awaiting.
"""

import secrets
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt

from . import codec
from .codec import Answer, Floats, Forecast, SessionState, State
from .errors import Conflict, Draining, NotReady, SessionNotFound, StepcastError, Unavailable, from_problem

T = TypeVar("T")

TRIES: Final = 8
FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request.

    `safe`: it may be sent again when it is not known whether it was applied. `applied`: the error code which then means
    that it was.
    """

    method: str
    path: str
    fields: dict[str, Any] | None = None
    safe: bool = True
    applied: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP response."""

    status: int
    content: bytes
    headers: Any


@dataclass(frozen=True, slots=True)
class Broken:
    """There was no response; why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait before going on."""

    seconds: float


Steps = Generator[Call | Pause, Reply | Broken | None, T]


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """The answers of a batch step: outputs (K, O), NaN where there is an error; steps (None there); errors by index."""

    outputs: Floats
    steps: list[int | None]
    errors: dict[int, StepcastError]


# --- what is asked --------------------------------------------------------------------------------------------------


def exchange(call: Call, tries: int = TRIES) -> Steps[dict[str, Any]]:
    """Send a request until it is answered for good; the decoded answer.

    Raises:
        StepcastError: the server's error, or Unavailable where it can not be reached.
    """
    for attempt in range(1, tries + 1):
        reply = yield call
        if isinstance(reply, Reply) and reply.status < 300:
            return codec.unpack(reply.content) if reply.content else {}
        error = _problem(reply) if isinstance(reply, Reply) else _unreachable(call, reply)
        if attempt > 1 and error.code == call.applied:
            return {}
        if attempt == tries or not _again(call, error):
            raise error
        wait_s = error.retry_after_s or FIRST_PAUSE_S
        yield Pause(min(LONGEST_PAUSE_S, wait_s * 2 ** (attempt - 1)))
    raise AssertionError("unreachable")


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


class Calls:
    """What can be asked of a server."""

    def __init__(self) -> None:
        self._manifests: dict[tuple[str, int | None], dict[str, Any]] = {}

    def models(self) -> Steps[list[dict[str, Any]]]:
        return (yield from exchange(Call("GET", "/v1/models")))["models"]  # type: ignore[no-any-return]

    def manifest(self, model: str, version: int | None = None) -> Steps[dict[str, Any]]:
        known = self._manifests.get((model, version))
        if known is None:
            path = f"/v1/models/{quote(model, safe='')}" + (f"/versions/{version}" if version else "")
            known = self._manifests[model, version] = yield from exchange(Call("GET", path))
        return known

    def predict(self, model: str, inputs: npt.ArrayLike, mask: npt.ArrayLike | None, layout: str) -> Steps[Floats]:
        fields: dict[str, Any] = {"inputs": codec.as_floats(inputs), "format": layout}
        if mask is not None:
            fields["mask"] = np.asarray(mask).astype(int).tolist()
        return codec.outputs((yield from exchange(Call("POST", f"/v1/models/{quote(model, safe='')}/predict", fields))))

    def step_many(
        self, model: str, sessions: Sequence[str], inputs: npt.ArrayLike, seqs: Sequence[int | None] | None
    ) -> Steps[BatchAnswer]:
        fields: dict[str, Any] = {"sessions": list(sessions), "inputs": codec.as_floats(inputs)}
        numbered = seqs is not None and all(seq is not None for seq in seqs)
        if seqs is not None:
            fields["seq"] = list(seqs)
        call = Call("POST", f"/v1/models/{quote(model, safe='')}/step", fields, safe=numbered)
        message = yield from exchange(call)
        errors = {int(i): from_problem(problem) for i, problem in message["errors"].items()}
        return BatchAnswer(codec.outputs(message), message["steps"], errors)

    def sessions(self, model: str, prefix: str) -> Steps[list[str]]:
        found: list[str] = []
        cursor = ""
        while True:
            query = f"limit=1000&prefix={quote(prefix, safe='')}&cursor={quote(cursor, safe='')}"
            page = yield from exchange(Call("GET", f"/v1/models/{quote(model, safe='')}/sessions?{query}"))
            found += page["sessions"]
            cursor = page["cursor"] or ""
            if not cursor:
                return found


class SessionCalls:
    """What can be asked of one session. It numbers its steps: one at a time."""

    def __init__(self, calls: Calls, model: str, session: str) -> None:
        self.calls, self.model, self.session = calls, model, session
        self._path = f"/v1/models/{quote(model, safe='')}/sessions/{quote(session, safe='')}"
        self._step: int | None = None

    def create(self, fields: dict[str, Any], own_id: bool) -> Steps[dict[str, Any]]:
        path = self._path.rpartition("/")[0]
        call = Call("POST", path, {"session": self.session, **fields}, own_id, "session_exists" if own_id else "")
        info = (yield from exchange(call)) or (yield from self.info())
        self._step = info["step"]
        return info

    def info(self) -> Steps[dict[str, Any]]:
        return (yield from exchange(Call("GET", self._path)))

    def step(
        self, inputs: npt.ArrayLike, mask: npt.ArrayLike | None, layout: str, version_policy: str | None
    ) -> Steps[Answer]:
        asked = codec.step_inputs(inputs, mask, layout)
        fields = asked.fields if version_policy is None else {**asked.fields, "version_policy": version_policy}
        seq = (yield from self._taken()) + asked.steps
        answer = codec.answer((yield from self._numbered("step", {**fields, "seq": seq})))
        self._step = answer.step
        return answer

    def rollout(
        self,
        steps: int,
        inputs: npt.ArrayLike | None,
        commit: bool,
        temperature: float,
        seed: int | None,
    ) -> Steps[Forecast]:
        fields: dict[str, Any] = {"steps": steps, "commit": commit, "temperature": temperature}
        if inputs is not None:
            fields["inputs"] = codec.as_floats(inputs)
        if seed is None and commit and temperature:
            seed = secrets.randbits(62)  # so that a retry draws the same
        if seed is not None:
            fields["seed"] = seed
        if commit:
            fields["seq"] = (yield from self._taken()) + steps
        made = codec.forecast((yield from self._numbered("rollout", fields)))
        if commit:
            self._step = made.step
        return made

    def _numbered(self, op: str, fields: dict[str, Any]) -> Steps[dict[str, Any]]:
        try:
            return (yield from exchange(Call("POST", f"{self._path}/{op}", fields)))
        except Conflict:
            self._step = None  # others step this session, too: ask again
            raise

    def _taken(self) -> Steps[int]:
        """The number of steps that the session has taken."""
        if self._step is None:
            try:
                info = yield from self.info()
                self._step = int(info["step"])
            except SessionNotFound:
                self._step = 0
        return self._step

    def get_state(self) -> Steps[SessionState]:
        message = yield from exchange(Call("GET", f"{self._path}/state"))
        return codec.session_state(message, (yield from self.calls.manifest(self.model, message["version"])))

    def set_state(self, state: State | SessionState) -> Steps[dict[str, Any]]:
        version = state.version if isinstance(state, SessionState) else None
        fields = codec.state_fields(state, (yield from self.calls.manifest(self.model, version)))
        return (yield from self._changed(Call("PUT", f"{self._path}/state", fields)))

    def clear(self) -> Steps[dict[str, Any]]:
        return (yield from self._changed(Call("DELETE", f"{self._path}/state")))

    def rewind(self, to: str) -> Steps[dict[str, Any]]:
        return (yield from self._changed(Call("POST", f"{self._path}/rewind", {"to": to})))

    def _changed(self, call: Call) -> Steps[dict[str, Any]]:
        self._step = None
        info = yield from exchange(call)
        self._step = info["step"]
        return info

    def fork(self, to: str | None) -> Steps[str]:
        child = to or secrets.token_urlsafe(16)
        applied = "" if to else "session_exists"
        yield from exchange(Call("POST", f"{self._path}/fork", {"to": child}, to is None, applied))
        return child

    def checkpoint(self, name: str | None) -> Steps[str]:
        fields = {} if name is None else {"name": name}
        made = yield from exchange(Call("POST", f"{self._path}/checkpoints", fields, safe=False))
        return str(made["name"])

    def checkpoints(self) -> Steps[dict[str, int]]:
        found = yield from exchange(Call("GET", f"{self._path}/checkpoints"))
        return {entry["name"]: entry["step"] for entry in found["checkpoints"]}

    def end(self) -> Steps[None]:
        self._step = None
        yield from exchange(Call("DELETE", self._path, applied="session_not_found"))
