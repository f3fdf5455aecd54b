"""The doors of gRPC, with the face of every other: calls of their own, and one stream for all of them."""

import json
import queue
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from doors import TIMEOUT_S, Answer, Call, InferenceDoor
from grpc_calls import INFER, STREAM_INFER, service_pb2
from serving import GRPC_ADDRESSES

from service.doors.grpc.callers import PROBLEM
from stepcast.errors import from_problem

Receive = Callable[[], Answer]


class GrpcDoor(InferenceDoor):
    """Steps over gRPC; everything else goes through door 1, and a sequence that is not there is created."""

    def __init__(self, url: str, model: str, streams: bool) -> None:
        super().__init__(url, model, raw=True)
        self._model = model
        self._channel = grpc.insecure_channel(GRPC_ADDRESSES[url], [("grpc.use_local_subchannel_pool", 1)])
        self._waiting: dict[int, Receive] = {}
        self._stream = _Stream(self._channel) if streams else None

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._channel.close()
        super().close()

    def _send(self, place: int, call: Call) -> ConnectionError | None:
        if call.op != "step":
            self._waiting.pop(place, None)
            return super()._send(place, call)
        request = self._asked(call)
        if self._stream is not None:
            self._waiting[place] = self._stream.send(request)
            return None
        coming = self._channel.unary_unary(INFER).future(request.SerializeToString(), timeout=TIMEOUT_S)

        def receive() -> Answer:
            try:
                return _answer(service_pb2.ModelInferResponse.FromString(coming.result()))
            except grpc.RpcError as error:
                return _refusal(error)

        self._waiting[place] = receive
        return None

    def _receive(self, place: int, call: Call) -> Answer:
        receive = self._waiting.pop(place, None)
        return super()._receive(place, call) if receive is None else receive()

    def _asked(self, call: Call) -> Any:
        tensors = {self._name: np.asarray(call.fields["inputs"], "<f4")}
        if "mask" in call.fields:
            tensors["stepcast_mask"] = np.asarray(call.fields["mask"], np.uint8)
        request = service_pb2.ModelInferRequest(model_name=self._model)
        request.parameters["sequence_id"].string_param = call.session
        if "seq" in call.fields:
            request.parameters["stepcast_seq"].int64_param = call.fields["seq"]
        for name, array in tensors.items():
            kind = "FP32" if array.dtype == np.float32 else "UINT8"
            request.inputs.add(name=name, datatype=kind, shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        return request


class _Stream:
    """One stream; an answer is told by its id."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = channel.stream_stream(STREAM_INFER)(iter(self._out.get, None))
        self._number = 0
        self._came: dict[str, Answer] = {}

    def send(self, request: Any) -> Receive:
        """Send a request; what receives its answer."""
        self._number += 1
        name = request.id = str(self._number)
        self._out.put(request.SerializeToString())
        return lambda: self._receive(name)

    def close(self) -> None:
        self._out.put(None)
        self._call.cancel()

    def _receive(self, name: str) -> Answer:
        while name not in self._came:
            try:
                said = service_pb2.ModelStreamInferResponse.FromString(next(self._call))
            except grpc.RpcError as error:
                return _refusal(error)
            response = said.infer_response
            if said.error_message:
                problem = json.loads(response.parameters["stepcast_problem"].string_param)
                self._came[response.id] = from_problem(problem)
            else:
                self._came[response.id] = _answer(response)
        return self._came.pop(name)


def _answer(response: Any) -> Answer:
    (output,), (data,) = response.outputs, response.raw_output_contents
    step = response.parameters["stepcast_step"].int64_param
    return {"outputs": data, "shape": list(output.shape), "step": step}


def _refusal(error: Any) -> Answer:
    """What the server answered, or that the connection was lost."""
    told = dict(error.trailing_metadata() or ())
    return from_problem(json.loads(told[PROBLEM])) if PROBLEM in told else ConnectionError(repr(error.code()))
