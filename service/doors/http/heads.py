"""What a request's head says, remembered line by line; whatever is unusual is left to uvicorn's parser.

A client sends the same lines again and again, so each line is read once, and a head costs a look per line.
"""

import re
from typing import Any, Final, NamedTuple

from stepcast.errors import StepcastError, Unauthorized, UnsupportedMediaType

from ...settings import Settings
from ...telemetry import Metrics
from ..answers import answer_type, check_page, request_type
from ..bodies import JSON
from ..hosts import Hosts
from ..intake import Intake
from ..keys import ANYBODY, Keys, Principal, digest_of, origins
from ..oip.infer import Inference
from ..request_ids import HEADER, RequestId, given_id
from ..steps import Steps, Way
from .tensor_bodies import LENGTH, Packing, packing_of

KNOWN_LINES: Final = 8192
KNOWN_CALLERS: Final = 1024
KNOWN_WAYS: Final = 1024

_FIELD: Final = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\x20-\x7e\x80-\xff]*)")
_HEEDED: Final = frozenset(
    {b"content-type", b"accept", b"accept-encoding", b"authorization", b"x-api-key", b"origin", b"sec-fetch-site"}
)
_NEVER: Final = frozenset({b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"trailer"})
_CLOSE: Final = b"connection:close"
TENSORS: Final = b"tensors:"
"""The kind of a body of the Open Inference Protocol, whose content type says nothing."""
_ODD: Final = -1
_NOTHING: Final = b""
_ENDING: Final[dict[bytes, int | bytes]] = {b"keep-alive": _NOTHING, b"close": _CLOSE}


class Caller(NamedTuple):
    """What a head says of who asks, and how."""

    principal: Principal
    digest: bytes  # of its key
    kind: str  # content type of the body
    accepted: str  # content type of the answer
    ok: bytes  # the head of a good answer, up to the content length
    fields: bytes  # lines that every answer has,
    cors: bytes  # those for pages among them
    close: bool  # whether the connection ends with the answer
    refusal: StepcastError | None  # why the caller may not step
    ways: dict[bytes, Way]  # known ways of its namespace, by model
    packing: Packing  # of answers of the Open Inference Protocol


class JsonLength(NamedTuple):
    """How long the JSON part of a body is."""

    length: int


Head = tuple[int, Caller, RequestId | None, int | None]
"""The body's length, who asks, the request's id, and the length of the JSON part; None: the whole body is one."""


class Heads:
    """Reads heads of steps, for connections (connection.py) below ASGI."""

    def __init__(
        self,
        steps: Steps,
        inference: Inference,
        keys: Keys,
        hosts: Hosts,
        intake: Intake,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.inference = inference
        self.steps, self._keys, self._hosts, self.metrics = steps, keys, hosts, metrics
        self.intake, self.settings, self.tries, self.blocked = intake, settings, keys.tries, keys.tries.blocked
        self._body_limit = settings.body_limit_bytes
        self._origins = origins(settings.cors_origins)
        self._lines: dict[bytes, int | bytes | JsonLength] = {}
        self._callers: dict[tuple[bytes, ...], Caller] = {}
        self._ways: dict[str, dict[bytes, Way]] = {}
        keys.on_change(self._callers.clear)

    def read(self, head: bytes, kind: bytes = _NOTHING) -> Head | None:
        """A head without its request line; None where it is unusual. `kind`: the body's, whatever the head says."""
        lines = self._lines
        length: Any = 0
        said: list[Any] = [kind] if kind else []
        name: RequestId | None = None
        json_bytes: int | None = None
        for line in head.split(b"\r\n"):
            meaning = lines.get(line)
            if meaning is None:
                meaning = self._learn(line)
            if meaning:
                if meaning.__class__ is bytes:
                    said.append(meaning)
                elif meaning.__class__ is RequestId:
                    name = meaning
                elif meaning.__class__ is JsonLength:
                    json_bytes = meaning.length
                elif length or meaning == _ODD:
                    return None
                else:
                    length = meaning
        key = tuple(said)
        caller = self._callers.get(key) or self._meet(key)
        return (length, caller, name, json_bytes) if length and caller is not None else None

    def _learn(self, line: bytes) -> int | bytes | JsonLength:
        """What a line means: the content length, a field that matters, nothing, or that the head is unusual."""
        found = _FIELD.fullmatch(line)
        name, value = (b"", b"") if found is None else (found[1].lower(), found[2].rstrip(b" \t"))
        meaning: int | bytes | JsonLength = _NOTHING
        if found is None or name in _NEVER:
            meaning = _ODD
        elif name == b"content-length":
            length = int(value) if value.isdigit() and len(value) < 10 else 0
            meaning = length if 0 < length <= self._body_limit else _ODD
        elif name == b"connection":
            meaning = _ENDING.get(value.lower(), _ODD)
        elif name == b"host":
            meaning = _NOTHING if self._hosts.accepts(value) else _ODD
        elif name == LENGTH:
            meaning = JsonLength(int(value)) if value.isdigit() and len(value) < 10 else _ODD
        elif name in _HEEDED:
            meaning = b"%s:%s" % (name, value)
        elif name == HEADER:  # another one with each request: not worth remembering
            return given_id(value) or _NOTHING
        if len(self._lines) >= KNOWN_LINES:
            self._lines.clear()
        self._lines[line] = meaning
        return meaning

    def _meet(self, said: tuple[bytes, ...]) -> Caller | None:
        """The caller whose head says this; None where it says something twice, or where others have to judge it."""
        fields = {name: value for name, _, value in (line.partition(b":") for line in said)}
        if len(fields) < len(said):
            return None
        principal, kind, refusal = ANYBODY, "", None
        try:
            check_page(fields)
            principal = self._keys.look_up(fields).require("step")
            kind = request_type(fields) if TENSORS not in said else JSON
        except (Unauthorized, UnsupportedMediaType):  # which the general way counts, or sees more of
            return None
        except StepcastError as error:
            refusal = error.with_traceback(None)
        close = _CLOSE in said
        cors = self._cors(fields.get(b"origin", b""))
        lines = cors + (b"connection: close\r\n" if close else b"")
        accepted = answer_type(fields, kind)
        ok = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\n%scontent-length: " % (accepted.encode(), lines)
        ways = self._ways.setdefault(principal.namespace, {})
        if len(self._callers) >= KNOWN_CALLERS:
            self._callers.clear()
        caller = self._callers[said] = Caller(
            *(principal, digest_of(fields), kind, accepted, ok, lines, cors, close, refusal, ways),
            packing=packing_of(fields.get(b"accept-encoding", b"")),
        )
        return caller

    def _cors(self, origin: bytes) -> bytes:
        """What FastAPI's middleware adds to an answer."""
        if not self._origins:
            return b""
        allowed = "*" if "*" in self._origins else origin.decode("latin-1")
        if not origin or allowed not in self._origins:
            return b"vary: Origin\r\n"
        return b"access-control-allow-origin: %s\r\nvary: Origin\r\n" % allowed.encode("latin-1")

    def way(self, caller: Caller, model: bytes) -> Way:
        """Where a caller's steps of a model go."""
        if len(caller.ways) >= KNOWN_WAYS:
            caller.ways.clear()
        way = caller.ways[model] = Way(caller.principal.namespace, model.decode())
        return way
