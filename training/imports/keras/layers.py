"""One Keras layer: the layers of ours that say the same, and its weights as ours has them.

Keras' matrices are (inputs, units), gate blocks side by side: i, f, c, o of an LSTM, z, r, h of a GRU. Ours are
(units, inputs) in torch's order: i, f, g, o and r, z, n.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from stepcast.errors import ManifestError

from ...stepper import Floats
from ...weights import Weights
from .configuration import Saved
from .weights_file import WeightsFile

Spec = dict[str, Any]  # an entry of a recipe's `network:`

ACTIVATIONS: Final = {
    **{name: name for name in ("elu", "gelu", "mish", "relu", "relu6", "selu", "sigmoid", "softmax", "softplus")},
    **{name: name for name in ("softsign", "tanh")},
    "linear": "identity",
    "silu": "swish",
    "swish": "swish",
    "hard_sigmoid": "hardsigmoid6",
    "hard_tanh": "hardtanh",
}
"""Keras' names and ours. leaky_relu is not among them: Keras' slope is 0.2, ours is 0.01."""

_INERT: Final = (
    *("InputLayer", "Dropout", "SpatialDropout1D", "GaussianDropout", "GaussianNoise", "AlphaDropout"),
    "ActivityRegularization",
)
_MERGE_MODES: Final = {"concat": "concat", "sum": "add", "mul": "mul", "ave": "average"}


@dataclass(frozen=True)
class Reading:
    """What a layer becomes.

    Attributes:
        specs: Entries of `network:`, from below.
        weights: Of the one of them that has weights; None: of none.
        size: Values that it gives for each step.
        note: What it does in Keras and not here; "": nothing.
    """

    specs: tuple[Spec, ...]
    size: int
    weights: Weights | None = None
    note: str = ""


def read_layer(layer: Saved, size: int, file: WeightsFile) -> Reading:
    """Read a layer that stands on `size` values a step.

    Raises:
        ManifestError: a class, an activation or a setting that Stepcast has no layer for; or its weights are not there.
    """
    if layer.kind in _INERT:
        return Reading((), size)
    if (reader := _READERS.get(layer.kind)) is None:
        known = ", ".join(sorted([*_READERS, *_INERT]))
        raise ManifestError(f"{layer.where}: Stepcast has no layer for it. It has {known}.")
    return reader(layer, size, file)


def _cell(layer: Saved, size: int, file: WeightsFile) -> Reading:
    """LSTM, GRU, SimpleRNN."""
    for key in ("go_backwards", "return_state"):
        layer.must(key, False)
    spec, weights = _cell_parts(layer, size, file)
    last: tuple[Spec, ...] = () if layer.flag("return_sequences") else ({"kind": "last_time_step"},)
    return Reading((spec, *last), layer.size("units"), weights)


def _cell_parts(layer: Saved, size: int, file: WeightsFile) -> tuple[Spec, Weights]:
    """The specification of a cell and its weights."""
    units, gates = layer.size("units"), {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}[layer.kind]
    spec: Spec = {"units": units, "activation": activation_of(layer, "activation", "tanh")}
    if layer.kind == "SimpleRNN":
        spec["kind"] = "simple_rnn"
    else:
        spec |= {"kind": layer.kind.lower(), "gate_activation": activation_of(layer, "recurrent_activation", "sigmoid")}
    after = layer.kind == "GRU" and layer.flag("reset_after", True)
    if layer.kind == "GRU":
        spec["reset_after"] = after
    kernel = file.read(f"{layer.path}/cell/vars/0", (size, gates * units))
    recurrent = file.read(f"{layer.path}/cell/vars/1", (units, gates * units))
    bias = np.zeros((2, gates * units), np.float32)  # of the input's part and of the state's
    if layer.flag("use_bias", True):
        shape = (2, gates * units) if after else (gates * units,)
        bias[: 2 if after else 1] = file.read(f"{layer.path}/cell/vars/2", shape)
    order = _order(units, gates)
    return spec, _tensors(
        {
            "kernel.weight_ih_l0": kernel.T[order],
            "kernel.weight_hh_l0": recurrent.T[order],
            "kernel.bias_ih_l0": bias[0, order],
            "kernel.bias_hh_l0": bias[1, order],
        }
    )


def _order(units: int, gates: int) -> Any:
    """Torch's gate blocks by Keras' rows: a GRU's z and r change places."""
    blocks = (1, 0, 2) if gates == 3 else range(gates)
    return np.concatenate([np.arange(units) + units * block for block in blocks])


def _bidirectional(layer: Saved, size: int, file: WeightsFile) -> Reading:
    ahead, back = (layer.inner(key)._replace(path=f"{layer.path}/{group}") for key, group in _directions(layer))
    mode = layer.fields.get("merge_mode", "concat")
    if mode not in _MERGE_MODES:
        raise ManifestError(f"{layer.where}: merge_mode is {mode!r}, Stepcast has {', '.join(_MERGE_MODES)}")
    for one, backwards in ((ahead, False), (back, True)):
        if one.kind not in ("LSTM", "GRU", "SimpleRNN"):
            raise ManifestError(f"{one.where}: is not a recurrent layer that Stepcast has")
        one.must("go_backwards", backwards)
        one.must("return_state", False)
    (spec, forwards), (other, backwards_) = (_cell_parts(one, size, file) for one in (ahead, back))
    if spec != other or ahead.flag("return_sequences") != back.flag("return_sequences"):
        raise ManifestError(f"{layer.where}: its directions are different layers, which Stepcast does not have")
    weights = {
        f"{side}.{name}": w
        for side, own in (("forwards", forwards), ("backwards", backwards_))
        for name, w in own.items()
    }
    whole: Spec = {"kind": "bidirectional", "layer": spec, "mode": _MERGE_MODES[mode]}
    units = ahead.size("units") * (2 if mode == "concat" else 1)
    return Reading(({**whole, "last": not ahead.flag("return_sequences")},), units, weights)


