"""Steps: one reader and one writer for every door. What comes in is bytes, what goes out is bytes.

A step of one or more examples is taken apart in one go: msgspec decodes it, struct packs it. Everything else
(sequences, masks, lists in msgpack, what is no good) goes the general way, which gives exact errors.
"""

import asyncio
import math
import struct
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from msgspec.structs import astuple

from stepcast.errors import (
    InvalidRequest,
    NonFinite,
    SessionNotFound,
    ShapeMismatch,
    StateVersionMismatch,
    StepcastError,
)

from ..engine import arrays
from ..engine.arrays import Floats, Form, Mask
from ..engine.repository import Served
from ..sessions.core import Address, Answers, Waiter
from ..sessions.edits import States, check_id
from ..sessions.many import Columns, Many
from . import bodies
from .answers import dumps, encode, pack
from .bodies import JSON, MSGPACK, BatchBody, Number, Positive, StepBody, decode, flags, frame, numbers
from .large import LARGE_BYTES, aside, size_of
from .names import Named, Names, check_layout, record_of, style_of, worded_record_of
from .names import read as read_named

T = TypeVar("T")

_MOST_ROWS: Final = 1024  # examples in a step that is taken apart in one go
_FEW_FEATURES: Final = 64  # up to these, Python's own numbers are faster than numpy's calls; float64 holds their sum
_NOT_PLAIN: Final = (*bodies.UNREADABLE, struct.error, OverflowError, TypeError)  # raised at a step of another kind


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


class Bare(msgspec.Struct, gc=False):
    """Inputs that came alone."""

    inputs: Any
    seq: None = None
    shape: None = None


Decoders = tuple[Callable[[bytes], Any], Callable[[bytes], Any]]  # of JSON and msgpack
Axes = Form | Named  # of a caller's array, or how its inputs are named
Plain = tuple[Any, bytes, Axes]  # a decoded struct, its inputs (N, F) as float32, and their axes


def _decoders(record: type[msgspec.Struct] | None, alone: bool = False) -> tuple[Decoders, Decoders, Decoders]:
    """The decoders of bodies, frames and bare inputs, which may be such a record; `alone`: are one."""
    lists, raw = list[Number | list[Number]], bytes
    kinds = (record, record) if alone else (lists, raw) if record is None else (lists | record, raw | record)
    json, msgpack = _with_inputs(PlainJson, kinds[0]), _with_inputs(PlainMsgpack, kinds[1])
    bare = msgspec.json.Decoder(kinds[0]).decode
    json_frame, msgpack_frame = (frame(body, Literal["step"], gc=False) for body in (json, msgpack))
    return (
        (msgspec.json.Decoder(json).decode, msgspec.msgpack.Decoder(msgpack).decode),
        (msgspec.json.Decoder(json_frame).decode, msgspec.msgpack.Decoder(msgpack_frame).decode),
        (lambda inputs: Bare(bare(inputs)), Bare),
    )


def _with_inputs(body: type[msgspec.Struct], inputs: Any) -> type[msgspec.Struct]:
    return msgspec.defstruct(body.__name__, [("inputs", inputs)], bases=(body,), forbid_unknown_fields=True, gc=False)


