"""What our connections take from uvicorn's, by name: an upgrade that lacks something fails here, not in production."""

import ast
import inspect
from itertools import takewhile
from types import ModuleType

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from service.doors.http import connection as http
from service.doors.websocket import connection as websocket

pytestmark = pytest.mark.service

INHERITED = {
    "HttpConnection": [
        *("app", "client", "connections", "cycle", "flow", "headers", "limit_concurrency", "loop", "pipeline"),
        *("root_path", "server_state", "timeout_keep_alive", "timeout_keep_alive_task", "transport", "url"),
        *("connection_made", "connection_lost", "data_received", "handle_websocket_upgrade", "on_body"),
        *("on_headers_complete", "on_message_begin", "on_message_complete", "on_response_complete"),
        *("pause_writing", "resume_writing", "send_400_response", "shutdown", "timeout_keep_alive_handler"),
        "_unset_keepalive_if_required",
    ],
    "WebSocketConnection": [
        *("close_sent", "conn", "handshake_complete", "handshake_initiated", "loop", "ping_interval", "transport"),
        *("disconnected", "writable", "connection_lost", "data_received", "handle_connect", "pause_writing"),
        *("resume_writing", "send", "shutdown", "stop_keepalive"),
    ],
}
"""By our class: what it uses of the class that it extends, methods that it overrides and calls among them."""
OF_A_CYCLE = {
    *("disconnected", "keep_alive", "message_event", "more_body", "response_complete", "response_started", "transport")
}
"""What we use of a request on uvicorn's way."""
MADE_LATER = {"scope", "headers", "url"}
"""Looked for by getattr, where it may be missing."""


async def app(scope: object, receive: object, send: object) -> None:
    """An application."""


def uses(classes: list[type]) -> set[str]:
    """Attributes of self that classes use and do not make: those of the class that they extend."""
    found, own = set(), set()
    nodes: list[ast.AST] = []
    for made in classes:
        tree = ast.parse(inspect.getsource(made))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        own |= {node.name for node in functions}
        nodes += ast.walk(tree)
    for node in nodes:
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
    classes = list(takewhile(lambda made: not made.__module__.startswith("uvicorn."), ours.__mro__))
    base = ours.__mro__[len(classes)]
    config = uvicorn.Config(app, http=http.HttpConnection, ws=websocket.WebSocketConnection, log_level="critical")
    made = base(config, ServerState(), {})
    assert not [attr for attr in INHERITED[name] if attr not in MADE_LATER and not hasattr(made, attr)]
    public = {attr for attr in vars(ours(config, ServerState(), {})) if attr not in vars(made)}
    made_by_us = {attr for made_class in classes for attr in vars(made_class)}
    overridden = {attr for attr in made_by_us if not attr.startswith("_") and hasattr(base, attr)}
    assert uses(classes) - public - {"scope"} | overridden == set(INHERITED[name])


def test_a_request_of_uvicorn_has_what_ours_uses() -> None:
    """The attributes of its cycle that decide how a connection goes on."""
    cycle = RequestResponseCycle(**dict.fromkeys(inspect.signature(RequestResponseCycle).parameters))  # type: ignore[arg-type]
    assert vars(cycle).keys() >= OF_A_CYCLE