def _directions(layer: Saved) -> tuple[tuple[str, str], tuple[str, str]]:
    """Where the configurations and the weights of both directions are."""
    return ("layer", "forward_layer"), ("backward_layer", "backward_layer")


def _dense(layer: Saved, size: int, file: WeightsFile) -> Reading:
    units = layer.size("units")
    if layer.fields.get("lora_rank"):
        raise ManifestError(f"{layer.where}: has LoRA weights. Merge them before saving.")
    layer.must("quantization_config", None)
    weight = file.read(f"{layer.path}/vars/0", (size, units))
    bias = file.read(f"{layer.path}/vars/1", (units,)) if layer.flag("use_bias", True) else np.zeros(units, np.float32)
    spec: Spec = {"kind": "dense", "units": units, "activation": activation_of(layer, "activation", "linear")}
    return Reading((spec,), units, _tensors({"linear.weight": weight.T, "linear.bias": bias}))


def _time_distributed(layer: Saved, size: int, file: WeightsFile) -> Reading:
    """A layer on each step; those that may stand in it act on each step anyway."""
    inner = layer.inner("layer")
    if inner.kind not in ("Dense", "Activation", "ReLU", "Softmax", "LayerNormalization", *_INERT):
        raise ManifestError(f"{inner.where}: does not act on each step alone, or Stepcast has no layer for it")
    return read_layer(inner, size, file)


def _embedding(layer: Saved, size: int, file: WeightsFile) -> Reading:
    vocabulary, units = layer.size("input_dim"), layer.size("output_dim")
    table = file.read(f"{layer.path}/vars/0", (vocabulary, units))
    note = "skips the steps of token 0" if layer.flag("mask_zero") else ""
    spec: Spec = {"kind": "embedding", "vocabulary": vocabulary, "units": units}
    return Reading((spec,), units, _tensors({"table.weight": table}), note and f"{layer.where} {note}")


def _layer_norm(layer: Saved, size: int, file: WeightsFile) -> Reading:
    layer.must("axis", -1, [-1], 2, [2])
    layer.must("rms_scaling", False)
    names = [name for name, flag in (("norm.weight", "scale"), ("norm.bias", "center")) if layer.flag(flag, True)]
    found = {name: file.read(f"{layer.path}/vars/{number}", (size,)) for number, name in enumerate(names)}
    plain = {"norm.weight": np.ones(size, np.float32), "norm.bias": np.zeros(size, np.float32)}
    spec: Spec = {"kind": "layer_norm", "epsilon": layer.number("epsilon", 1e-3)}
    return Reading((spec,), size, _tensors(plain | found))


def _activation(layer: Saved, size: int, file: WeightsFile) -> Reading:
    return Reading(({"kind": "activation", "activation": activation_of(layer, "activation", "linear")},), size)


def _relu(layer: Saved, size: int, file: WeightsFile) -> Reading:
    layer.must("max_value", None, 6, 6.0)
    for key in ("negative_slope", "threshold"):
        layer.must(key, 0, 0.0)
    name = "relu" if layer.fields.get("max_value") is None else "relu6"
    return Reading(({"kind": "activation", "activation": name},), size)


def _softmax(layer: Saved, size: int, file: WeightsFile) -> Reading:
    layer.must("axis", -1, 2)
    return Reading(({"kind": "activation", "activation": "softmax"},), size)


def _pooling(layer: Saved, size: int, file: WeightsFile) -> Reading:
    layer.must("data_format", "channels_last")
    layer.must("keepdims", False)
    pooling = "max" if layer.kind == "GlobalMaxPooling1D" else "avg"
    return Reading(({"kind": "global_pooling", "pooling": pooling},), size)


def _masking(layer: Saved, size: int, file: WeightsFile) -> Reading:
    return Reading(
        (), size, note=f"{layer.where} skips the steps whose readings are all {layer.number('mask_value', 0.0):g}"
    )


def activation_of(layer: Saved, key: str, default: str) -> str:
    """Our name of an activation.

    Raises:
        ManifestError: there is none.
    """
    given = layer.fields.get(key, default)
    if isinstance(given, dict) and given.get("module") in ("keras.activations", "builtins"):
        given = given.get("config") if isinstance(given.get("config"), str) else given.get("class_name")
    if not isinstance(given, str) or given not in ACTIVATIONS:
        raise ManifestError(f"{layer.where}: {key} is {given!r}, Stepcast has {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[given]


def _tensors(arrays: Mapping[str, Floats]) -> Weights:
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


_READERS: Final[dict[str, Callable[[Saved, int, WeightsFile], Reading]]] = {
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN"), _cell),
    "Bidirectional": _bidirectional,
    "Dense": _dense,
    "TimeDistributed": _time_distributed,
    "Embedding": _embedding,
    "LayerNormalization": _layer_norm,
    "Activation": _activation,
    "ReLU": _relu,
    "Softmax": _softmax,
    **dict.fromkeys(("GlobalMaxPooling1D", "GlobalAveragePooling1D"), _pooling),
    "Masking": _masking,
}
