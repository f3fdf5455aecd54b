"""What a request of the Open Inference Protocol asks: its sequence, and its tensors as the inputs of a step."""

import base64
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from stepcast.errors import InvalidRequest, InvalidSessionId, ModelNotFound, ShapeMismatch

from ...engine import arrays
from ...engine.arrays import Form, Limits, Mask
from ...engine.repository import Repository, Served
from ...sessions.core import Floats
from ...sessions.edits import SESSION_ID
from ..names import Naming
from . import tensors
from .tensors import Tensor

MASK: Final = "stepcast_mask"
"""The input that says which steps are present: an example whose step is not keeps its state."""
NO_PARAMETERS: Final[Mapping[str, Any]] = MappingProxyType({})
_NUMBER_IDS: Final = "oip:"
_TEXT_IDS: Final = "oip~"
_MOST_ID: Final = 2**64 - 1
_MOST_SEQ: Final = 2**53
_OURS: Final = "stepcast_"
_RESERVED: Final = "triton_"
_HEEDLESS: Final = frozenset({"priority", "binary_data_output", "triton_enable_empty_final_response"})
"""Parameters that mean nothing to a session, or that a door heeds by itself."""


class Wish(NamedTuple):
    """An output that is asked for; `classes`: as so many of its best classes, 0: as numbers."""

    name: str
    classes: int = 0


class Request(msgspec.Struct, gc=False):
    """An inference request. Its door knows who asks."""

    model: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Wish] = ()  # none: the whole output
    version: str = ""  # "": the sequence's own, or the live one
    id: str = ""
    parameters: Mapping[str, Any] = NO_PARAMETERS  # ints, floats, texts and bools
    flags: "Flags | None" = None  # what the parameters say, if the door has read them

    @property
    def bytes(self) -> int:
        """About how many its inputs take."""
        return sum(tensor.bytes for tensor in self.inputs)


def served_of(repository: Repository, model: str, version: str = "") -> Served:
    """The version that a path or a message names ("": the live one); ModelNotFound where it is not served."""
    if not version:
        return repository.live(model)
    if not (version.isascii() and version.isdigit() and len(version) < 10):
        raise ModelNotFound(f"model {model!r} has no version {version[:64]!r}", model=model)
    return repository.require(model, int(version))


class Flags(msgspec.Struct, gc=False, frozen=True):
    """What the parameters of a request say.

    Attributes:
        name: What the client calls the sequence.
        session: Its session's id; "": the request is of no sequence.
        seq: The number that its last step shall have; None: the next.
        within_s: Longest time to wait for the run; None: the server's.
    """

    name: int | str = 0
    session: str = ""
    start: bool = False
    end: bool = False
    seq: int | None = None
    within_s: float | None = None


NO_FLAGS: Final = Flags()


@lru_cache(8192)
def session_of(name: int | str) -> str:
    """The id of a sequence's session: of text that is a session's id, that; of a number `oip:<number>`.

    Any other text is `oip~` and its UTF-8 as base64url without padding. So no two sequences share a session, except
    where text names the session of a number on purpose.
    """
    if isinstance(name, int):
        return f"{_NUMBER_IDS}{name}"
    if SESSION_ID.fullmatch(name):
        return name
    try:
        packed = _TEXT_IDS + base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")
    except UnicodeEncodeError as error:
        raise InvalidSessionId(f"sequence id {name[:64]!r} is not UTF-8") from error
    if len(packed) > 256:
        raise InvalidSessionId(f"sequence id {name[:64]!r}... is longer than a session's id can be")
    return packed


