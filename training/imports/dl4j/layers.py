"""One DL4J layer: the layers of ours that say the same, and how its parameters become theirs.

Parameters lie in one flat vector, layer by layer, each matrix column by column (Fortran order). i inputs, n units.
Gate columns are I, F, O, G: I is the candidate, G the input gate (everybody else's i).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stepcast.errors import ManifestError

from .dialect import Named, activation_of, loss_of

Floats = NDArray[np.float32]
Arrays = Mapping[str, Floats]
Spec = dict[str, Any]  # an entry of a recipe's `network:`

GATES: Final = (3, 1, 0, 2)  # torch's i, f, g, o by their places in I, F, O, G
ACTIVATION: Final = ("activationFn", "activationFunction")
MODES: Final = ("add", "mul", "average", "concat")
POOLINGS: Final = ("max", "avg", "sum", "pnorm")


@dataclass(frozen=True)
class Reading:
    """What a layer becomes.

    Attributes:
        specs: Entries of `network:`, from below.
        parameters: DL4J's names and shapes, in the order of the flat vector.
        convert: From DL4J's parameters to ours, by the names our layer's module has for them.
        size: Values that go in; None if the layer takes as many as come.
    """

    specs: tuple[Spec, ...]
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    convert: Callable[[Arrays], Arrays] = dict
    size: int | None = None

    @property
    def count(self) -> int:
        """Numbers in the flat vector."""
        return sum(math.prod(shape) for _, shape in self.parameters)

    def weights(self, flat: Floats) -> Arrays:
        """Our weights from the layer's part of the flat vector, (count,)."""
        arrays, at = {}, 0
        for name, shape in self.parameters:
            size = math.prod(shape)
            arrays[name] = flat[at : at + size].reshape(shape, order="F")
            at += size
        return {name: np.ascontiguousarray(value) for name, value in self.convert(arrays).items()}


def read_layer(layer: Named) -> Reading:
    """Read a layer of either dialect.

    Raises:
        ManifestError: a class, an activation or a setting that Stepcast has no layer for.
    """
    if (reader := _READERS.get(layer.kind)) is None:
        known = ", ".join(_READERS)
        raise ManifestError(
            f"{layer.where}: is {layer.told or None!r}, which Stepcast has no layer for. It has {known}."
        )
    return reader(layer)


def _cell(layer: Named) -> Spec:
    spec: Spec = {"units": layer.size("nout"), "activation": activation_of(layer, ACTIVATION)}
    if layer.kind != "simplernn":
        spec["gate_activation"] = activation_of(layer, ("gateActivationFn",), "sigmoid")
    return spec


def _lstm(layer: Named) -> Reading:
    n, size = layer.size("nout"), layer.size("nin")
    peepholes = 3 if layer.kind == "graveslstm" else 0
    shapes = (("W", (size, 4 * n)), ("RW", (n, 4 * n + peepholes)), ("b", (4 * n,)))
    kind = "graves_lstm" if peepholes else "lstm"
    return Reading(({"kind": kind, **_cell(layer)},), shapes, _gates, size)


def _gates(arrays: Arrays) -> Arrays:
    """W, RW and b of an LSTM as torch has them; the last three columns of RW, if there, are peepholes of f, o and i."""
    w, rw, b = arrays["W"], arrays["RW"], arrays["b"]
    n = len(rw)
    order = np.concatenate([np.arange(n) + n * gate for gate in GATES])
    made = {
        "kernel.weight_ih_l0": w.T[order],  # (4 n, i)
        "kernel.weight_hh_l0": rw[:, : 4 * n].T[order],  # (4 n, n)
        "kernel.bias_ih_l0": b[order],  # (4 n,)
        "kernel.bias_hh_l0": np.zeros_like(b),
    }
    if rw.shape[1] > 4 * n:
        to_f, to_o, to_i = rw[:, 4 * n :].T
        made["peephole"] = np.stack([to_i, to_o, to_f])  # (3, n)
    return made


def _simple_rnn(layer: Named) -> Reading:
    n, size, norm = layer.size("nout"), layer.size("nin"), layer.flag("hasLayerNorm", False)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = (("W", (size, n)), ("RW", (n, n)), ("b", (n,)))
    if norm:
        shapes += (("g", (2 * n,)),)

    def convert(arrays: Arrays) -> Arrays:
        made = {
            "kernel.weight_ih_l0": arrays["W"].T,
            "kernel.weight_hh_l0": arrays["RW"].T,
            "kernel.bias_ih_l0": arrays["b"],
            "kernel.bias_hh_l0": np.zeros_like(arrays["b"]),
        }
        return {**made, "gains": arrays["g"].reshape(2, n)} if norm else made

    return Reading(({"kind": "simple_rnn", **_cell(layer), "layer_norm": norm},), shapes, convert, size)


def _graves_bidirectional(layer: Named) -> Reading:
    """Two GravesLSTMs whose outputs are added."""
    cell = _lstm(layer._replace(kind="graveslstm"))
    return _both(cell, cell, "add", ("WF", "RWF", "bF"), ("WB", "RWB", "bB"))


def _bidirectional(layer: Named) -> Reading:
    ahead, back = (read_layer(layer.inner(key, without=("layer",))) for key in ("fwd", "bwd"))
    mode = layer.text("mode", "CONCAT").lower()
    if mode not in MODES:
        raise ManifestError(f"{layer.where}.mode: is {mode.upper()!r}, known are {', '.join(MODES).upper()}")
    if ahead.specs != back.specs or ahead.parameters != back.parameters:
        raise ManifestError(f"{layer.where}: the two directions differ in size or activation")
    if not ahead.specs[0]["kind"].endswith(("lstm", "simple_rnn")):
        raise ManifestError(f"{layer.where}.fwd: is no recurrent layer")
    names = [tuple(side + name for name, _ in ahead.parameters) for side in "fb"]
    return _both(ahead, back, mode, *names)


