"""What DL4J's versions have called things in configuration.json, under one name each.

Up to 0.9 an object is `{"gravesLSTM": {...}}`, from 1.0.0-beta `{"@class": "org.deeplearning4j....GravesLSTM", ...}`.
Activations are a text (0.5), or an object of either form. A name here is the class's, in lower case and without what
every class of its family has in it: `lstm`, `rnnoutput`, `tanh`, `merge`.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from stepcast.errors import ManifestError

from ...activations import ActivationName

Json = Mapping[str, Any]

ACTIVATIONS: Final[dict[str, ActivationName]] = {
    "cube": "cube",
    "elu": "elu",
    "hardsigmoid": "hardsigmoid",
    "hardtanh": "hardtanh",
    "identity": "identity",
    "leakyrelu": "leakyrelu",
    "linear": "identity",
    "lrelu": "leakyrelu",
    "mish": "mish",
    "rationaltanh": "rationaltanh",
    "rectifiedtanh": "rectifiedtanh",
    "relu": "relu",
    "relu6": "relu6",
    "selu": "selu",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "softplus": "softplus",
    "softsign": "softsign",
    "swish": "swish",
    "tanh": "tanh",
    "thresholdedrelu": "thresholdedrelu",
}
# Constants of activations, by field: only these values are ours.
CONSTANTS: Final = {"leakyrelu": ("alpha", 0.01), "elu": ("alpha", 1.0), "thresholdedrelu": ("theta", 1.0)}

LOSSES: Final = {
    "mcxent": "mcxent",
    "negativeloglikelihood": "negativeloglikelihood",
    "sparsemcxent": "sparse_mcxent",
    "binaryxent": "xent",
    "xent": "xent",
    "mse": "mse",
    "squaredloss": "squared_loss",
    "squared_loss": "squared_loss",
    "l2": "l2",
    "l1": "l1",
    "mae": "mae",
    "mean_absolute_error": "mae",
    "mape": "mape",
    "mean_absolute_percentage_error": "mape",
    "msle": "msle",
    "mean_squared_logarithmic_error": "msle",
    "poisson": "poisson",
    "hinge": "hinge",
    "squaredhinge": "squared_hinge",
    "squared_hinge": "squared_hinge",
    "cosineproximity": "cosine_proximity",
    "cosine_proximity": "cosine_proximity",
    "kld": "kl_divergence",
    "kl_divergence": "kl_divergence",
    "reconstruction_crossentropy": "kl_divergence",
    "wasserstein": "wasserstein",
}


class Named(NamedTuple):
    """An object of the configuration: what it is called, its fields, and where it stands, for messages.

    Attributes:
        kind: The class's name in lower case; "" if there is nothing.
        told: The name as the file has it.
        fields: What it holds.
        where: A path.
    """

    kind: str
    told: str
    fields: Json
    where: str

    def size(self, key: str) -> int:
        """A positive number of units.

        Raises:
            ManifestError: it is none.
        """
        value = self.fields.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise ManifestError(f"{self.where}.{key}: is {_short(value)}, wanted a number of units")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A truth value; some versions do not write it."""
        value = self.fields.get(key)
        return default if value is None else value is True

    def number(self, key: str, default: float) -> float:
        """A plain number."""
        value = self.fields.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ManifestError(f"{self.where}.{key}: is {_short(value)}, wanted a number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        """A plain text."""
        value = self.fields.get(key, default)
        if not isinstance(value, str):
            raise ManifestError(f"{self.where}.{key}: is {_short(value)}, wanted a text")
        return value

    def inner(self, *keys: str, without: tuple[str, ...] = ()) -> "Named":
        """The object below the first of some keys that is there."""
        key = next((key for key in keys if self.fields.get(key) is not None), keys[0])
        return named(self.fields.get(key), f"{self.where}.{key}", without)


def named(value: Any, where: str, without: tuple[str, ...] = ()) -> Named:
    """An object in either dialect.

    Args:
        value: From the JSON.
        where: Its path.
        without: What is cut off the class's name at either end, in lower case.

    Raises:
        ManifestError: it is in neither.
    """
    if value is None:
        return Named("", "", {}, where)
    if isinstance(value, str):
        told, fields = value, {}
    elif isinstance(value, dict) and isinstance(value.get("@class"), str):
        told, fields = value["@class"].replace("$", ".").rpartition(".")[2], value
    elif isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), dict | None):
        told, fields = next((str(key), held or {}) for key, held in value.items())
    else:
        raise ManifestError(f"{where}: is {_short(value)}, wanted an object with its class")
    kind = told.lower()
    for part in without:
        kind = kind.removeprefix(part).removesuffix(part) or kind
    return Named(kind, told[:60], fields, where)


def activation_of(layer: Named, keys: tuple[str, ...], default: ActivationName | None = None) -> ActivationName:
    """A layer's activation.

    Args:
        layer: Whose.
        keys: The field's names, the newest first.
        default: Where a version does not write it; None: it must be there.

    Raises:
        ManifestError: ours has no such formula.
    """
    found = layer.inner(*keys, without=("activation",))
    if not found.kind and default is not None:
        return default
    if (name := ACTIVATIONS.get(found.kind)) is None:
        raise ManifestError(f"{found.where}: is {found.told or None!r}, an activation that Stepcast does not have")
    field, ours = CONSTANTS.get(name, ("", 0.0))
    if field and (theirs := found.number(field, ours)) != ours:
        raise ManifestError(f"{found.where}.{field}: is {theirs:g}, Stepcast's {name} has {ours:g}")
    return name


def loss_of(layer: Named) -> str | None:
    """Our name of a layer's loss; None if it is none of ours. No answer of the network depends on it."""
    return LOSSES.get(layer.inner("lossFn", "lossFunction", without=("loss",)).kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