def flags_of(parameters: Mapping[str, Any]) -> Flags:
    """What the parameters say.

    Raises:
        InvalidRequest: one is of the wrong type, or of a name that is reserved; a flag without a sequence.
        InvalidSessionId: the sequence's id is longer than a session's can be.
    """
    if not parameters:
        return NO_FLAGS
    name: Any = 0
    start = end = False
    seq: int | None = None
    within_s: float | None = None
    for key, value in parameters.items():
        if key == "sequence_id":
            name = value
        elif key == "sequence_start":
            start = value
        elif key == "sequence_end":
            end = value
        elif key == "stepcast_seq":
            seq = _integer(key, value, 1, _MOST_SEQ)
        elif key == "timeout":
            within_s = (_integer(key, value, 0, _MOST_ID) / 1e6) or None
        elif key not in _HEEDLESS and (key == "headers" or key.startswith((_OURS, _RESERVED))):
            raise InvalidRequest(f"parameter {key[:64]!r} is reserved, and none that this server knows")
    if start.__class__ is not bool or end.__class__ is not bool:
        raise InvalidRequest("parameters 'sequence_start' and 'sequence_end' are true or false")
    if name.__class__ is int:
        _integer("sequence_id", name, 0, _MOST_ID)
    elif name.__class__ is not str:
        raise InvalidRequest("parameter 'sequence_id' is neither a number of 64 bits nor text")
    if name:
        return Flags(name, session_of(name), start, end, seq, within_s)
    if start or end or seq is not None:
        advice = "must specify a non-zero or non-empty correlation ID (sequence_id)"
        raise InvalidRequest(f"a request with sequence_start, sequence_end or stepcast_seq {advice}")
    return Flags(within_s=within_s)


def _integer(key: str, value: Any, least: int, most: int) -> int:
    if value.__class__ is not int or not least <= value <= most:
        raise InvalidRequest(f"parameter {key!r} is not an integer from {least} to {most}")
    return int(value)


class StepInputs(NamedTuple):
    """Checked inputs of a step: `x` (N, T, F), `mask` (N, T) or None, the axes of its outputs."""

    x: Floats
    mask: Mask | None
    form: Form
    named: Served | None  # the version by whose names they were put in their places; None: they came in one tensor


def read_inputs(given: Sequence[Tensor], served: Served, naming: Naming, limits: Limits) -> StepInputs:
    """The inputs of a step: the model's input tensor, or a tensor for each feature, whose last axis is its width.

    Raises:
        InvalidRequest: an input is unknown, twice there, or not of its type. ShapeMismatch, NonFinite, TooLarge.
    """
    by_name = {tensor.name: tensor for tensor in given}
    if len(by_name) < len(given):
        raise InvalidRequest("an input is there twice")
    mask = by_name.pop(MASK, None)
    flags = None if mask is None else tensors.numbers(mask)
    whole = by_name.get(served.manifest.input.name)
    named = whole is None or len(by_name) > 1
    if whole is None or named:
        values = naming.features.array({name: _column(tensor, naming) for name, tensor in by_name.items()})
    else:
        values = tensors.numbers(whole)
    if values.ndim not in (1, 2, 3):
        takes = f"model {served.name!r} takes [F], [N,F] or [N,T,F]"
        raise ShapeMismatch(f"inputs have shape {list(values.shape)}, {takes}", got=list(values.shape))
    lead = values.shape[:-1]
    if flags is not None and flags.size == math.prod(lead):
        flags = flags.reshape(lead)
    x, present, rank = arrays.step_inputs(values, "NWC", flags, served.manifest, limits)
    return StepInputs(x, present, arrays.form_of(rank, "NWC"), served if named else None)


def _column(tensor: Tensor, naming: Naming) -> Any:
    """One feature's values, without the last axis where its width is 1; texts and moments as lists."""
    worded, width = tensor.name in naming.features.worded, naming.widths.get(tensor.name, 1)
    values: Any
    if worded and tensor.datatype == tensors.BYTES:
        values = tensors.texts(tensor)
    else:
        values = tensors.numbers(tensor, np.float64 if worded else np.float32)
    if width > 1:
        return values
    if not values.ndim or values.shape[-1] != 1:
        shape = list(values.shape)
        raise ShapeMismatch(f"input {tensor.name!r} has shape {shape}, want 1 value in its last axis", got=shape)
    column = values[..., 0]
    return column.tolist() if worded else column