def _both(ahead: Reading, back: Reading, mode: str, forwards: tuple[str, ...], backwards: tuple[str, ...]) -> Reading:
    """A layer of two directions from the readings of each; the names are DL4J's for each direction's parameters."""
    spec: Spec = {"kind": "bidirectional", "layer": ahead.specs[0], "mode": mode, "last": len(ahead.specs) > 1}
    directions = (("forwards", ahead, forwards), ("backwards", back, backwards))
    shapes = tuple(
        (told, shape)
        for _, reading, names in directions
        for told, (_, shape) in zip(names, reading.parameters, strict=True)
    )

    def convert(arrays: Arrays) -> Arrays:
        return {
            f"{side}.{name}": value
            for side, reading, names in directions
            for name, value in reading.convert(
                {plain: arrays[told] for told, (plain, _) in zip(names, reading.parameters, strict=True)}
            ).items()
        }

    return Reading((spec,), shapes, convert, ahead.size)


def _last_time_step(layer: Named) -> Reading:
    inner = _underlying(layer)
    return replace(inner, specs=(*inner.specs, {"kind": "last_time_step"}))


def _mask_zero(layer: Named) -> Reading:
    inner = _underlying(layer)
    value = layer.number("maskingValue", layer.number("maskValue", 0.0))
    spec: Spec = {"kind": "mask_zero", "layer": inner.specs[0], "value": value}

    def convert(arrays: Arrays) -> Arrays:
        return {f"inner.{name}": array for name, array in inner.convert(arrays).items()}

    return replace(inner, specs=(spec, *inner.specs[1:]), convert=convert)


def _underlying(layer: Named) -> Reading:
    return read_layer(layer.inner("underlying", "layer", without=("layer",)))


def _linear(layer: Named) -> Reading:
    """A dense layer, or the dense part of an output layer, without its specification."""
    if layer.flag("hasLayerNorm", False):
        raise ManifestError(f"{layer.where}: has layer norm, which Stepcast's dense layers do not have")
    n, size = layer.size("nout"), layer.size("nin")
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = (("W", (size, n)),)
    if layer.flag("hasBias", True):
        shapes += (("b", (n,)),)

    def convert(arrays: Arrays) -> Arrays:
        return {"linear.weight": arrays["W"].T, "linear.bias": arrays.get("b", np.zeros(n, np.float32))}

    return Reading((), shapes, convert, size)


def _dense(layer: Named) -> Reading:
    spec: Spec = {"kind": "dense", "units": layer.size("nout"), "activation": activation_of(layer, ACTIVATION)}
    return replace(_linear(layer), specs=(spec,))


def _output(layer: Named) -> Reading:
    spec: Spec = {"kind": "rnn_output", "units": layer.size("nout"), "activation": activation_of(layer, ACTIVATION)}
    return replace(_linear(layer), specs=({**spec, "loss": loss_of(layer)},))


def _loss(layer: Named) -> Reading:
    spec: Spec = {"kind": "rnn_loss", "activation": activation_of(layer, ACTIVATION), "loss": loss_of(layer)}
    return Reading((spec,))


def _embedding(layer: Named) -> Reading:
    """A vector for each token; DL4J's bias is added to all of them."""
    n, vocabulary = layer.size("nout"), layer.size("nin")
    spec: Spec = {"kind": "embedding", "units": n, "vocabulary": vocabulary}
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = (("W", (vocabulary, n)),)
    if layer.flag("hasBias", True):  # not written by the versions that always had one
        shapes += (("b", (n,)),)

    def convert(arrays: Arrays) -> Arrays:
        return {"table.weight": arrays["W"] + arrays.get("b", np.float32(0))}

    activation = activation_of(layer, ACTIVATION, "identity")
    return Reading(({**spec, "activation": activation},), shapes, convert, 1)


def _global_pooling(layer: Named) -> Reading:
    pooling = layer.text("poolingType", "MAX").lower()
    if pooling not in POOLINGS:
        raise ManifestError(f"{layer.where}.poolingType: is {pooling.upper()!r}, known are {', '.join(POOLINGS)}")
    if layer.fields.get("poolingDimensions") not in (None, [2]):
        raise ManifestError(f"{layer.where}.poolingDimensions: Stepcast pools over time only")
    spec: Spec = {"kind": "global_pooling", "pooling": pooling}
    return Reading(({**spec, "p": layer.number("pnorm", 2.0)} if pooling == "pnorm" else spec,))


def _dropout(layer: Named) -> Reading:
    """Does nothing but in training, so nothing in a model that is served."""
    return Reading(())


def _activation(layer: Named) -> Reading:
    return Reading(({"kind": "activation", "activation": activation_of(layer, ACTIVATION)},))


def _mask(layer: Named) -> Reading:
    return Reading(({"kind": "mask"},))


_READERS: Final[dict[str, Callable[[Named], Reading]]] = {
    "lstm": _lstm,
    "graveslstm": _lstm,
    "gravesbidirectionallstm": _graves_bidirectional,
    "bidirectional": _bidirectional,
    "simplernn": _simple_rnn,
    "lasttimestep": _last_time_step,
    "maskzero": _mask_zero,
    "timedistributed": _underlying,
    "frozen": _underlying,
    "frozenlayerwithbackprop": _underlying,
    "dense": _dense,
    "embedding": _embedding,
    "embeddingsequence": _embedding,
    "output": _output,
    "rnnoutput": _output,
    "loss": _loss,
    "rnnloss": _loss,
    "globalpooling": _global_pooling,
    "dropout": _dropout,
    "activation": _activation,
    "mask": _mask,
}
