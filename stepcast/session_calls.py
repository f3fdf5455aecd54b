"""What the SDK asks of one session over HTTP, as data. No I/O."""

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack, overload
from urllib.parse import quote

import numpy.typing as npt

from . import codec
from .calls import Calls, Steps, model_path
from .codec import Answer, Forecast, LayerState, Layout, SessionState
from .errors import Conflict, SessionNotFound, StateVersionMismatch
from .features import FeatureNames, Floats, Rows
from .inputs import Array, Columns, F, Form, NamedColumns, NamedRow, Records, Row, form
from .wire import Call


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


class SessionCalls:
    """What can be asked of one session. It numbers the session's steps, so its calls go one at a time."""

    def __init__(self, calls: Calls, model: str, session: str) -> None:
        self.calls, self.model, self.session = calls, model, session
        self._path = f"{model_path(model)}/sessions/{quote(session, safe='')}"
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
            SessionNotFound: never created, ended or expired.
        """
        return (yield from self.calls.exchange(Call("GET", self._path)))  # type: ignore[return-value]  # its word

    # A text is also what numpy takes for an array of no axes; a row comes first.
    @overload
    def step(self, inputs: Row, **options: Unpack[StepOptions]) -> Steps[Answer[NamedRow]]:  # type: ignore[overload-overlap]
        ...
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
            version_policy: What happens if the session's version is gone: pin (refuse), reset or replay.

        Returns:
            Outputs in the form of the inputs, and the number of steps taken.

        Raises:
            StepConflict: someone else stepped the session. The next call goes on from there.
        """
        asked = form(inputs)
        taken = yield from self._taken()
        names = (yield from self.calls.names(self.model, self._version)) if asked.named else None
        made = codec.step_inputs(asked, names, mask, layout, rows)
        made.fields["seq"] = taken + made.steps
        if version_policy is not None:
            made.fields["version_policy"] = version_policy
        message = yield from self._numbered("step", made.fields)
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
        paths: int = 0,
        levels: Sequence[float] = (),
        keep_paths: bool = False,
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
        paths: int = 0,
        levels: Sequence[float] = (),
        keep_paths: bool = False,
    ) -> Steps[Forecast[Floats]]: ...
    def rollout(
        self,
        steps: int,
        inputs: Any = None,
        *,
        commit: bool = False,
        temperature: float = 0.0,
        seed: int | None = None,
        paths: int = 0,
        levels: Sequence[float] = (),
        keep_paths: bool = False,
    ) -> Steps[Forecast[Any]]:
        """Run free for H steps, feeding predictions back.

        Args:
            steps: H.
            inputs: What is known of the future, NaN where nothing is: [H,F] or [N,H,F], or columns [H] or [N,H] by
                name, any of which may be left out. `time` is the moment of the first step.
            commit: Whether the session moves on; if not, it stays as it is.
            temperature: For a classifier, how classes are drawn; 0: the likeliest.
            seed: Of the draws.
            paths: How many sample paths are drawn for each example from the model's distribution, beside the rollout
                of its point forecasts.
            levels: Of the paths' quantiles; (): the model's own, or 0.1, 0.5, 0.9.
            keep_paths: Whether the paths themselves are answered, too.
        """
        fields: dict[str, Any] = {"steps": steps, "commit": commit, "temperature": temperature}
        if paths:
            fields |= {"paths": paths, "levels": list(levels), "keep_paths": keep_paths}
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
            fields["inputs"] = asked.array(names, future=steps)
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
            LayerNotFound: the state has no such layer.
        """
        message = yield from self.calls.exchange(Call("GET", f"{self._path}/state/{quote(layer, safe='')}"))
        manifest = yield from self.calls.manifest(self.model, message["version"])
        return codec.layer_state(message, manifest, layer)

    def set_layer(self, layer: str, state: Mapping[str, npt.ArrayLike]) -> Steps[SessionInfo]:
        """Set one layer's state by key; the others stay as they are.

        Raises:
            LayerNotFound: the state has no such layer.
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
            SessionNotFound: never created, ended or expired.
        """
        self._step = self._version = None
        yield from self.calls.exchange(Call("DELETE", self._path, applied="session_not_found"))

    def end_if_there(self) -> Steps[None]:
        """The same; it is well if there is no such session."""
        with contextlib.suppress(SessionNotFound):
            yield from self.end()


def new_id() -> str:
    """An id that no other session has."""
    return secrets.token_urlsafe(16)


def same_features(arranged: FeatureNames, answered: FeatureNames) -> FeatureNames:
    """The names of the version that answered, if inputs arranged for another one were right for it.

    Raises:
        StateVersionMismatch: the answer is of a version with other features or outputs.
    """
    ours, theirs = arranged.manifest, answered.manifest
    if ours.spelling != theirs.spelling:
        raise StateVersionMismatch(
            f"inputs were named for version {ours.version} of model {ours.name!r}, but version {theirs.version}, whose "
            "features are others, took the step. Clear or rewind the session.",
            version=theirs.version,
        )
    return answered