class Reader:
    """Takes steps apart that fit one served version, of at most so many examples.

    Attributes:
        bodies, frames, bare: The decoders of a step over HTTP, over a WebSocket, and of inputs alone, JSON or raw.
    """

    def __init__(self, served: Served, most: int, names: Names, renamed: bool) -> None:
        self.served, self._features, self._most = served, served.n_features, min(most, _MOST_ROWS)
        row = struct.Struct(f"<{served.n_features}f")
        self._size, self._pack, self._unpack = served.input_bytes, row.pack, row.unpack
        self._needed: list[int] = np.flatnonzero(arrays.needed(served.manifest)).tolist()
        self._named = Named(names, "F", "columns", served)
        record = None if renamed else record_of(served.manifest)  # else a session's own version has to be looked up
        self.bodies, self.frames, self.bare = _decoders(record)
        self._features_of = names.of(served).features
        worded = None if renamed else worded_record_of(served.manifest)
        self._worded: tuple[Decoders, Decoders, Decoders] | None = None  # of steps by their moment, or with categories
        if worded is not None:
            self._worded = _decoders(worded, alone=True)

    def read(self, body: bytes, kind: str, decoders: Decoders) -> Plain | None:
        """A step; None: it is of another kind or no good, and goes the general way."""
        try:
            if kind != JSON:
                asked = decoders[1](body)
                plain = self._read_raw(asked)
                return None if plain is None else (asked, *plain)
            asked = decoders[0](body)
            inputs = asked.inputs
            try:
                if inputs.__class__ is list:
                    return asked, self._pack(*inputs), "F"
                return asked, self._pack(*astuple(inputs)), self._named
            except struct.error:  # a null, some rows, or another number of readings
                if inputs.__class__ is not list:
                    return asked, self._pack_row(astuple(inputs)), self._named
                if not (inputs and isinstance(inputs[0], list)):
                    return asked, self._pack_row(inputs), "F"
                if len(inputs) > self._most:
                    return None
                return asked, b"".join(map(self._pack_row, inputs)), "NF"
        except _NOT_PLAIN:
            return None if self._worded is None else self._read_words(body, kind, decoders)

    def _read_words(self, body: bytes, kind: str, decoders: Decoders) -> Plain | None:
        """The same of a step of one example by its moment, or with categories."""
        assert self._worded is not None
        try:
            place = 0 if decoders is self.bodies else 1 if decoders is self.frames else 2
            asked = self._worded[place][kind != JSON](body)
            row = self._features_of.row(astuple(asked.inputs))
            if kind != JSON and not all(value is None or math.isfinite(value) for value in row):
                return None
            return asked, self._pack_row(row), self._named
        except (*_NOT_PLAIN, StepcastError):  # whose message the general way gives exactly
            return None

    def _pack_row(self, row: Sequence[Any]) -> bytes:
        """Readings as float32, NaN where they are missing; struct.error where they do not fit."""
        if None not in row:
            return self._pack(*row)
        data = self._pack(*[math.nan if value is None else value for value in row])
        if [True for i in self._needed if row[i] is None]:
            raise struct.error("a reading is missing that must not")
        return data

    def _read_raw(self, asked: Any) -> tuple[bytes, Axes] | None:
        if asked.inputs.__class__ is bytes:
            return self.raw(asked.inputs, asked.shape)
        values = self._pack(*[math.nan if value is None else value for value in astuple(asked.inputs)])
        plain = self.raw(values, None)
        return None if plain is None else (plain[0], self._named)

    def raw(self, data: bytes, shape: list[int] | None) -> tuple[bytes, Form] | None:
        """The inputs (N, F) of a step as little-endian float32, and their axes by their shape (None: one example).

        Returns:
            None where it is no single step of few examples, or no good.
        """
        features, rows = self._features, 1
        form: Form = "F"
        if shape is not None and shape != [features]:
            if shape[1:] not in ([features], [1, features]) or not 0 < shape[0] <= self._most:
                return None
            rows, form = shape[0], "NF" if len(shape) == 2 else "NTF"
        if len(data) != rows * self._size:
            return None
        if rows == 1 and features <= _FEW_FEATURES and math.isfinite(sum(self._unpack(data))):
            return data, form
        flat = np.frombuffer(data, np.float32)
        if not arrays.are_finite(flat):
            x = flat.reshape(rows, -1)
            if arrays.refused_rows(x, self.served.manifest):
                return None
            data = arrays.canonical(x).tobytes()
        return data, form


def read_columns(asked: BatchBody, kind: str, served: Served, names: Names, asker: "Asker", count: int) -> Columns:
    """The columns of a batch step of `count` sessions, checked against a version; sets the asker's form.

    Raises:
        ShapeMismatch: they have different lengths, or the wrong number of features. InvalidRequest.
    """
    want, style = [count, served.n_features], style_of(asked.inputs, kind)
    if style is None:
        x, named = numbers(asked.inputs, want if asked.shape is None else asked.shape, kind), None
    else:
        x, named = read_named(asked.inputs, asked.shape, kind, names.of(served).features, style), served
        asker.form = Named(names, "NF", style, served)
    got = list(x.shape)
    if got != want or not count:
        raise ShapeMismatch(f"$.inputs has shape {got}, want {want}: one row per session", got=got)
    if asked.seq is not None and len(asked.seq) != count:
        raise ShapeMismatch(f"$.seq has {len(asked.seq)} numbers for {count} sessions")
    if arrays.are_finite(x.reshape(-1)):
        return Columns(x, asked.seq, {}, named)
    return Columns(arrays.canonical(x), asked.seq, arrays.refused_rows(x, served.manifest), named)


