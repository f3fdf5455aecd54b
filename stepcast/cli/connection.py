"""The server that commands talk to, through the SDK; what a model's columns are called."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arguments import nearest
from ..errors import ConfigError, InvalidRequest, ModelNotFound, ShapeMismatch
from ..rooms import load

if TYPE_CHECKING:
    from ..client import AsyncClient, Client
    from ..features import FeatureNames
    from ..manifest import Manifest

Url = Annotated[str, typer.Option("--url", envvar="STEPCAST_URL", help="Where the server is.", show_envvar=True)]
Key = Annotated[str, typer.Option("--key", envvar="STEPCAST_KEY", help="API key.", show_envvar=True)]
Model = Annotated[str, typer.Argument(help="The model's name.")]
SessionId = Annotated[str, typer.Argument(metavar="SESSION", help="The session's id.")]
HERE = "http://127.0.0.1:8000"


@contextmanager
def connected(url: str, key: str) -> "Iterator[Client]":
    """A client of the server.

    Raises:
        ConfigError: the extra `client` is not installed, or the address is none.
    """
    with load("stepcast.client", "client").Client(_address(url), key or None) as client:
        yield client


def connected_async(url: str, key: str) -> "AsyncClient":
    """The same for asyncio; to be entered by the caller."""
    client: AsyncClient = load("stepcast.client", "client").AsyncClient(_address(url), key or None)
    return client


def _address(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url!r} does not begin with http:// or https://")
    return url.rstrip("/")


def manifest_of(client: "Client", model: str) -> "Manifest":
    """The live version's manifest.

    Raises:
        ModelNotFound: with the nearest name that is served.
    """
    try:
        return client.manifest(model)
    except ModelNotFound as error:
        raise ModelNotFound(f"{error}.{nearest(model, [entry['name'] for entry in client.models()])}") from error


def names_of(manifest: "Manifest") -> "FeatureNames":
    """What the model's inputs and outputs are called."""
    names: FeatureNames = load("stepcast.features", "client").FeatureNames(manifest)
    return names


def positions(named: Mapping[str, Any], names: "FeatureNames", future: int | None = None) -> Any:
    """Readings by feature name as what a step takes; a name that is left out is a missing reading.

    Args:
        named: By feature name.
        names: The model's.
        future: They are what is known of so many steps of a rollout.

    Raises:
        ConfigError: a name is none of the model's, or a feature that may not be missing is left out.
    """
    try:
        return names.array(named, future=future)
    except (InvalidRequest, ShapeMismatch) as error:
        raise ConfigError(str(error)) from error


def line(fields: Mapping[str, Any]) -> str:
    """One line of JSON; numbers as short as float32 has them."""
    return json.dumps(_short(fields), ensure_ascii=False)


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.7g}")
    return value
