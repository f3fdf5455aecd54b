"""Numbers against the manifest: shapes, masks, missing readings, state tensors. Knows no encoding and no caller."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from stepcast.errors import InvalidRequest, NonFinite, ShapeMismatch, StateMismatch, StepcastError, TooLarge
from stepcast.manifest import Manifest

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
State = dict[str, dict[str, Array]]
RunGraph = Callable[[Floats, Lengths | None, Bytes], tuple[Floats, Bytes]]  # as `Runtime.run`
Format = Literal["NWC", "NCW"]
Form = Literal["F", "NF", "NTF", "NFT"]
"""What the axes of a caller's array are; the answer's are the same, with O for F."""


class Limits(NamedTuple):
    """The most that one call may have."""

    steps: int
    examples: int


class Inputs(NamedTuple):
    """Checked inputs of a call: `x` (N, T, F) float32, `mask` (N, T) or None, `rank` of the caller's array."""

    x: Floats
    mask: Mask | None
    rank: int


def step_inputs(values: Floats, layout: Format, mask: Any, manifest: Manifest, limits: Limits) -> Inputs:
    """The inputs of a step, [F], [N,F], [N,T,F], or [N,F,T] where the layout is NCW, checked against the model.

    The mask is a flag, or nested lists of flags; None: everything is present. Raises ShapeMismatch, NonFinite,
    InvalidRequest or TooLarge.
    """
    return _checked(values, layout, 1, mask, manifest, limits)


def sequences(values: Floats, layout: Format, mask: Any, manifest: Manifest, limits: Limits) -> Inputs:
    """The inputs of a predict: [T,F] is one sequence, [B,T,F] are many; the rest as for `step_inputs`."""
    if values.ndim not in (2, 3):
        raise ShapeMismatch(f"$.inputs has rank {values.ndim}, want [T,F] or [B,T,F]", got=list(values.shape))
    return _checked(values, layout, 0, mask, manifest, limits)


def _checked(values: Floats, layout: Format, axis: int, mask: Any, manifest: Manifest, limits: Limits) -> Inputs:
    """Inputs that fit the model; of the three axes the one that is missing is `axis`."""
    given = values.transpose(0, 2, 1) if layout == "NCW" and values.ndim == 3 else values
    x = given if given.ndim == 3 else np.expand_dims(np.atleast_2d(given), axis)
    want, got = manifest.n_features, list(np.atleast_2d(given).shape)
    if x.shape[2] != want or not x.shape[0] or not x.shape[1]:
        names = ", ".join(f.name for f in manifest.features[:8]) + (", ..." if len(manifest.features) > 8 else "")
        takes = f"model {manifest.name!r} takes {want} features ({names}), at least one example and one step"
        raise ShapeMismatch(f"inputs have shape {got} (NWC), {takes}", got=got, features=want)
    if x.shape[1] > limits.steps:
        raise TooLarge(f"{x.shape[1]} steps in one call (limit {limits.steps}). Send fewer.", limit=limits.steps)
    if len(x) > limits.examples:
        raise TooLarge(f"{len(x)} examples in one call (limit {limits.examples})", limit=limits.examples)
    x = np.ascontiguousarray(x)
    if not are_finite(x.reshape(-1)):
        check_readings(x, manifest)
        x = canonical(x)
    return Inputs(x, None if mask is None else _mask(mask, given.shape[:-1], x.shape[:2]), given.ndim)


def _mask(value: Any, want: tuple[int, ...], shape: tuple[int, ...]) -> Mask | None:
    """The mask as bool (N, T); None where every step is present. The flag of one step may be in a list."""
    try:
        given = np.array(value)
    except ValueError as error:
        raise ShapeMismatch("$.mask is ragged") from error
    got, want_list = list(given.shape), list(want) or [1]
    if given.shape != want and got != want_list:
        raise ShapeMismatch(f"$.mask has shape {got}, want {want_list}", got=got)
    if given.dtype.kind not in "biuf" or not np.isin(given, (0, 1)).all():
        raise InvalidRequest("$.mask has values other than 0, 1, true, false")
    mask = given.astype(bool).reshape(shape)
    return None if mask.all() else mask


def are_finite(flat: Floats) -> bool:
    """Whether all of a flat array is finite; may say no where the squares of its numbers are not."""
    if flat.size <= 16:  # quicker than numpy, and float64 holds the sum
        return math.isfinite(sum(flat.tolist()))
    return math.isfinite(np.vdot(flat, flat))  # dot would warn of an overflow


def canonical(x: Floats) -> Floats:
    """The same numbers, each NaN the one of bits 0x7fc00000: payloads are told apart by their bytes."""
    return np.where(np.isnan(x), np.float32(np.nan), x)


def check_infinite(x: Floats) -> None:
    """Raises NonFinite where inputs (N, T, F) are infinite."""
    found = np.argwhere(np.isinf(x))
    if len(found):
        raise NonFinite("inputs are infinite (in float32) at example {}, step {}, feature {}".format(*found[0]))


def check_readings(x: Floats, manifest: Manifest) -> None:
    """Raises NonFinite where inputs (N, T, F) are infinite, or missing although the model was not trained so."""
    check_infinite(x)
    lacking = np.flatnonzero(np.isnan(x).any(axis=(0, 1)) & needed(manifest))
    if len(lacking):
        cuts = manifest.feature_slices()
        feature = next(f for f in manifest.features if lacking[0] < cuts[f.name].stop)
        lacks = f"feature {feature.name!r} has a missing reading; this model was not trained with any"
        advice = ". Give it, or by name the row's 'time'." if feature.calendar else ""
        raise NonFinite(lacks + advice, feature=feature.name)


