"""A plain ASGI application that answers a request with its own body."""

from typing import Any

from benchmarks.peers.common import run_uvicorn


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Echo."""
    if scope["type"] != "http":
        return
    message = await receive()
    body = message["body"]
    while message["more_body"]:
        message = await receive()
        body += message["body"]
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve(port: int, _: str) -> None:
    """Serve."""
    run_uvicorn(app, port)
