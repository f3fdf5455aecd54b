"""Door 1: native HTTP. Bodies are decoded by service/doors/bodies.py, errors become application/problem+json.

Handlers take the raw request: validation, shapes and content types are the same for every door, and FastAPI's own
machinery stays out of the way. OpenAPI is written beside each route.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import numpy as np
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from stepcast.errors import (
    InvalidRequest,
    Malformed,
    NonFinite,
    SessionNotFound,
    ShapeMismatch,
    StateVersionMismatch,
    StepcastError,
    TooLarge,
    UnsupportedMediaType,
)
from stepcast.manifest import Manifest

from ...records.record import Record
from ...sessions.columns import Cell, ManySteps
from ...sessions.core import Address
from ...sessions.edits import States, check_id
from ...sessions.rollout import rollout
from ...sessions.stored import etag
from ...telemetry import Metrics
from .. import bodies as wire
from .. import state_files as exchange
from ..bodies import JSON, MSGPACK
from ..keys import Keys, Principal
from . import openapi

PROBLEM: Final = "application/problem+json"
KNOWN_ADDRESSES: Final = 1 << 16
Headers = dict[bytes, bytes]


def problem(error: StepcastError, metrics: Metrics | None = None) -> Response:
    """An error as a response."""
    if metrics is not None:
        metrics.errors.labels(error.code).inc()
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(wire.encode(error.problem(), JSON), error.status, headers, PROBLEM)


def request_type(headers: Headers, files: bool = False) -> str:
    """The body's content type; JSON where none is named.

    Raises:
        UnsupportedMediaType.
    """
    named = headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
    known = (JSON, MSGPACK, exchange.SAFETENSORS, exchange.NPZ) if files else (JSON, MSGPACK)
    if not named or named in known:
        return named or JSON
    if named in ("application/x-msgpack", "application/vnd.msgpack"):
        return MSGPACK
    if named == "application/x-www-form-urlencoded":  # curl -d without a header
        return JSON
    raise UnsupportedMediaType(f"content type {named!r} is none of {', '.join(known)}", supported=list(known))


def answer_type(headers: Headers, sent: str, files: bool = False) -> str:
    """The answer's content type: what Accept names, else the request's."""
    accept = headers.get(b"accept", b"").decode("latin-1")
    for kind in (MSGPACK, exchange.SAFETENSORS, exchange.NPZ) if files else (MSGPACK,):
        if kind in accept:
            return kind
    if JSON in accept or sent not in (JSON, MSGPACK):
        return JSON
    return sent


class Rest:
    """The handlers of /v1. `router()` gives the routes; `step` is also called without them on the hot path."""

    def __init__(self, states: States, keys: Keys) -> None:
        self.states, self.keys = states, keys
        self.sessions, self.repository = states.sessions, states.repository
        self.settings, self.metrics = states.settings, states.sessions.metrics
        self._addresses: dict[tuple[str, str, str], Address] = {}

    # --- stepping -----------------------------------------------------------------------------------------------

    async def step(self, model: str, session: str, headers: Headers, body: bytes) -> tuple[bytes, str]:
        """Advance one session; the answer's bytes and content type."""
        principal = self.keys.authenticate(headers)
        principal.require("step")
        kind = request_type(headers)
        asked = wire.decode(body, wire.StepBody, kind)
        address = Address(principal.namespace, model, check_id(session))
        inputs = await self.inputs(address, asked, kind)
        self.check_examples(len(inputs.x))
        x, mask, policy = inputs.x, inputs.mask, asked.version_policy
        answer = await self.sessions.step(address, x, mask, inputs.digest, asked.seq, policy=policy)
        outputs = wire.by_rank(answer.outputs, inputs.rank, asked.format)
        accepted = answer_type(headers, kind)
        return wire.encode({"outputs": outputs, "step": answer.step, "version": answer.version}, accepted), accepted

    async def inputs(self, address: Address, asked: wire.StepBody, kind: str) -> wire.Inputs:
        """A step's inputs as the live version takes them or, where it does not, as the session's own version does.

        Raises:
            ShapeMismatch, NonFinite, and what else wire.step_inputs raises.
        """
        limit, live = self.settings.steps_limit, self.repository.live(address.model)
        try:
            return wire.step_inputs(asked, kind, live.manifest, limit)
        except (ShapeMismatch, NonFinite) as refusal:
            if len(self.repository.versions(address.model)) == 1:
                raise
            try:
                served = (await self.states.view(address)).served
            except (SessionNotFound, StateVersionMismatch):
                raise refusal from None
            return wire.step_inputs(asked, kind, served.manifest, limit)

    async def step_many(self, model: str, headers: Headers, body: bytes) -> tuple[bytes, str]:
        """Advance many sessions by one step each; errors per item."""
        principal = self.keys.authenticate(headers)
        principal.require("step")
        kind = request_type(headers)
        done: asyncio.Future[ManySteps] = asyncio.get_running_loop().create_future()

        def then(many: ManySteps) -> None:
            if not done.done():  # the caller may be gone
                done.set_result(many)

        self.queue_many(principal.namespace, model, body, kind, then)
        many, accepted = await done, answer_type(headers, kind)
        return many_answer(many, accepted), accepted

    def queue_many(self, namespace: str, model: str, body: bytes, kind: str, then: Callable[[ManySteps], None]) -> None:
        """Queue a batch step; `then` gets it when all is done, maybe before this returns.

        Raises:
            ModelNotFound, and what the body is refused for: nothing was queued.
        """
        asked, express = wire.decode(body, wire.BatchBody, kind), self.sessions.express
        manifest = self.repository.live(model).manifest
        roster = b"%s/%s/%s" % (namespace.encode(), model.encode(), bytes(asked.sessions))
        cohorts, names = express.cohorts(roster), None
        if cohorts is None:
            names = wire.session_names(asked.sessions, kind)
            count = len(names)
        else:
            count = sum(len(cohort.keys) for cohort in cohorts)
        columns = wire.batch_inputs(asked, count, kind, manifest)
        many = ManySteps(count, manifest.n_outputs, then)
        places: Sequence[int] = range(count)
        x, seqs = columns.x[:, 0], columns.seqs
        if cohorts is not None and columns.finite and express.step_cohorts(cohorts, model, x, seqs, many):
            return
        names = names or wire.session_names(asked.sessions, kind)
        if columns.finite:
            places = express.step_many(model, namespace, names, roster, x, seqs, many)
        for place in places:
            try:
                address = self.address(namespace, model, names[place])
                self.sessions.single_step(address, *columns.row(place), Cell(many, place))
            except StepcastError as error:
                many.refuse(place, error)

    def address(self, namespace: str, model: str, session: str) -> Address:
        """A session's address; those of late are kept ready.

        Raises:
            InvalidSessionId.
        """
        known = self._addresses.get((namespace, model, session))
        if known is None:
            known = Address(namespace, model, check_id(session))
            if len(self._addresses) >= KNOWN_ADDRESSES:
                self._addresses.clear()
            self._addresses[namespace, model, session] = known
        return known

    async def predict(self, request: Request, model: openapi.Model) -> Response:
        """The stateless full forward pass over whole sequences (output())."""
        headers, kind, _ = self._open(request, "step")
        version = _number(request, "version", None)
        served = self.repository.require(model, version) if version else self.repository.live(model)
        asked = wire.decode(await self._body(request), wire.PredictBody, kind)
        inputs = wire.predict_inputs(asked, kind, served.manifest, self.settings.steps_limit)
        rows = len(inputs.x)
        self.check_examples(rows)
        call = await self.sessions.run(served, inputs.x, inputs.mask, served.runtime.initial(rows))
        y = call.reply()
        answer: dict[str, Any] = {"version": served.version}
        if served.manifest.readout == "last":
            last = _last(y, inputs.mask)
            answer["outputs"] = last[0] if inputs.rank == 2 else last
        else:
            y = y.transpose(0, 2, 1) if asked.format == "NCW" else y
            answer["outputs"] = y[0] if inputs.rank == 2 else y
        return self._respond(answer, headers, kind)

    def check_examples(self, examples: int) -> None:
        """Raises TooLarge where a call has more examples than a session may have."""
        if examples > self.settings.examples_limit:
            raise TooLarge(f"{examples} examples (limit {self.settings.examples_limit})")

    # --- models -------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """Served models."""
        headers, kind, _ = self._open(request, "read")
        listed = [self._model(name) for name in self.repository.names()]
        return self._respond({"models": listed}, headers, kind)

    def _model(self, name: str) -> dict[str, Any]:
        live = self.repository.live(name)
        return {
            "name": name,
            "version": live.version,
            "versions": self.repository.versions(name),
            "task": live.manifest.task,
            "streaming": live.manifest.streaming,
            "device": live.runtime.device,
            "description": live.manifest.description,
        }

    async def model(self, request: Request, model: openapi.Model) -> Response:
        """The live version's manifest, with the versions there are."""
        headers, kind, _ = self._open(request, "read")
        manifest = self.repository.live(model).manifest
        versions = self.repository.versions(model)
        return self._respond({**_plain(manifest), "versions": versions}, headers, kind)

    async def version(self, request: Request, model: openapi.Model, version: openapi.Version) -> Response:
        """One version's manifest."""
        headers, kind, _ = self._open(request, "read")
        return self._respond(_plain(self.repository.require(model, version).manifest), headers, kind)

    async def retire(self, request: Request, model: openapi.Model, version: openapi.Version) -> Response:
        """Stop serving a version; refused while sessions hold it, unless ?force=true."""
        headers, kind, _ = self._open(request, "admin")
        force = request.query_params.get("force", "false").lower() in ("1", "true", "yes")
        return self._respond(await self.states.retire(model, version, force), headers, kind)

    # --- sessions -----------------------------------------------------------------------------------------------

    async def create(self, request: Request, model: openapi.Model) -> Response:
        """Create a session."""
        headers, kind, principal = self._open(request, "step")
        body = await self._body(request)
        asked = wire.decode(body or b"{}", wire.CreateBody, kind if body else JSON)
        address, record = await self.states.create(principal.namespace, model, asked)
        return self._respond(self.states.info(address, record), headers, kind, 201, record)

    async def list_sessions(self, request: Request, model: openapi.Model) -> Response:
        """Ids of sessions, a page at a time."""
        headers, kind, principal = self._open(request, "read")
        query = request.query_params
        limit = min(1000, _number(request, "limit", 100) or 100)
        found, cursor = await self.states.list_sessions(
            principal.namespace, model, query.get("prefix", ""), query.get("cursor", ""), limit
        )
        return self._respond({"sessions": found, "cursor": cursor or None}, headers, kind)

    async def info(self, request: Request, model: openapi.Model, session: openapi.Session) -> Response:
        """A session's step, examples, version, size and times."""
        headers, kind, principal = self._open(request, "read")
        address = self._address(principal, model, session)
        record = await self.states.exists(address)
        return self._respond(self.states.info(address, record), headers, kind, 200, record)

    async def end(self, request: Request, model: openapi.Model, session: openapi.Session) -> Response:
        """End and forget a session."""
        _, _, principal = self._open(request, "step")
        await self.states.end(self._address(principal, model, session), _if_match(request))
        return Response(status_code=204)

    async def get_state(
        self, request: Request, model: openapi.Model, session: openapi.Session, layer: str | None = None
    ) -> Response:
        """The state of all layers, or of one (rnnGetPreviousState)."""
        headers, kind, principal = self._open(request, "read")
        address = self._address(principal, model, session)
        view = await self.states.view(address)
        answer = self.states.state(address, view, layer)
        accepted = answer_type(headers, kind, files=layer is None)
        if accepted in (exchange.SAFETENSORS, exchange.NPZ):
            data = exchange.export(answer, accepted)
            return Response(data, 200, {"etag": etag(view.record)}, accepted)
        return self._respond(answer, headers, kind, 200, view.record)

    async def put_state(
        self, request: Request, model: openapi.Model, session: openapi.Session, layer: str | None = None
    ) -> Response:
        """Set the state of all layers, or of one (rnnSetPreviousState)."""
        headers = _headers(request)
        kind = request_type(headers, files=layer is None)
        principal = self._principal(headers, "step")
        address = self._address(principal, model, session)
        body = await self._body(request)
        if kind in (exchange.SAFETENSORS, exchange.NPZ):
            asked = wire.state_body(exchange.read(body, kind, self.settings.body_limit_bytes))
        else:
            asked = wire.decode(body, wire.StateBody, kind)
        match = _if_match(request)
        if layer is None:
            record = await self.states.put(address, asked, match)
        else:
            record = await self.states.put_layer(address, layer, asked, match)
        return self._respond(self.states.info(address, record), headers, kind, 200, record)

    async def clear_state(self, request: Request, model: openapi.Model, session: openapi.Session) -> Response:
        """Forget the state (rnnClearPreviousState)."""
        headers, kind, principal = self._open(request, "step")
        address = self._address(principal, model, session)
        record = await self.states.clear(address, _if_match(request))
        return self._respond(self.states.info(address, record), headers, kind, 200, record)

    async def fork(self, request: Request, model: openapi.Model, session: openapi.Session) -> Response:
        """A child with the same state."""
        headers, kind, principal = self._open(request, "step")
        body = await self._body(request)
        asked = wire.decode(body or b"{}", wire.ForkBody, kind if body else JSON)
        child, record = await self.states.fork(self._address(principal, model, session), asked.to)
        return self._respond(self.states.info(child, record), headers, kind, 201, record)

    async def checkpoint(self, request: Request, model: openapi.Model, session: openapi.Session) -> Response:
        """Name the session as it is now."""
        headers, kind, principal = self._open(request, "step")
        body = await self._body(request)
        asked = wire.decode(body or b"{}", wire.CheckpointBody, kind if body else JSON)
        made = await self.states.checkpoint(self._address(principal, model, session), asked.name)
        return self._respond(made, headers, kind, 201)

    async def checkpoints(self, request: Request, model: openapi.Model, session: openapi.Session) -> Response:
        """A session's checkpoints."""
        headers, kind, principal = self._open(request, "read")
        found = await self.states.checkpoints(self._address(principal, model, session))
        return self._respond({"checkpoints": found}, headers, kind)

    async def rewind(self, request: Request, model: openapi.Model, session: openapi.Session) -> Response:
        """Go back to a checkpoint."""
        headers, kind, principal = self._open(request, "step")
        asked = wire.decode(await self._body(request), wire.RewindBody, kind)
        address = self._address(principal, model, session)
        record = await self.states.rewind(address, asked.to, _if_match(request))
        return self._respond(self.states.info(address, record), headers, kind, 200, record)

    async def rollout(self, request: Request, model: openapi.Model, session: openapi.Session) -> Response:
        """Run free, feeding predictions back."""
        headers, kind, principal = self._open(request, "step")
        asked = wire.decode(await self._body(request), wire.RolloutBody, kind)
        address = self._address(principal, model, session)
        return self._respond(await rollout(self.states, address, asked, kind), headers, kind)

    # --- helpers ------------------------------------------------------------------------------------------------

    def _principal(self, headers: Headers, role: str) -> Principal:
        principal = self.keys.authenticate(headers)
        principal.require(role)
        return principal

    def _open(self, request: Request, role: str) -> tuple[Headers, str, Principal]:
        headers = _headers(request)
        return headers, request_type(headers), self._principal(headers, role)

    def _address(self, principal: Principal, model: str, session: str) -> Address:
        return Address(principal.namespace, model, check_id(session))

    async def _body(self, request: Request) -> bytes:
        limit, size, parts = self.settings.body_limit_bytes, 0, []
        try:
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large(limit)
                parts.append(part)
        except ClientDisconnect as error:
            raise Malformed("the connection was lost in the body") from error
        return b"".join(parts)

    def _respond(
        self, answer: dict[str, Any], headers: Headers, sent: str, status: int = 200, record: Record | None = None
    ) -> Response:
        accepted = answer_type(headers, sent)
        extra = {} if record is None else {"etag": etag(record)}
        return Response(wire.encode(answer, accepted), status, extra, accepted)

    def router(self) -> APIRouter:
        """The routes of /v1 with their OpenAPI."""
        router = APIRouter(prefix="/v1")
        session = "/models/{model}/sessions/{session}"

        def route(method: str, path: str, handler: Callable[..., Awaitable[Response]]) -> None:
            router.add_api_route(
                path,
                handler,
                methods=[method],
                name=handler.__name__,
                operation_id=openapi.operation_id(method, path),
                **openapi.describe(method, path, handler.__doc__ or ""),
            )

        async def step(request: Request, model: openapi.Model, session: openapi.Session) -> Response:
            """Advance a session by one or more steps (rnnTimeStep)."""
            data, kind = await self.step(model, session, _headers(request), await self._body(request))
            return Response(data, 200, None, kind)

        async def step_many(request: Request, model: openapi.Model) -> Response:
            """Advance many sessions by one step each."""
            data, kind = await self.step_many(model, _headers(request), await self._body(request))
            return Response(data, 200, None, kind)

        async def get_layer(
            request: Request, model: openapi.Model, session: openapi.Session, layer: openapi.Layer
        ) -> Response:
            """The state of one layer (rnnGetPreviousState)."""
            return await self.get_state(request, model, session, layer)

        async def put_layer(
            request: Request, model: openapi.Model, session: openapi.Session, layer: openapi.Layer
        ) -> Response:
            """Set the state of one layer (rnnSetPreviousState)."""
            return await self.put_state(request, model, session, layer)

        async def get_state(request: Request, model: openapi.Model, session: openapi.Session) -> Response:
            """The state of all layers (rnnGetPreviousState)."""
            return await self.get_state(request, model, session)

        async def put_state(request: Request, model: openapi.Model, session: openapi.Session) -> Response:
            """Set the state of all layers (rnnSetPreviousState)."""
            return await self.put_state(request, model, session)

        route("GET", "/models", self.models)
        route("GET", "/models/{model}", self.model)
        route("GET", "/models/{model}/versions/{version}", self.version)
        route("DELETE", "/models/{model}/versions/{version}", self.retire)
        route("POST", "/models/{model}/predict", self.predict)
        route("POST", "/models/{model}/step", step_many)
        route("POST", "/models/{model}/sessions", self.create)
        route("GET", "/models/{model}/sessions", self.list_sessions)
        route("GET", session, self.info)
        route("DELETE", session, self.end)
        route("POST", session + "/step", step)
        route("GET", session + "/state", get_state)
        route("PUT", session + "/state", put_state)
        route("DELETE", session + "/state", self.clear_state)
        route("GET", session + "/state/{layer}", get_layer)
        route("PUT", session + "/state/{layer}", put_layer)
        route("POST", session + "/fork", self.fork)
        route("POST", session + "/checkpoints", self.checkpoint)
        route("GET", session + "/checkpoints", self.checkpoints)
        route("POST", session + "/rewind", self.rewind)
        route("POST", session + "/rollout", self.rollout)
        return router


def many_answer(many: ManySteps, accepted: str) -> bytes:
    """The body of the answer to a batch step."""
    errors = {str(i): error.problem() for i, error in sorted(many.errors.items())}
    return wire.encode({"outputs": many.outputs, "steps": many.steps, "errors": errors}, accepted)


def too_large(limit: int) -> TooLarge:
    """The error for a body of more than `limit` bytes."""
    return TooLarge(f"the body has more than {limit} bytes. Send less at once.", limit=limit)


def _headers(request: Request) -> Headers:
    return dict(request.scope["headers"])


def _if_match(request: Request) -> str | None:
    return request.headers.get("if-match")


def _number(request: Request, name: str, default: int | None) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10) or not int(text):
        raise InvalidRequest(f"query parameter {name!r} is {text[:32]!r}, want a positive integer")
    return int(text)


def _plain(manifest: Manifest) -> dict[str, Any]:
    return {**manifest.model_dump(mode="json"), "fingerprint": manifest.fingerprint}


def _last(y: wire.Floats, mask: wire.Mask | None) -> wire.Floats:
    """The output at each row's last present step (N, O); NaN for a row without any."""
    if mask is None:
        return y[:, -1]
    at = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    return y[np.arange(len(y)), at, :]
