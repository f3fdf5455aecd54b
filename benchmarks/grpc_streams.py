"""Steps over streams of gRPC, beside a bare grpc.aio echo of the same messages."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from . import load, requests
from .bare import POOL, pool
from .contenders import LANES, SESSIONS, Bench, Contender, Driver, Run
from .http2 import GrpcLine
from .servers import free_port

STREAMS = 4
METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
ECHO = "/bare.Bare/Echo"


def everyone() -> list[Contender]:
    """The echo, and a stream on each store."""
    return [_echo(), *(_stream(store) for store in ("memory", "sqlite", "redis"))]


def _messages() -> Any:
    """The protocol's messages; they need the extra `grpc`."""
    from service.doors.grpc import messages

    return messages


def infer(tag: str, sessions: int, lanes: int) -> load.Encode:
    """Requests as tritonclient makes them: one step of a sequence, numbered; the id is the lane.

    A message's bytes are those of its fields in any order, so that only the number is made for each request.
    """
    make = _messages().InferRequest

    def named(session: int, start: bool) -> bytes:
        request = make(model_name="bench", id=str(session % lanes))
        request.parameters["sequence_id"].string_param = f"{tag}-{session}"
        request.parameters["sequence_start"].bool_param = start
        request.parameters["sequence_end"].bool_param = False
        request.inputs.add(name="x", datatype="FP32", shape=[pool().shape[1]])
        return bytes(request.SerializeToString())

    def numbered(k: int) -> bytes:
        request = make()
        request.parameters["stepcast_seq"].int64_param = k + 1
        return bytes(request.SerializeToString())

    heads = [(named(s, False), named(s, True)) for s in range(sessions)]
    rows = [make(raw_input_contents=[row.tobytes()]).SerializeToString() for row in pool()]
    return lambda s, k: heads[s][k == 0] + rows[(13 * s + k) % POOL] + numbered(k)


def outputs(body: bytes) -> Any:
    """The outputs of an answer."""
    answer = _messages().StreamInferResponse.FromString(body)
    if answer.error_message:
        raise requests.WrongAnswer(answer.error_message)
    return np.frombuffer(answer.infer_response.raw_output_contents[0], "<f4")


def lines(method: str, port: int | None, tagged: bool) -> Callable[[int], list[load.Line]]:
    """LANES lanes over STREAMS streams, to the server's port or another one."""
    read = _messages().StreamInferResponse.FromString if tagged else None

    def lane_of(body: bytes) -> int:
        answer = read(body)
        if answer.error_message:
            raise load.LoadFailed(f"refused: {answer.error_message}")
        return int(answer.infer_response.id)

    def connect(server_port: int) -> list[load.Line]:
        return [
            GrpcLine(port or server_port, method, range(i, LANES, STREAMS), lane_of if tagged else None)
            for i in range(STREAMS)
        ]

    return connect


def _echo() -> Contender:
    def prepare(bench: Bench) -> Run:
        encode = infer("g", SESSIONS, LANES)

        def verify(answers: load.Answers) -> int:
            return requests.check_echo(answers, encode, strip=False)

        return Driver(bench, bench.park.peer("grpc_echo"), encode, lines(ECHO, None, False), verify)

    what = f"bare grpc.aio echo of the messages, {STREAMS} streams x {LANES // STREAMS} in flight"
    return Contender("grpc-echo", "limit", what, prepare, "grpc")


def _stream(store: str) -> Contender:
    def prepare(bench: Bench) -> Run:
        port = free_port()
        server = bench.stepcast(store, "-grpc", grpc_port=port)
        verify = partial(requests.check, decode=outputs, truth=bench.truth)
        connect = lines(METHOD, port, True)
        redis = bench.park.redis_of(store)
        return Driver(bench, server, infer("g", SESSIONS, LANES), connect, verify, redis=redis)

    what = f"Stepcast, gRPC, {STREAMS} streams x {LANES // STREAMS} in flight, {store}"
    return Contender(f"grpc-{store}", "stepcast", what, prepare, "grpc")
