"""Between numpy arrays and messages, over HTTP and on sockets: what is asked, and what was answered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from .features import FeatureNames, Floats, Rows
from .inputs import Form
from .manifest import Manifest, StateTensor

O_co = TypeVar("O_co", covariant=True)

LayerState = dict[str, npt.NDArray[Any]]
State = dict[str, LayerState]
Layout = Literal["NWC", "NCW"]

MSGPACK: Final = "application/msgpack"
_ANSWER_HEAD_BYTES: Final = 24
"""What the server's record takes for a kept answer beside its outputs."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[O_co]):
    """The answer to a step.

    Attributes:
        outputs: In the form of the inputs: an array of the same rank, a dict, a list of dicts, or a DataFrame. NaN
            where masked.
        step: The number of steps that the session has taken.
        version: The model version that answered.
    """

    outputs: O_co
    step: int
    version: int


@dataclass(frozen=True, slots=True)
class Forecast(Generic[O_co]):
    """The answer to a rollout.

    Attributes:
        outputs: An array (N, H, O), or columns [N,H] by name where what is known of the future was named.
        step: The number of steps that the session has taken; H more if the rollout was committed.
        version: The model version that answered.
        classes: Of a classifier, the chosen classes of each example.
        levels: L of them, with `paths`.
        quantiles: Of the sample paths by target, (N, H, L).
        paths: The sample paths by target, (N, P, H), if they were to be kept.
    """

    outputs: O_co
    step: int
    version: int
    classes: list[list[str]] | None
    levels: tuple[float, ...] = ()
    quantiles: dict[str, Floats] | None = None
    paths: dict[str, Floats] | None = None


@dataclass(frozen=True, slots=True)
class SessionState:
    """A session's state and what it belongs to.

    Attributes:
        state: Arrays (N, *shape) by layer, then by key.
        step: The number of steps that the session had taken.
        examples: N.
        version: The model version.
        fingerprint: Of the model's graph and state tensors; a state fits where it is the same.
    """

    state: State
    step: int
    examples: int
    version: int
    fingerprint: str


class StepInputs(NamedTuple):
    """A step's fields, its size (N examples, T steps), and the form of its inputs.

    Attributes:
        alone: The inputs had no axis of examples, though the message has one.
    """

    fields: dict[str, Any]
    examples: int
    steps: int
    form: Form[Any]
    alone: bool

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


def step_inputs(
    form: Form[Any], names: FeatureNames | None, mask: npt.ArrayLike | None, layout: Layout, rows: Rows
) -> StepInputs:
    """The fields of a step.

    Raises:
        ValueError: the inputs do not have rank 1 to 3, or `layout` or `rows` do not fit them.
    """
    x = form.array(names, rows)
    if x.ndim not in (1, 2, 3):
        raise ValueError(f"inputs have rank {x.ndim}, want [F], [N,F] or [N,T,F]")
    if rows not in ("examples", "steps"):
        raise ValueError(f"rows is {rows!r}, want 'examples' or 'steps'")
    alone = rows == "steps"
    if alone and x.ndim != 2:
        raise ValueError(f"rows='steps' is for inputs of rank 2, [T,F]; these have rank {x.ndim}")
    x = x[None] if alone else x
    fields: dict[str, Any] = {"inputs": x}
    if mask is not None:
        flags = np.asarray(mask).astype(int)
        fields["mask"] = (flags[None] if alone and flags.ndim == 1 else flags).tolist()
    if layout_of(form, layout) != "NWC":
        fields["format"] = layout
    steps = x.shape[2 if layout == "NCW" else 1] if x.ndim == 3 else 1
    return StepInputs(fields, 1 if x.ndim == 1 else x.shape[0], steps, form, alone)


def layout_of(form: Form[Any], layout: Layout) -> Layout:
    """The layout, refused with ValueError where it is unknown or the inputs have none."""
    if layout not in ("NWC", "NCW"):
        raise ValueError(f"layout is {layout!r}, want 'NWC' or 'NCW'")
    if form.named and layout != "NWC":
        raise ValueError("layout is for arrays: named inputs have no axis of features")
    return layout


def outputs(message: dict[str, Any]) -> Floats:
    """The outputs of a msgpack answer."""
    return np.frombuffer(message["outputs"], "<f4").reshape(message["shape"])


def answer(message: dict[str, Any], asked: StepInputs, names: FeatureNames | None) -> Answer[Any]:
    """A step's answer, its outputs in the form of the inputs."""
    y = outputs(message)
    return Answer(asked.form.outputs(y[0] if asked.alone else y, names), message["step"], message["version"])


def forecast(message: dict[str, Any], form: Form[Any] | None, names: FeatureNames | None) -> Forecast[Any]:
    """A rollout's answer."""
    y = outputs(message)
    made = y if form is None else form.outputs(y, names)
    n, h, _ = y.shape
    levels = tuple(message.get("levels", ()))
    return Forecast(
        made,
        message["step"],
        message["version"],
        message.get("classes"),
        levels,
        _by_target(message.get("quantiles"), (n, h, len(levels))),
        _by_target(message.get("paths"), (n, -1, h)),
    )


def _by_target(raw: Mapping[str, bytes] | None, shape: tuple[int, int, int]) -> dict[str, Floats] | None:
    return None if raw is None else {name: np.frombuffer(data, "<f4").reshape(shape) for name, data in raw.items()}


# --- state ----------------------------------------------------------------------------------------------------------


def session_state(message: dict[str, Any], manifest: Manifest) -> SessionState:
    """A state.get's answer; dtypes and shapes are the manifest's."""
    state = {
        layer: _arrays(message["state"][layer], manifest.layers[layer], message["examples"])
        for layer in manifest.layers
        if layer in message["state"]
    }
    return SessionState(state, message["step"], message["examples"], message["version"], message["fingerprint"])


def layer_state(message: dict[str, Any], manifest: Manifest, layer: str) -> LayerState:
    """The same of one layer."""
    return _arrays(message["state"], manifest.layers[layer], message["examples"])


def _arrays(raw: Mapping[str, bytes], tensors: Mapping[str, StateTensor], examples: int) -> LayerState:
    return {
        key: np.frombuffer(raw[key], np.dtype(tensor.dtype).newbyteorder("<")).reshape(examples, *tensor.shape)
        for key, tensor in tensors.items()
        if key in raw
    }


def state_fields(state: Mapping[str, Mapping[str, npt.ArrayLike]] | SessionState, manifest: Manifest) -> dict[str, Any]:
    """The fields of a state.set: of arrays alone, or of what a get gave (with its step number and fingerprint)."""
    if not isinstance(state, SessionState):
        return {"state": {layer: layer_fields(layer, keys, manifest) for layer, keys in state.items()}}
    more = {"step": state.step, "examples": state.examples, "version": state.version, "fingerprint": state.fingerprint}
    return {**state_fields(state.state, manifest), **more}


def layer_fields(layer: str, state: Mapping[str, npt.ArrayLike], manifest: Manifest) -> dict[str, bytes]:
    """One layer's arrays as raw bytes; what the manifest does not have is the server's to refuse."""
    tensors = manifest.layers.get(layer, {})
    dtypes = {key: np.dtype(tensor.dtype).newbyteorder("<") for key, tensor in tensors.items()}
    return {k: np.ascontiguousarray(value, dtypes.get(k, np.dtype("<f4"))).tobytes() for k, value in state.items()}
