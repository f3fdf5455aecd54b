"""A plain ASGI application that answers a WebSocket frame with itself."""

from typing import Any

from benchmarks.peers.common import run_uvicorn


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Echo."""
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") is not None:
            await send({"type": "websocket.send", "text": message["text"]})
        else:
            await send({"type": "websocket.send", "bytes": message["bytes"]})


def serve(port: int, _: str) -> None:
    """Serve."""
    run_uvicorn(app, port)
