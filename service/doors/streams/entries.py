"""An entry of a stream becomes a step; a step's answer becomes a letter. Both are flat fields of bytes.

entry    session, inputs (JSON) or packed (float32), and if need be time, seq, mask, shape
letter   session, step, stream, entry, outputs (JSON) or packed (float32), version
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Raw

from stepcast.errors import InvalidRequest, StepcastError

from ...engine import arrays
from ...records.block import Letter, Outbox
from ...records.layout import POSITION
from ...sessions.core import Answers
from ...sessions.feed import Feed
from ...store.streams import Entry
from ...telemetry import as_ours
from .. import bodies
from ..answers import encode
from ..bodies import JSON, MSGPACK, Positive, StepBody
from ..names import style_of
from ..steps import Axes, text

if TYPE_CHECKING:
    from .consumer import Consumer

_KNOWN: Final = frozenset((b"session", b"inputs", b"packed", b"time", b"seq", b"mask", b"shape"))
_OUTPUTS_AT: Final = len(b'"outputs":')


class Step(Feed):
    """A step that an entry asks for, until it is done with.

    Attributes:
        kind: Content type of its inputs, `raw`.
        form: The axes of the inputs, once they were read; those of the answer.
        tries: How often it was refused for now; `since` when first, monotonic.
    """

    form: Axes
    __slots__ = ("consumer", "entry", "form", "kind", "raw", "session", "since", "tries")

    def __init__(self, consumer: "Consumer", entry: Entry, name: bytes, outbox: Outbox | None) -> None:
        super().__init__(POSITION.pack(name, entry.first, entry.second), outbox)
        self.consumer, self.entry = consumer, entry
        self.session = entry.fields.get(b"session", b"").decode("utf-8", "replace")
        self.kind, self.raw, self.form = JSON, b"", "F"
        self.tries, self.since = 0, 0.0

    def __repr__(self) -> str:
        return f"entry {self.entry.id.decode()} of stream {self.entry.share.name.decode()!r}"

    def stepped(self, answers: Answers, row: int, step: int) -> None:
        self.consumer.stepped(self, answers, row, step)

    def redelivered(self, answers: Answers | None, step: int) -> None:
        self.consumer.redelivered(self, answers, step)

    def refused(self, error: BaseException) -> None:
        self.consumer.refused(self, error)

    def letter(self, answers: Answers, row: int, step: int) -> Letter:
        field, value = b"problem", b""
        try:
            if self.kind == JSON:
                said = text(answers, row, step, self.form)
                field, value = b"outputs", said[_OUTPUTS_AT : said.rindex(b',"step":')]
            else:
                form = self.form if isinstance(self.form, str) else self.form.axes
                field, value = b"packed", arrays.by_form(answers.outputs[row], form).tobytes()
        except Exception as error:  # it was stepped: others of the batch must not suffer
            value = encode(as_ours(error).problem(), JSON)
        share, at = self.entry.share.name, self.entry.id
        number, version = b"%d" % step, b"%d" % answers.version
        fields = b"session", self.session.encode(), b"step", number, b"stream", share, b"entry", at, field, value
        return Letter(share, at, (*fields, b"version", version))


def read(fields: dict[bytes, bytes], step: Step) -> int | None:
    """Take an entry's fields apart: sets the step's `kind` and `raw`, and returns `seq`.

    Raises InvalidRequest, Malformed.
    """
    if not fields.keys() <= _KNOWN:
        unknown = sorted(name.decode("utf-8", "replace") for name in fields.keys() - _KNOWN)
        raise InvalidRequest(f"the entry has unknown fields {unknown}. Known: {_names(_KNOWN)}.")
    if b"session" not in fields or (b"inputs" in fields) == (b"packed" in fields):
        raise InvalidRequest(f"the entry has {_names(fields)}, want 'session' and one of 'inputs' and 'packed'")
    if b"inputs" in fields:
        step.kind, step.raw = JSON, fields[b"inputs"]
    else:
        step.kind, step.raw = MSGPACK, fields[b"packed"]
    if b"time" in fields:
        step.raw = _with_time(step, fields[b"time"])
    seq: int | None = _part(Positive, fields, "seq")
    return seq


def general(fields: dict[bytes, bytes], step: Step, seq: int | None) -> StepBody:
    """The same as the body of a step of any kind."""
    packed = step.kind == MSGPACK
    inputs = Raw(msgspec.msgpack.encode(step.raw)) if packed else bodies.decode(step.raw, Raw, JSON)
    mask, shape = _part(Any, fields, "mask"), _part(list[int] | None, fields, "shape")
    encode_mask = msgspec.msgpack.encode if packed else msgspec.json.encode
    return StepBody(inputs, seq=seq, mask=Raw(encode_mask(mask)), shape=shape)


def _part(kind: Any, fields: dict[bytes, bytes], name: str) -> Any:
    """A field as JSON of a type; None: there is none."""
    raw = fields.get(name.encode())
    return None if raw is None else bodies.part(kind, Raw(raw), JSON, f"$.{name}")


def _names(names: Iterable[bytes]) -> list[str]:
    return sorted(name.decode("utf-8", "replace") for name in names)


def _with_time(step: Step, time: bytes) -> bytes:
    """Named inputs with the moment that stands beside them; a number is Unix seconds, other text ISO 8601."""
    if step.kind != JSON or style_of(Raw(step.raw), JSON) != "columns":
        raise InvalidRequest("the entry has 'time', which goes with 'inputs' that are an object by feature name")
    columns = bodies.part(dict[str, Raw], Raw(step.raw), JSON, "$.inputs")
    if "time" in columns:
        raise InvalidRequest("the entry has 'time' twice: as a field, and in $.inputs")
    try:
        moment = msgspec.json.encode(float(time))
    except ValueError:
        moment = msgspec.json.encode(time.decode("utf-8", "replace"))
    return msgspec.json.encode({"time": Raw(moment), **columns})


def problem(error: StepcastError) -> bytes:
    """Why an entry cannot be stepped."""
    return encode(error.problem(), JSON)
