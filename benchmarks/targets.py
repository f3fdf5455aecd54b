"""What the project promises about its speed, as ratios between contenders of one run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """`above` over `below` is at least `least`."""

    what: str
    above: str
    below: str
    least: float


RATIOS = (
    Target("HTTP JSON on Redis / bare ASGI echo", "http-json-redis", "asgi-echo", 0.55),
    Target("HTTP JSON on Redis / mosec + Redis", "http-json-redis", "mosec-redis", 1.5),
    Target("HTTP JSON on Redis / FastAPI + Redis by hand", "http-json-redis", "by-hand-redis", 9.0),
    Target("HTTP JSON on Redis / FastAPI's empty pydantic echo", "http-json-redis", "fastapi-pydantic", 2.0),
    Target("HTTP JSON in memory / bare ASGI echo", "http-json-memory", "asgi-echo", 0.7),
    Target("HTTP JSON on sqlite / on Redis", "http-json-sqlite", "http-json-redis", 0.7),
    Target("WebSocket 4 x 16 on Redis / echo of the frames", "ws-json-4x16-redis", "ws-echo-json-4x16", 0.33),
    Target("WebSocket 4 x 16 in memory / echo of the frames", "ws-json-4x16-memory", "ws-echo-json-4x16", 0.5),
    Target("WebSocket 64 x 1 on Redis / echo of the frames", "ws-json-64x1-redis", "ws-echo-json-64x1", 0.3),
    Target("WebSocket 64 x 1 in memory / echo of the frames", "ws-json-64x1-memory", "ws-echo-json-64x1", 0.5),
    Target("WebSocket msgpack 4 x 16 on Redis / echo", "ws-msgpack-4x16-redis", "ws-echo-msgpack-4x16", 0.33),
    Target("WebSocket msgpack 4 x 16 in memory / echo", "ws-msgpack-4x16-memory", "ws-echo-msgpack-4x16", 0.5),
    Target("Batch-step of 256 in memory / bare onnxruntime", "batch-memory", "bare-256", 0.75),
    Target("Batch-step of 256 on Redis / bare onnxruntime", "batch-redis", "bare-256", 0.40),
)