def check_known(x: Floats, manifest: Manifest) -> None:
    """Raises InvalidRequest where what is known of a rollout's future (N, H, F) lacks a feature that is always known.

    A gap in it is a missing reading as any other.
    """
    cuts = manifest.feature_slices()
    lacking = [f.name for f in manifest.features if f.known and np.isnan(x[..., cuts[f.name]]).all(axis=(1, 2)).any()]
    if lacking:
        told = ", ".join(map(repr, lacking))
        raise InvalidRequest(
            f"a rollout of model {manifest.name!r} is given what is known of its steps: $.inputs lack {told}",
            missing=lacking,
        )


def needed(manifest: Manifest) -> Mask:
    """Which readings (F) may not be missing."""
    return np.repeat([f.missing == "refuse" for f in manifest.features], [f.width for f in manifest.features])


def refused_rows(x: Floats, manifest: Manifest) -> dict[int, StepcastError]:
    """Why rows of inputs (K, F) cannot be stepped, by their place; most calls have none."""
    refused: dict[int, StepcastError] = {}
    for row in np.flatnonzero((np.isinf(x) | (np.isnan(x) & needed(manifest))).any(axis=1)).tolist():
        try:
            check_readings(x[row][None, None], manifest)
        except NonFinite as error:
            refused[row] = error
    return refused


def form_of(rank: int, layout: Format) -> Form:
    """The axes of an array of rank 1 to 3."""
    return "F" if rank == 1 else "NF" if rank == 2 else "NFT" if layout == "NCW" else "NTF"


def by_form(y: Floats, form: Form) -> Floats:
    """Outputs (N, T, O) with the axes of the caller's inputs."""
    if form == "NTF":
        return y
    return y[0, 0] if form == "F" else y[:, 0] if form == "NF" else y.transpose(0, 2, 1)


def last_present(y: Floats, mask: Mask | None) -> Floats:
    """The output at each row's last present step (N, O); NaN for a row without any."""
    if mask is None:
        return y[:, -1]
    at = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    return y[np.arange(len(y)), at, :]


def state_arrays(given: dict[str, Any], manifest: Manifest) -> tuple[State, int]:
    """A whole state {layer: {key: [N, *shape] nested lists, bytes or an array}}, checked; and its N.

    Raises StateMismatch, ShapeMismatch or NonFinite.
    """
    _check_names("state", given, manifest.layers)
    made = {layer: layer_arrays(given[layer], manifest, layer) for layer in manifest.layers}
    count = _one_of({count for _, count in made.values()} or {0}, "tensors of the state")
    return {layer: arrays for layer, (arrays, _) in made.items()}, count


def layer_arrays(given: Any, manifest: Manifest, layer: str) -> tuple[dict[str, Array], int]:
    """One layer's state, checked against the model; and its N."""
    tensors = manifest.layers[layer]
    if not isinstance(given, dict):
        raise StateMismatch(f"$.state.{layer} is not an object of keys {sorted(tensors)}")
    _check_names(f"state.{layer}", given, tensors)
    arrays = {key: _tensor(given[key], t.dtype, t.shape, f"$.state.{layer}.{key}") for key, t in tensors.items()}
    return arrays, _one_of({len(value) for value in arrays.values()}, f"keys of layer {layer!r}")


def _check_names(what: str, given: dict[str, Any], want: dict[str, Any]) -> None:
    missing, unknown = sorted(set(want) - set(given)), sorted(map(str, set(given) - set(want)))
    if missing or unknown:
        raise StateMismatch(f"$.{what}: missing {missing}, unknown {unknown}", missing=missing, unknown=unknown)


def _one_of(counts: set[int], what: str) -> int:
    """The number of examples, which is to be the same in all."""
    if len(counts) > 1:
        raise StateMismatch(f"the {what} have different numbers of examples: {sorted(counts)}")
    return counts.pop()


def _tensor(value: Any, dtype: str, shape: tuple[int, ...], path: str) -> Array:
    """One tensor (N, *shape) of a dtype that holds the values."""
    want = f"[N, {', '.join(map(str, shape))}]"
    try:
        if isinstance(value, bytes):
            value = np.frombuffer(value, np.dtype(dtype).newbyteorder("<")).reshape(-1, *shape)
        given = np.array(value)
    except (ValueError, TypeError) as error:
        raise ShapeMismatch(f"{path} is not an array {want} of {dtype}") from error
    if given.dtype.kind not in "biuf":
        raise ShapeMismatch(f"{path} is ragged, or has values that are not numbers of {dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        tensor = given.astype(dtype)
    if not dtype.startswith("float") and not np.array_equal(tensor, given):
        raise ShapeMismatch(f"{path} has values that {dtype} does not hold")
    if tensor.shape == (0,):  # of no examples: what a session without a state answers
        tensor = tensor.reshape(0, *shape)
    if tensor.ndim != len(shape) + 1 or tensor.shape[1:] != shape:
        raise ShapeMismatch(f"{path} has shape {list(tensor.shape)}, want {want}")
    if dtype.startswith("float") and not np.isfinite(tensor).all():
        raise NonFinite(f"{path} has values that are not finite")
    return tensor
