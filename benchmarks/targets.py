"""What the project promises about its speed, as ratios between contenders of one run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """`above` over `below` is at least `least`."""

    what: str
    above: str
    below: str
    least: float


@dataclass(frozen=True)
class Cost:
    """The server's processor time per step of `name` over that of its plain twin is at most `most`."""

    what: str
    name: str
    twin: str
    most: float


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
    Target("gRPC stream 4 x 16 on Redis / bare grpc.aio echo", "grpc-redis", "grpc-echo", 0.4),
    Target("gRPC stream 4 x 16 in memory / bare grpc.aio echo", "grpc-memory", "grpc-echo", 0.5),
    Target(
        "Open Inference Protocol, raw tensors / HTTP JSON, in memory", "inference-raw-memory", "http-json-memory", 0.8
    ),
    Target("Open Inference Protocol, raw tensors / HTTP JSON, on Redis", "inference-raw-redis", "http-json-redis", 0.8),
    Target("Batch-step of 256 in memory / bare onnxruntime", "batch-memory", "bare-256", 0.75),
    Target("Batch-step of 256 on Redis / bare onnxruntime", "batch-redis", "bare-256", 0.40),
    Target("score, Parquet sorted by time / bare onnxruntime at 256", "score-parquet", "bare-256", 0.7),
    Target("score, CSV sorted by time / bare onnxruntime at 256", "score-csv", "bare-256", 0.6),
    Target("score, Parquet sorted by key / bare onnxruntime at 256", "score-key-parquet", "bare-256", 0.7),
)

PLAIN_AOF = (
    Target("HTTP JSON on plain Redis / mosec + plain Redis", "aof-http", "aof-mosec", 1.6),
    Target("the same, imported graph in both", "aof-foreign", "aof-mosec-foreign", 1.5),
)
"""Redis writes its append-only file and nobody gives its pages back; steps have no seq."""

COSTS = (
    Cost("a gap in every step, HTTP JSON", "cost-http-gap", "cost-http-gaps", 1.3),
    Cost("a gap in every step, WebSocket 4 x 16", "cost-ws-gap", "cost-ws-gaps", 1.3),
    Cost("one gap in a batch step of 256, msgpack", "cost-batch-gap", "cost-batch-gaps", 1.3),
    Cost("one gap in a batch step of 256, JSON", "cost-batch-json-gap", "cost-batch-json-gaps", 1.3),
    Cost("named step, HTTP JSON", "cost-http-named", "cost-http", 1.5),
    Cost("a session of three rows, HTTP JSON", "cost-http-three", "cost-http", 2.0),
    Cost("a session of three rows, WebSocket 4 x 16", "cost-ws-three", "cost-ws", 2.0),
    Cost("first step of a new session, HTTP JSON", "cost-http-new", "cost-http", 3.0),
    Cost("first step of a new session, WebSocket 4 x 16", "cost-ws-new", "cost-ws", 3.0),
    Cost("first step of a new session, HTTP JSON on Redis", "cost-redis-new", "cost-redis-http", 3.0),
    Cost("5,000 sessions on one WebSocket / 64", "cost-ws-many", "cost-ws-few", 1.3),
    Cost("an x-request-id that changes per request", "cost-http-request-id", "cost-http", 1.3),
    Cost("a traceparent that changes per request", "cost-http-traceparent", "cost-http", 1.3),
    Cost("CORS on", "cost-http-cors", "cost-http", 1.1),
    Cost("CORS on, requests with Origin", "cost-http-cors-origin", "cost-http", 1.1),
    Cost("imported graph, HTTP JSON", "cost-http-foreign", "cost-http", 1.1),
    Cost("imported graph, WebSocket 4 x 16", "cost-ws-foreign", "cost-ws", 1.1),
    Cost("imported graph, batch step of 256", "cost-batch-foreign", "cost-batch", 1.1),
    Cost("Redis Cluster of three / one Redis, WebSocket 64 x 1", "cost-cluster-ws-64", "cost-redis-ws-64", 1.25),
    Cost("Redis Cluster of three / one Redis, WebSocket 4 x 16", "cost-cluster-ws-4", "cost-redis-ws-4", 1.25),
    Cost("Redis Cluster of three / one Redis, HTTP JSON", "cost-cluster-http", "cost-redis-http", 1.25),
)