# --- the writer -----------------------------------------------------------------------------------------------------


def text(answers: Answers, row: int, step: int, form: Axes) -> bytes:
    """A step's answer as JSON, from `"outputs"` on."""
    texts = answers.made.get(JSON)
    if texts is None:  # made once for all that wait: B * N * T rows without brackets
        outputs = answers.outputs
        texts = answers.made[JSON] = dumps(outputs.reshape(-1, outputs.shape[3]))[2:-2].split(b"],[")
    if form == "F":
        return b'"outputs":[%s],"step":%d,"version":%d}' % (texts[row], step, answers.version)
    if isinstance(form, Named):
        return form.text(answers, row, step, texts)
    _, n, t, _ = answers.outputs.shape
    if t > 1 or form == "NFT":
        said = dumps(arrays.by_form(answers.outputs[row], form))
    else:
        rows = texts[row * n : row * n + n]
        said = b"[[%s]]" % b"],[".join(rows) if form == "NF" else b"[[[%s]]]" % b"]],[[".join(rows)
    return b'"outputs":%s,"step":%d,"version":%d}' % (said, step, answers.version)


def packed(answers: Answers, row: int, step: int, form: Axes, fields: dict[str, Any]) -> bytes:
    """A step's answer as msgpack, behind `fields`."""
    if isinstance(form, Named):
        said = {"outputs": form.outputs(answers, row, step), "step": step, "version": answers.version}
        return encode(fields | said, MSGPACK)
    outputs = arrays.by_form(answers.outputs[row], form)
    said = {"outputs": outputs.tobytes(), "step": step, "version": answers.version, "shape": list(outputs.shape)}
    return pack(fields | said)


# --- on the way to the sessions -------------------------------------------------------------------------------------


class Asker(Waiter, Protocol):
    """Who waits for a step; `form` is set to that of its inputs, which is the answer's."""

    __slots__ = ("form",)

    form: Axes
    creates: bool


class HttpWaiter(Asker, Protocol):
    """Who waits for a step, or a batch step, over HTTP: its answer is a body."""

    __slots__ = ("kind",)

    kind: str  # content type of the answer
    stays: bool  # it waits until it is answered: what is accepted is applied, whatever becomes of the client
    creates: bool = True

    def answered(self, body: bytes) -> None:
        """Take the answer."""

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        try:
            if self.kind == JSON:
                body = b"{" + text(answers, row, step, self.form)
            else:
                body = packed(answers, row, step, self.form, {})
        except Exception as error:  # others of the batch must not suffer
            self.refused(error)
        else:
            self.answered(body)

    def stepped_many(self, many: Many) -> None:
        """All steps of the batch were made or refused."""
        try:
            errors = {str(i): error.problem() for i, error in sorted(many.errors.items())}
            outputs = self.form.many(many.outputs) if isinstance(self.form, Named) else many.outputs
            body = encode({"outputs": outputs, "steps": many.steps, "errors": errors}, self.kind)
        except Exception as error:
            self.refused(error)
        else:
            self.answered(body)


class Read(NamedTuple):
    """What a step's inputs are: (N, T, F), their mask (N, T), the caller's axes; checked against a version."""

    x: Floats
    mask: Mask | None
    form: Axes
    served: Served


class Way:
    """Where the steps of a namespace's sessions of a model go; `prefix` is that of the sessions' keys."""

    __slots__ = ("model", "namespace", "prefix", "reader", "seen")

    reader: Reader  # of the live version, as it was at the repository's change `seen`

    def __init__(self, namespace: str, model: str) -> None:
        self.namespace, self.model, self.seen = namespace, model, -1
        self.prefix = f"{namespace}/{model}/"

    def address(self, session: str) -> Address:
        """A session's address; InvalidSessionId where it can have none."""
        return Address(self.namespace, self.model, check_id(session))


