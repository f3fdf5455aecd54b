"""config.json of a .keras file: a Sequential, or a Functional that is a chain, as a list of layers.

Only names and numbers are read. A Lambda layer or a class of somebody's own would be code, and is refused.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from stepcast.errors import ManifestError

_OWN: Final = re.compile(r"keras(\.|$)")


class Saved(NamedTuple):
    """A layer as Keras saved it.

    Attributes:
        kind: Its class.
        fields: Its configuration.
        where: Names it in errors.
        path: Where its weights lie.
    """

    kind: str
    fields: Mapping[str, Any]
    where: str
    path: str

    def size(self, key: str) -> int:
        """A whole number of at least 1."""
        value = self.fields.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ManifestError(f"{self.where}: {key} is {value!r}, want a whole number of at least 1")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.fields.get(key, default)
        if not isinstance(value, bool):
            raise ManifestError(f"{self.where}: {key} is {value!r}, want true or false")
        return value

    def number(self, key: str, default: float) -> float:
        """A number."""
        value = self.fields.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ManifestError(f"{self.where}: {key} is {value!r}, want a number")
        return float(value)

    def must(self, key: str, *wanted: Any) -> None:
        """Refuse a setting that has none of these values."""
        if self.fields.get(key, wanted[0]) not in wanted:
            told = " or ".join(map(repr, wanted))
            raise ManifestError(f"{self.where}: {key} is {self.fields[key]!r}, Stepcast has only {told}")

    def inner(self, key: str) -> "Saved":
        """A layer that this one is made of."""
        return _layer(self.fields.get(key), f"{self.where}.{key}", f"{self.path}/{key}")


def chain_of(content: bytes, name: str) -> list[Saved]:
    """The layers of a model, from below.

    Raises:
        ManifestError: it is damaged, not a chain, or has classes that are not Keras' own.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{name}: is no JSON ({error})") from error
    kind, config = _class_of(document, name)
    if kind not in ("Sequential", "Functional"):
        raise ManifestError(f"{name}: is a {kind!r}, want a Sequential or a Functional. Build the model of layers.")
    entries = config.get("layers")
    if not isinstance(entries, list) or not entries:
        raise ManifestError(f"{name}: has no layers")
    if kind == "Functional":
        _check_chain(entries, config, name)
    seen: Counter[str] = Counter()
    layers = []
    for number, entry in enumerate(entries):
        inner, _ = _class_of(entry, f"{name}: layers[{number}]")
        snake = _snake(inner)
        path = f"layers/{snake}" + (f"_{seen[snake]}" if seen[snake] else "")
        seen[snake] += 1
        layers.append(_layer(entry, f"{name}: layers[{number}]", path))
    return layers


def _layer(entry: Any, where: str, path: str) -> Saved:
    kind, fields = _class_of(entry, where)
    policy = fields.get("dtype")
    if isinstance(policy, dict):
        policy = policy.get("config", {}).get("name") if isinstance(policy.get("config"), dict) else None
    if policy not in (None, "float32") and kind != "InputLayer":
        raise ManifestError(f"{where} ({kind}): computes in {policy!r}, want 'float32'. Save it with that policy.")
    return Saved(kind, fields, f"{where} ({kind})", path)


def _class_of(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Class and configuration of a serialised object of Keras' own."""
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        raise ManifestError(f"{where}: is no layer of Keras")
    kind, module = entry.get("class_name"), entry.get("module")
    if not isinstance(kind, str) or not isinstance(module, str) or not _OWN.match(module):
        raise ManifestError(f"{where}: is {kind!r} of {module!r}, which is code of somebody's own and not read")
    return kind, entry["config"]


def _check_chain(entries: list[Any], config: Mapping[str, Any], name: str) -> None:
    """Raises ManifestError unless each layer reads the one before it, and the last one is the output."""
    before = None
    for number, entry in enumerate(entries):
        nodes = entry.get("inbound_nodes") if isinstance(entry, dict) else None
        tensors = list(_tensors(nodes))
        if not isinstance(nodes, list) or len(nodes) > 1 or tensors != ([before] if number else []):
            raise ManifestError(
                f"{name}: layers[{number}] does not read the layer before it alone. Only chains are read."
            )
        before = entry.get("name") or entry.get("config", {}).get("name")
    if list(_named(config.get("output_layers"))) != [before]:
        raise ManifestError(f"{name}: its output is not its last layer. Only chains are read.")


def _tensors(value: Any) -> list[Any]:
    """The layers whose outputs are named anywhere inside."""
    if isinstance(value, dict):
        config = value.get("config")
        if value.get("class_name") == "__keras_tensor__" and isinstance(config, dict):
            history = config.get("keras_history")
            return [history[0] if isinstance(history, list) and history else None]
        return [found for part in value.values() for found in _tensors(part)]
    return [found for part in value for found in _tensors(part)] if isinstance(value, list) else []


def _named(value: Any) -> list[Any]:
    """Layers of `output_layers`: one [name, node, tensor], or a list of these."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [value[0]]
    return [found for part in value for found in _named(part)] if isinstance(value, list) else []


def _snake(name: str) -> str:
    """As Keras names the groups of a weights file: lstm, simple_rnn, time_distributed, global_max_pooling1d."""
    return re.sub(r"(?<=\w)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", name).lower()
