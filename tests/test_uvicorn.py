"""What our connections take from uvicorn's, by name: an upgrade that lacks something fails here, not in production."""

import ast
import inspect
from types import ModuleType

import pytest
import uvicorn
from uvicorn.server import ServerState

from service.doors.http import connection as http
from service.doors.websocket import connection as websocket

pytestmark = pytest.mark.service

INHERITED = {
    "HttpConnection": [
        *("app", "cycle", "flow", "limit_concurrency", "loop", "root_path", "server_state"),
        *("timeout_keep_alive", "timeout_keep_alive_task", "transport"),
        *("data_received", "on_message_begin", "on_message_complete", "send_400_response", "shutdown"),
        "timeout_keep_alive_handler",
    ],
    "WebSocketConnection": [
        *("close_sent", "conn", "handshake_complete", "handshake_initiated", "loop", "ping_interval", "transport"),
        *("disconnected", "writable", "connection_lost", "data_received", "handle_connect", "pause_writing"),
        *("resume_writing", "send", "shutdown", "stop_keepalive"),
    ],
}
"""By our class: what it uses of the class that it extends, methods that it overrides and calls among them."""
MADE_LATER = {"scope"}
"""Looked for by getattr, where it may be missing."""


async def app(scope: object, receive: object, send: object) -> None:
    """An application."""


def uses(module: ModuleType, name: str) -> set[str]:
    """Attributes of self that a class uses and does not make: those of the class that it extends."""
    tree = ast.parse(inspect.getsource(module))
    made = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    found, own = set(), {node.name for node in made.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in ast.walk(made):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            (own if isinstance(node.ctx, ast.Store) and node.attr.startswith("_") else found).add(node.attr)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
            called = node.value.func
            if isinstance(called, ast.Name) and called.id == "super" and node.attr != "__init__":
                found.add(f"super.{node.attr}")
    inherited = {attr for attr in found if not attr.startswith("super.")} - own
    return inherited | {attr.removeprefix("super.") for attr in found if attr.startswith("super.")}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("module", "name"), [(http, "HttpConnection"), (websocket, "WebSocketConnection")], ids=["http", "websocket"]
)
async def test_uvicorns_connection_has_what_ours_uses(module: ModuleType, name: str) -> None:
    """Every name in the list is there, and the list names every one that the source uses."""
    ours = getattr(module, name)
    base = ours.__mro__[1]
    assert base.__module__.startswith("uvicorn.")
    config = uvicorn.Config(app, http=http.HttpConnection, ws=websocket.WebSocketConnection, log_level="critical")
    made = base(config, ServerState(), {})
    assert not [attr for attr in INHERITED[name] if not hasattr(made, attr)]
    public = {attr for attr in vars(ours(config, ServerState(), {})) if attr not in vars(made)}
    overridden = {attr for attr in vars(ours) if not attr.startswith("_") and hasattr(base, attr)}
    assert uses(module, name) - public - MADE_LATER | overridden == set(INHERITED[name])