class Steps:
    """Hands steps to the sessions, for every door."""

    def __init__(self, states: States) -> None:
        self.states, self.repository, self.turns = states, states.repository, states.sessions
        self.limits = arrays.Limits(states.settings.steps_limit, states.settings.examples_limit)
        self._tasks: set[asyncio.Task[None]] = set()
        self._names: dict[str, Names] = {}
        self._readers: dict[str, tuple[int, Reader]] = {}  # by model, and of which change of the repository

    def look(self, way: Way) -> Reader:
        """The reader of a way's live version; ModelNotFound where it has none."""
        if way.seen != self.repository.changes:
            changes, model = self.repository.changes, way.model
            seen, reader = self._readers.pop(model, (-1, None))  # nothing is kept of a version that is gone
            if reader is None or seen != changes:
                live, renamed = self.repository.live(model), self.repository.renamed(model)
                reader = Reader(live, self.limits.examples, self.names(model).learn(), renamed)
            self._readers[model] = changes, reader
            way.reader, way.seen = reader, changes
        return way.reader

    def names(self, model: str) -> Names:
        """The names of a model's versions."""
        return self._names.setdefault(model, Names(self.repository, model))

    def looks_first(self, model: str, asked: StepBody, kind: str) -> bool:
        """Whether it is the session's version that says what a step's inputs are, and not just as well the live one."""
        if self.repository.mixed(model):
            return True
        return self.repository.renamed(model) and style_of(asked.inputs, kind) is not None

    def take(self, way: Way, session: str, body: bytes, kind: str, asker: HttpWaiter) -> None:
        """Take the body of a step. All that comes of it, the asker hears, maybe before this returns."""
        try:
            if way.seen != self.repository.changes:
                self.look(way)
            if len(body) > LARGE_BYTES:
                self.later(self._take_large(way, session, body, kind, asker))
                return
            plain = way.reader.read(body, kind, way.reader.bodies)
            if plain is not None:
                asked, data, asker.form = plain
                if not (asker.stays and self.turns.join(way.prefix + session, data, asked.seq, asker)):
                    self.queue(way, session, data, asked.seq, asker)
                return
            self.take_any(way, session, decode(body, StepBody, kind), kind, asker)
        except Exception as error:
            asker.refused(error)

    def take_any(self, way: Way, session: str, asked: StepBody, kind: str, asker: Asker) -> None:
        """Take a step of any kind; raises what it is refused with at once, the rest the asker hears."""
        if len(self.repository.versions(way.model)) == 1:
            self.start(way, session, asked, kind, asker)
        else:
            self.later(self.start_own(way, session, asked, kind, asker))

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done that tells its caller itself what comes of it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take_large(self, way: Way, session: str, body: bytes, kind: str, asker: HttpWaiter) -> None:
        """The same of a body that would hold up others."""
        try:
            asked = await aside(len(body), decode, body, StepBody, kind)
        except Exception as error:
            asker.refused(error)
        else:
            await self.start_own(way, session, asked, kind, asker)

    def queue(self, way: Way, session: str, data: bytes, seq: int | None, asker: Asker) -> None:
        """Queue a step (N, F) of a session that is not hot and idle; raises what it is refused with at once."""
        named = asker.form.read_by if isinstance(asker.form, Named) else None
        x = np.frombuffer(data, np.float32).reshape(-1, 1, way.reader.served.n_features)
        self.turns.step(way.address(session), x, None, seq, asker, None, named)

    def start(
        self, way: Way, session: str, asked: StepBody, kind: str, asker: Asker, served: Served | None = None
    ) -> None:
        """Queue a step of any kind, checked against a version (None: the live one); raises what it is refused with."""
        address, served = way.address(session), served or self.look(way).served
        self._hand(address, asked, asker, self._read(way, asked, kind, served))

    def _read(self, way: Way, asked: StepBody, kind: str, served: Served) -> Read:
        """The inputs of a step, checked against a version; in any thread."""
        style = style_of(asked.inputs, kind)
        if style is None:
            values = numbers(asked.inputs, asked.shape, kind)
        else:
            check_layout(asked.format)
            values = read_named(asked.inputs, asked.shape, kind, self.names(way.model).of(served).features, style)
        x, mask, rank = arrays.step_inputs(values, asked.format, flags(asked.mask, kind), served.manifest, self.limits)
        form = arrays.form_of(rank, asked.format)
        return Read(x, mask, form if style is None else Named(self.names(way.model), form, style, served), served)

    def _hand(self, address: Address, asked: StepBody, asker: Asker, read: Read) -> None:
        """Queue a step whose inputs were read; raises what it is refused with."""
        asker.form = read.form
        named = read.served if isinstance(read.form, Named) else None
        self.turns.step(address, read.x, read.mask, asked.seq, asker, asked.version_policy, named)

    async def start_own(self, way: Way, session: str, asked: StepBody, kind: str, asker: Asker) -> None:
        """Queue a step that is large, or whose inputs may be of the session's own version, not of the live one."""
        try:
            address, size = way.address(session), size_of(asked.inputs, asked.mask)
            named = style_of(asked.inputs, kind) is not None
            read = await self.by_own(way, session, named, lambda s: aside(size, self._read, way, asked, kind, s))
            self._hand(address, asked, asker, read)
        except Exception as error:
            asker.refused(error)

    async def by_own(self, way: Way, session: str, named: bool, read: Callable[[Served], Awaitable[T]]) -> T:
        """A step's inputs, read and checked against the live version, or else against the session's own.

        Args:
            named: They came by name.
        """
        one, served = len(self.repository.versions(way.model)) == 1, None
        if not one and named and self.repository.renamed(way.model):
            served = await self._own(way, session)
        try:
            return await read(served or self.look(way).served)
        except (ShapeMismatch, NonFinite, InvalidRequest):
            own = None if one or served is not None else await self._own(way, session)
            if own is None:
                raise
            return await read(own)

    async def _own(self, way: Way, session: str) -> Served | None:
        """The version that made a session's state; None: no version did, or it is not served."""
        with suppress(SessionNotFound, StateVersionMismatch):
            return (await self.states.view(way.address(session))).served
        return None

    def take_many(self, way: Way, body: bytes, kind: str, asker: HttpWaiter) -> None:
        """Take the body of a batch step. All that comes of it, the asker hears, maybe before this returns."""
        try:
            if len(body) > LARGE_BYTES:
                self.later(self._take_large_many(way, body, kind, asker))
                return
            served, asked = self.look(way).served, decode(body, BatchBody, kind)
            names = partial(bodies.part, list[str], asked.sessions, kind, "$.sessions")
            read = partial(read_columns, asked, kind, served, self.names(way.model), asker)
            self._step_many(way, asked, names, read, asker)
        except Exception as error:
            asker.refused(error)

    async def _take_large_many(self, way: Way, body: bytes, kind: str, asker: HttpWaiter) -> None:
        """The same of a body that would hold up others; it is refused for its number of sessions before its columns."""
        try:
            served, size = self.look(way).served, len(body)
            asked = await aside(size, decode, body, BatchBody, kind)
            names = await aside(size, bodies.part, list[str], asked.sessions, kind, "$.sessions")
            self.turns.batch_steps.admit(served, len(names))
            columns = await aside(size, read_columns, asked, kind, served, self.names(way.model), asker, len(names))
            if self.look(way).served is not served:  # the columns were read for another version: once more
                columns = read_columns(asked, kind, self.look(way).served, self.names(way.model), asker, len(names))
            self._step_many(way, asked, lambda: names, lambda _: columns, asker)
        except Exception as error:
            asker.refused(error)

    def _step_many(
        self,
        way: Way,
        asked: BatchBody,
        names: Callable[[], list[str]],
        read: Callable[[int], Columns],
        asker: HttpWaiter,
    ) -> None:
        step, sessions = self.turns.batch_steps.step, bytes(asked.sessions)
        step(way.namespace, way.model, sessions, names, read, way.address, asker.stepped_many)
