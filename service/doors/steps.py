"""Steps: one reader and one writer for every door. What comes in is bytes, what goes out is bytes.

A step of one or more examples, with or without missing readings, is taken apart in one go: msgspec decodes it, struct
packs it. Everything else (sequences, masks, lists in msgpack, what is no good) goes the general way, which takes
everything and gives exact errors.
"""

import asyncio
import math
import struct
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol, cast

import msgspec
import numpy as np

from stepcast.errors import NonFinite, SessionNotFound, ShapeMismatch, StateVersionMismatch

from ..engine import arrays
from ..engine.arrays import Floats, Form
from ..engine.repository import Served
from ..sessions.core import Address, Answers, Waiter
from ..sessions.edits import States, check_id
from ..sessions.many import Columns, Many
from . import bodies
from .answers import dumps, encode, pack
from .bodies import JSON, MSGPACK, BatchBody, Number, Positive, StepBody, decode, decoder, frame, numbers

_MOST_ROWS: Final = 1024
"""Examples in a step that is taken apart in one go."""
_NOT_PLAIN: Final = (*bodies.UNREADABLE, struct.error, OverflowError, TypeError)
"""What decoding and packing raise at a step of another kind, or at none."""


# --- the reader -----------------------------------------------------------------------------------------------------


class PlainJson(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A step as most are: [F] or [N,F] of numbers and nulls."""

    inputs: list[Number | list[Number]]
    seq: Positive | None = None


class PlainMsgpack(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The same with raw inputs."""

    inputs: bytes
    seq: Positive | None = None
    shape: list[int] | None = None


Decoders = tuple[Callable[[bytes], Any], Callable[[bytes], Any]]
"""Of JSON and msgpack."""
BODIES: Final[Decoders] = decoder(PlainJson, JSON).decode, decoder(PlainMsgpack, MSGPACK).decode
FRAMES: Final[Decoders] = (
    decoder(frame(PlainJson, Literal["step"], gc=False), JSON).decode,
    decoder(frame(PlainMsgpack, Literal["step"], gc=False), MSGPACK).decode,
)
Plain = tuple[Any, bytes, Form]
"""A decoded struct, its inputs (N, F) as float32, and their axes."""


class Reader:
    """Takes steps apart that fit one served version.

    Args:
        most: Examples that a step may have.
    """

    def __init__(self, served: Served, most: int) -> None:
        self.served, self._features, self._most = served, served.n_features, min(most, _MOST_ROWS)
        self._size, self._pack = served.input_bytes, struct.Struct(f"<{served.n_features}f").pack
        self._needed: list[int] = np.flatnonzero(arrays.needed(served.manifest)).tolist()

    def read(self, body: bytes, kind: str, decoders: Decoders) -> Plain | None:
        """A step; None: it is of another kind or no good, and goes the general way."""
        try:
            if kind == JSON:
                asked = decoders[0](body)
                try:
                    return asked, self._pack(*asked.inputs), "F"
                except struct.error:  # a null, some rows, or another number of readings
                    return self._read_rows(asked)
            return self._read_raw(decoders[1](body))
        except _NOT_PLAIN:
            return None

    def _read_rows(self, asked: Any) -> Plain | None:
        inputs = asked.inputs
        if not (inputs and isinstance(inputs[0], list)):
            return asked, self._pack_row(inputs), "F"
        if len(inputs) > self._most:
            return None
        return asked, b"".join([self._pack_row(row) for row in inputs]), "NF"

    def _pack_row(self, row: list[Any]) -> bytes:
        """Readings as float32, NaN where they are missing; struct.error where they do not fit."""
        if None not in row:
            return self._pack(*row)
        data = self._pack(*[math.nan if value is None else value for value in row])
        if [True for i in self._needed if row[i] is None]:
            raise struct.error("a reading is missing that must not")
        return data

    def _read_raw(self, asked: Any) -> Plain | None:
        data, shape, features = asked.inputs, asked.shape, self._features
        form: Form = "F"
        rows = 1
        if shape is not None and shape != [features]:
            if shape[1:] not in ([features], [1, features]) or not 0 < shape[0] <= self._most:
                return None
            rows, form = shape[0], "NF" if len(shape) == 2 else "NTF"
        if len(data) != rows * self._size:
            return None
        flat = np.frombuffer(data, np.float32)
        if not arrays.are_finite(flat):
            x = flat.reshape(rows, -1)
            if arrays.refused_rows(x, self.served.manifest):
                return None
            data = arrays.canonical(x).tobytes()
        return asked, data, form


def read_columns(asked: BatchBody, count: int, kind: str, served: Served) -> Columns:
    """The columns of a batch step of `count` sessions, checked against a version.

    Raises:
        ShapeMismatch: they have different lengths, or the wrong number of features. InvalidRequest.
    """
    want = (count, served.n_features)
    x = numbers(asked.inputs, list(want) if asked.shape is None else asked.shape, kind)
    if x.shape != want or not count:
        text = f"$.inputs has shape {list(x.shape)}, want {list(want)}: one row per session"
        raise ShapeMismatch(text, got=list(x.shape))
    if asked.seq is not None and len(asked.seq) != count:
        raise ShapeMismatch(f"$.seq has {len(asked.seq)} numbers for {count} sessions")
    if arrays.are_finite(x.reshape(-1)):
        return Columns(x, asked.seq, {})
    return Columns(arrays.canonical(x), asked.seq, arrays.refused_rows(x, served.manifest))


# --- the writer -----------------------------------------------------------------------------------------------------


def text(answers: Answers, row: int, step: int, form: Form) -> bytes:
    """A step's answer as JSON, from `"outputs"` on."""
    texts = answers.made.get(JSON)
    if texts is None:  # made once for all that wait: B * N * T rows without brackets
        outputs = answers.outputs
        texts = answers.made[JSON] = dumps(outputs.reshape(-1, outputs.shape[3]))[2:-2].split(b"],[")
    if form == "F":
        return b'"outputs":[%s],"step":%d,"version":%d}' % (texts[row], step, answers.version)
    said = _array_text(answers.outputs, texts, row, form)
    return b'"outputs":%s,"step":%d,"version":%d}' % (said, step, answers.version)


def _array_text(outputs: Floats, texts: list[bytes], row: int, form: Form) -> bytes:
    """One session's outputs (N, T, O) of a batch's (B, N, T, O)."""
    _, n, t, _ = outputs.shape
    if t > 1 or form == "NFT":
        return dumps(arrays.by_form(outputs[row], form))
    rows = texts[row * n : row * n + n]
    return b"[[%s]]" % b"],[".join(rows) if form == "NF" else b"[[[%s]]]" % b"]],[[".join(rows)


def packed(answers: Answers, row: int, step: int, form: Form, fields: dict[str, Any]) -> bytes:
    """A step's answer as msgpack, behind `fields`."""
    outputs = arrays.by_form(answers.outputs[row], form)
    said = {"outputs": outputs.tobytes(), "step": step, "version": answers.version, "shape": list(outputs.shape)}
    return pack(fields | said)


def body(asker: "Asker", answers: Answers, row: int, step: int) -> bytes:
    """A step's answer as the body of a response."""
    if asker.kind == JSON:
        return b"{" + text(answers, row, step, asker.form)
    return packed(answers, row, step, asker.form, {})


def many_body(many: Many, kind: str) -> bytes:
    """The body of the answer to a batch step."""
    errors = {str(i): error.problem() for i, error in sorted(many.errors.items())}
    return encode({"outputs": many.outputs, "steps": many.steps, "errors": errors}, kind)


# --- on the way to the sessions -------------------------------------------------------------------------------------


class Asker(Waiter, Protocol):
    """Who waits for a step, and how the answer is to be written.

    Attributes:
        kind: Content type of the answer.
        form: Axes of the inputs.
        stays: It waits until it is answered: what is accepted is applied, whatever becomes of the client.
    """

    kind: str
    form: Form
    stays: bool


class ManyAsker(Asker, Protocol):
    """Who waits for a batch step."""

    def stepped_many(self, many: Many) -> None:
        """All steps of the batch were made or refused."""


class Pending:
    """One that waits in a coroutine: `future` gets the body of the response."""

    __slots__ = ("form", "future", "kind")

    stays = False

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.form: Form = "F"
        self.future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def done(self) -> bool:
        return self.future.done()

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        if not self.future.done():
            self.future.set_result(body(self, answers, row, step))

    def stepped_many(self, many: Many) -> None:
        if not self.future.done():
            self.future.set_result(many_body(many, self.kind))

    def refused(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Way:
    """Where the steps of a namespace's sessions of a model go.

    Attributes:
        prefix: Of the sessions' keys.
        reader: Of the live version, as it was at the repository's change `seen`.
    """

    __slots__ = ("model", "namespace", "prefix", "reader", "seen")

    reader: Reader

    def __init__(self, namespace: str, model: str) -> None:
        self.namespace, self.model, self.seen = namespace, model, -1
        self.prefix = f"{namespace}/{model}/"

    def address(self, session: str) -> Address:
        """A session's address; InvalidSessionId where it can have none."""
        return Address(self.namespace, self.model, check_id(session))


class Steps:
    """Hands steps to the sessions, for every door."""

    def __init__(self, states: States) -> None:
        self.states, self.repository = states, states.repository
        self.turns = states.sessions
        settings = states.settings
        self._limits = arrays.Limits(settings.steps_limit, settings.examples_limit)
        self._tasks: set[asyncio.Task[None]] = set()

    def look(self, way: Way) -> Reader:
        """The reader of a way's live version.

        Raises:
            ModelNotFound.
        """
        if way.seen != self.repository.changes:
            changes = self.repository.changes
            way.reader, way.seen = Reader(self.repository.live(way.model), self._limits.examples), changes
        return way.reader

    def take(self, way: Way, session: str, body: bytes, kind: str, asker: Asker) -> None:
        """Take the body of a step. All that comes of it, the asker hears, maybe before this returns."""
        try:
            if way.seen != self.repository.changes:
                self.look(way)
            plain = way.reader.read(body, kind, BODIES)
            if plain is not None:
                asked, data, asker.form = plain
                if not (asker.stays and self.turns.join(way.prefix + session, data, asked.seq, asker)):
                    self.queue(way, session, data, asked.seq, asker)
                return
            general = decode(body, StepBody, kind)
            if len(self.repository.versions(way.model)) == 1:
                self.start(way, session, general, kind, asker)
            else:
                task = asyncio.get_running_loop().create_task(self.start_own(way, session, general, kind, asker))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except Exception as error:
            asker.refused(error)

    def queue(self, way: Way, session: str, data: bytes, seq: int | None, asker: Asker) -> None:
        """Queue a step (N, F) of a session that is not hot and idle.

        Raises:
            StepcastError: refused at once.
        """
        self.turns.step(way.address(session), data, len(data) // way.reader.served.input_bytes, seq, asker)

    def start(
        self, way: Way, session: str, asked: StepBody, kind: str, asker: Asker, served: Served | None = None
    ) -> None:
        """Queue a step of any kind.

        Args:
            served: The version that its inputs are checked against; None: the live one.

        Raises:
            StepcastError: it is no good, or refused at once.
        """
        address, manifest = way.address(session), (served or self.look(way).served).manifest
        values = numbers(asked.inputs, asked.shape, kind)
        x, mask, rank = arrays.step_inputs(values, asked.format, asked.mask, manifest, self._limits)
        asker.form = arrays.form_of(rank, asked.format)
        if mask is None and x.shape[1] == 1:
            self.turns.step(address, x.tobytes(), len(x), asked.seq, asker, asked.version_policy)
        else:
            self.turns.call(address, x, mask, asked.seq, asker, asked.version_policy)

    async def start_own(self, way: Way, session: str, asked: StepBody, kind: str, asker: Asker) -> None:
        """Queue a step whose inputs may be another version's than the live one's: the session's own."""
        try:
            try:
                self.start(way, session, asked, kind, asker)
            except (ShapeMismatch, NonFinite):
                served = await self._own(way.address(session))
                if served is None:
                    raise
                self.start(way, session, asked, kind, asker, served)
        except Exception as error:
            asker.refused(error)

    async def _own(self, address: Address) -> Served | None:
        """The version that a session's state is of; None where it has none that is served."""
        try:
            return (await self.states.view(address)).served
        except (SessionNotFound, StateVersionMismatch):
            return None

    def take_many(self, way: Way, body: bytes, kind: str, asker: ManyAsker) -> None:
        """Take the body of a batch step. All that comes of it, the asker hears, maybe before this returns."""
        try:
            served = self.look(way).served
            asked = decode(body, BatchBody, kind)

            roster, step = bytes(asked.sessions), self.turns.batch_steps.step

            def names() -> list[str]:
                return cast(list[str], bodies.part(list[str], asked.sessions, kind, "$.sessions"))

            def read(count: int) -> Columns:
                return read_columns(asked, count, kind, served)

            step(way.namespace, way.model, roster, names, read, way.address, asker.stepped_many)
        except Exception as error:
            asker.refused(error)
