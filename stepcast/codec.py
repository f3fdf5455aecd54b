"""Between numpy arrays and messages, for both of the SDK's transports: what is asked, and what was answered."""

from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
State = dict[str, dict[str, npt.NDArray[Any]]]

MSGPACK: Final = "application/msgpack"
_ANSWER_HEAD_BYTES: Final = 24
"""What the server's record takes for a kept answer beside its outputs."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a step: outputs of the inputs' rank (NaN where masked), and the number of its last step."""

    outputs: Floats
    step: int
    version: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """The answer to a rollout: outputs (N, H, O), for a classifier also the chosen classes per example."""

    outputs: Floats
    step: int
    version: int
    classes: list[list[str]] | None


@dataclass(frozen=True, slots=True)
class SessionState:
    """A session's state, layer by key, each (N, *shape), and what it belongs to."""

    state: State
    step: int
    examples: int
    version: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step's fields, and its size: N examples, T steps."""

    fields: dict[str, Any]
    examples: int
    steps: int

    def answer_bytes(self, n_outputs: int) -> int:
        """Size of the answer as the server keeps it."""
        return _ANSWER_HEAD_BYTES + 4 * self.examples * self.steps * n_outputs


def pack(fields: dict[str, Any]) -> bytes:
    """A body or frame as msgpack; the array `inputs` as raw float32 beside its shape."""
    inputs = fields.get("inputs")
    if isinstance(inputs, np.ndarray):
        fields = {**fields, "inputs": inputs.astype("<f4", copy=False).tobytes(), "shape": list(inputs.shape)}
    return msgspec.msgpack.encode(fields)


def unpack(data: bytes) -> dict[str, Any]:
    """The inverse of pack; arrays stay bytes."""
    message = msgspec.msgpack.decode(data)
    if not isinstance(message, dict):
        raise msgspec.DecodeError(f"a message is {type(message).__name__}, not a map")
    return message


def step_inputs(inputs: npt.ArrayLike, mask: npt.ArrayLike | None, layout: str) -> StepInputs:
    """The fields of a step of [F], [N,F] or [N,T,F] (`layout` NWC) or [N,F,T] (NCW); None and NaN are missing.

    Raises:
        ValueError: the inputs are not an array of numbers of rank 1 to 3.
    """
    x = as_floats(inputs)
    if x.ndim not in (1, 2, 3):
        raise ValueError(f"inputs have rank {x.ndim}, want [F], [N,F] or [N,T,F]")
    fields: dict[str, Any] = {"inputs": x}
    if mask is not None:
        fields["mask"] = np.asarray(mask).astype(int).tolist()
    if layout != "NWC":
        fields["format"] = layout
    steps = x.shape[2 if layout == "NCW" else 1] if x.ndim == 3 else 1
    return StepInputs(fields, 1 if x.ndim == 1 else x.shape[0], steps)


def as_floats(values: npt.ArrayLike) -> Floats:
    """An array of float32; None becomes NaN.

    Raises:
        ValueError: it is ragged, or has values that are not numbers.
    """
    try:
        return np.asarray(values, np.float32, order="C")
    except TypeError:  # there is a None
        return np.asarray(values, object).astype(np.float32, order="C")


def outputs(message: dict[str, Any]) -> Floats:
    """The outputs of a msgpack answer."""
    return np.frombuffer(message["outputs"], "<f4").reshape(message["shape"])


def answer(message: dict[str, Any]) -> Answer:
    """A step's answer."""
    return Answer(outputs(message), message["step"], message["version"])


def forecast(message: dict[str, Any]) -> Forecast:
    """A rollout's answer."""
    return Forecast(outputs(message), message["step"], message["version"], message.get("classes"))


def session_state(message: dict[str, Any], manifest: dict[str, Any]) -> SessionState:
    """A state.get's answer; dtypes and shapes are the manifest's."""
    state: State = {}
    for tensor in manifest["states"]:
        raw = message["state"].get(tensor["layer"], {}).get(tensor["key"])
        if raw is not None:
            array = np.frombuffer(raw, np.dtype(tensor["dtype"]).newbyteorder("<"))
            shaped = array.reshape(message["examples"], *tensor["shape"])
            state.setdefault(tensor["layer"], {})[tensor["key"]] = shaped
    return SessionState(state, message["step"], message["examples"], message["version"], message["fingerprint"])


def state_fields(state: State | SessionState, manifest: dict[str, Any]) -> dict[str, Any]:
    """The fields of a state.set: of arrays alone, or of what a get gave (with its step number and fingerprint)."""
    whole = state if isinstance(state, SessionState) else None
    arrays = whole.state if whole else state
    assert isinstance(arrays, dict)
    dtypes = {(tensor["layer"], tensor["key"]): np.dtype(tensor["dtype"]) for tensor in manifest["states"]}
    packed = {
        layer: {
            key: np.ascontiguousarray(value, dtypes.get((layer, key), np.dtype("f4")).newbyteorder("<")).tobytes()
            for key, value in keys.items()
        }
        for layer, keys in arrays.items()
    }
    if whole is None:
        return {"state": packed}
    more = {"step": whole.step, "examples": whole.examples, "version": whole.version, "fingerprint": whole.fingerprint}
    return {"state": packed, **more}
