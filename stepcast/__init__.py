"""Stepcast: recurrent sessions as data. The contract (manifest, protocol, errors) and the client.

    from stepcast import Client

The client and what belongs to it are loaded when they are first asked for: the contract alone needs pydantic only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calls import BatchAnswer, ModelInfo
    from .client import AsyncClient, AsyncSession, Client, Session
    from .codec import Answer, Forecast, SessionState
    from .errors import StepcastError
    from .manifest import Manifest
    from .models import export
    from .retry import Retry
    from .session_calls import SessionInfo
    from .stream import AsyncStream, Stream

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncSession",
    "AsyncStream",
    "BatchAnswer",
    "Client",
    "Forecast",
    "Manifest",
    "ModelInfo",
    "Retry",
    "Session",
    "SessionInfo",
    "SessionState",
    "StepcastError",
    "Stream",
    "__version__",
    "export",
]

_HOMES = {
    **dict.fromkeys(("AsyncClient", "AsyncSession", "Client", "Session"), "client"),
    **dict.fromkeys(("Answer", "Forecast", "SessionState"), "codec"),
    **dict.fromkeys(("BatchAnswer", "ModelInfo"), "calls"),
    **dict.fromkeys(("AsyncStream", "Stream"), "stream"),
    "Manifest": "manifest",
    "export": "models",
    "Retry": "retry",
    "SessionInfo": "session_calls",
    "StepcastError": "errors",
}
_EXTRA = {"httptools", "msgspec", "numpy", "websockets"}
"""What the extra `client` brings."""


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{home}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        command = 'pip install "stepcast[client]"'
        raise ImportError(f"stepcast.{name} needs {error.name}, which is not installed. Run: {command}") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
