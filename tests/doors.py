"""The ways into a server, with one face, so that one script can be run through all of them."""

import json
import select
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol
from urllib.request import urlopen

import msgspec
import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from stepcast.errors import SequenceNotStarted, StepcastError, from_problem
from stepcast.manifest import Manifest
from stepcast.wire import BROKEN, Response

Array = np.ndarray[Any, Any]
State = dict[str, dict[str, Array]]
Answer = dict[str, Any] | StepcastError | ConnectionError
TIMEOUT_S = 20


class Call(NamedTuple):
    """One session's operation, by its WebSocket name."""

    op: str
    session: str
    fields: dict[str, Any]


class Door(Protocol):
    """What a script needs of a door."""

    def together(self, calls: Sequence[Call]) -> list[Answer]:
        """Calls of different sessions, all sent before the first answer is read.

        Returns:
            For each its answer, the error that the server answered, or that the connection was lost.
        """

    def drop(self, call: Call) -> None:
        """Send a call and be gone before its answer; the door cannot be used any more."""

    def close(self) -> None:
        """Give connections back."""


class Script:
    """A door's user: numpy in, numpy out."""

    def __init__(self, door: Door, manifest: Manifest) -> None:
        self.door, self.manifest = door, manifest

    def call(self, op: str, session: str, **fields: Any) -> dict[str, Any]:
        """One operation; raises the error that the server answered."""
        return self._ask(Call(op, session, fields))

    def step(self, session: str, x: Array, seq: int | None = None, mask: Any = None) -> tuple[Array, int]:
        """Step; outputs of the inputs' rank, and the step number."""
        return outputs_of(self._ask(step(session, x, seq, mask)))

    def state(self, session: str) -> State:
        """The whole state."""
        answer = self.document(session)
        return {
            layer: {
                key: _array(value, self.manifest.layers[layer][key].dtype, (answer["examples"], -1))
                for key, value in keys.items()
            }
            for layer, keys in answer["state"].items()
        }

    def document(self, session: str) -> dict[str, Any]:
        """What state.get answers, as it is."""
        return self.call("state.get", session)

    def put(self, session: str, state: State, **fields: Any) -> dict[str, Any]:
        """Set the whole state."""
        return self._ask(put(session, state, **fields))

    def _ask(self, call: Call) -> dict[str, Any]:
        (answer,) = self.door.together([call])
        if isinstance(answer, Exception):
            raise answer
        return answer


def step(session: str, x: Array, seq: int | None = None, mask: Any = None) -> Call:
    """A step."""
    given = {"inputs": x, "seq": seq, "mask": mask}
    return Call("step", session, {name: value for name, value in given.items() if value is not None})


def put(session: str, state: State, **fields: Any) -> Call:
    """The whole state, to be set."""
    plain = {layer: {key: value.tolist() for key, value in keys.items()} for layer, keys in state.items()}
    return Call("state.set", session, {"state": plain, **fields})


def outputs_of(answer: Answer) -> tuple[Array, int]:
    """Outputs of the inputs' rank, and the step number; raises the error that was answered instead."""
    if isinstance(answer, Exception):
        raise answer
    return _array(answer["outputs"], "float32", answer.get("shape")), answer["step"]


class HttpDoor:
    """Door 1, with JSON or msgpack bodies: as many connections as there are calls at once."""

    _ROUTES: ClassVar[dict[str, tuple[str, str]]] = {
        "step": ("POST", "/step"),
        "state.get": ("GET", "/state"),
        "state.set": ("PUT", "/state"),
        "clear": ("DELETE", "/state"),
        "fork": ("POST", "/fork"),
        "checkpoint": ("POST", "/checkpoints"),
        "rewind": ("POST", "/rewind"),
        "rollout": ("POST", "/rollout"),
        "info": ("GET", ""),
        "end": ("DELETE", ""),
    }

    def __init__(self, url: str, model: str, packed: bool, named: str | None = None) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._address, self._path = (host, int(port)), f"/v1/models/{model}"
        self._packed, self._wire = packed, wire(url, model, packed, named)
        self._lines: list[socket.socket] = []

    def together(self, calls: Sequence[Call]) -> list[Answer]:
        sent = [self._send(place, call) for place, call in enumerate(calls)]
        return [error or self._receive(place, calls[place]) for place, error in enumerate(sent)]

    def predict(self, **fields: Any) -> Array:
        """Whole sequences, without a session."""
        answer = self.post("/predict", fields)
        if isinstance(answer, Exception):
            raise answer
        return _array(answer["outputs"], "float32", answer.get("shape"))

    def post(self, path: str, fields: dict[str, Any]) -> Answer:
        """A call of the model's own."""
        call = Call("post", path, fields)
        return self._send(0, call) or self._receive(0, call)

    def drop(self, call: Call) -> None:
        self._send(0, call)
        self.close()

    def close(self) -> None:
        for line in self._lines:
            line.close()

    def _send(self, place: int, call: Call) -> ConnectionError | None:
        head, body = self._request(call)
        try:
            if place < len(self._lines) and _has_more(self._lines[place]):
                self._lines[place].close()  # nothing is to come: the server has ended what was idle for long
                self._lines[place] = self._connect()
            elif place == len(self._lines):
                self._lines.append(self._connect())
            self._lines[place].sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        except OSError as error:
            return ConnectionError(str(error))
        return None

    def _request(self, call: Call) -> tuple[str, bytes]:
        """A request's head up to the content length, and its body."""
        method, path = self._route(call)
        kind = "application/msgpack" if self._packed else "application/json"
        body = b"" if method == "GET" or call.op in ("clear", "end") else self._wire.encode(call.fields)
        return f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\naccept: {kind}\r\n", body

    def _connect(self) -> socket.socket:
        line = socket.create_connection(self._address, TIMEOUT_S)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return line

    def _route(self, call: Call) -> tuple[str, str]:
        if call.op == "post":
            return "POST", self._path + call.session
        method, path = self._ROUTES[call.op]
        return method, f"{self._path}/sessions/{call.session}{path}"

    def _receive(self, place: int, call: Call) -> Answer:
        response = _Typed()
        try:
            while not response.feed(self._lines[place].recv(2**18)):
                pass
        except BROKEN as error:
            return ConnectionError(repr(error))
        return self._answer(call, response)

    def _answer(self, call: Call, response: "_Typed") -> Answer:
        status, body = response.reply
        if status == 204:
            return {}
        if status >= 400:
            assert response.content_type == b"application/problem+json", body
            return from_problem(json.loads(body))
        return self._wire.decode(body)


class _Typed(Response):
    """The SDK's reader, which http.client takes five times as long as; and what the head says of the body."""

    content_type = b""
    json_bytes: int | None = None

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header line came."""
        super().on_header(name, value)
        if name.lower() == b"content-type":
            self.content_type = value
        elif name.lower() == b"inference-header-content-length":
            self.json_bytes = int(value)


class InferenceDoor(HttpDoor):
    """The Open Inference Protocol, its tensors raw or as JSON; everything but steps goes through door 1.

    A sequence has to be there before it is stepped: where it is not, it is created, as other doors do by themselves.
    """

    def __init__(self, url: str, model: str, raw: bool) -> None:
        super().__init__(url, model, packed=False)
        with urlopen(f"{url}/v2/models/{model}", timeout=TIMEOUT_S) as response:
            (tensor,) = json.load(response)["inputs"]
        self._name, self._raw, self._infer = tensor["name"], raw, f"/v2/models/{model}/infer"

    def together(self, calls: Sequence[Call]) -> list[Answer]:
        answers = super().together(calls)
        missing = [place for place, answer in enumerate(answers) if isinstance(answer, SequenceNotStarted)]
        for place in missing:
            self.post("/sessions", {"session": calls[place].session})  # 409: another has created it
        if missing:
            again = super().together([calls[place] for place in missing])
            for place, answer in zip(missing, again, strict=True):
                answers[place] = answer
        return answers

    def _request(self, call: Call) -> tuple[str, bytes]:
        if call.op != "step":
            return super()._request(call)
        tensors = {self._name: np.asarray(call.fields["inputs"], "<f4")}
        if "mask" in call.fields:
            tensors["stepcast_mask"] = np.asarray(call.fields["mask"], np.uint8)
        inputs, parts = [], []
        for name, array in tensors.items():
            kind = "FP32" if array.dtype == np.float32 else "UINT8"
            tensor: dict[str, Any] = {"name": name, "datatype": kind, "shape": array.shape}
            if self._raw:
                tensor["parameters"] = {"binary_data_size": array.nbytes}
                parts.append(array.tobytes())
            else:
                tensor["data"] = _nulls(array.tolist())
            inputs.append(tensor)
        parameters = {"sequence_id": call.session, "binary_data_output": self._raw}
        parameters |= {"stepcast_seq": call.fields["seq"]} if "seq" in call.fields else {}
        said = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
        length = f"inference-header-content-length: {len(said)}\r\n" if self._raw else ""
        return f"POST {self._infer} HTTP/1.1\r\nhost: x\r\n{length}", b"".join([said, *parts])

    def _answer(self, call: Call, response: "_Typed") -> Answer:
        if call.op != "step":
            return super()._answer(call, response)
        status, body = response.reply
        if status != 200:
            problem = json.loads(body)
            return from_problem({**problem, "detail": problem["error"]})
        size = response.json_bytes or len(body)
        said = json.loads(body[:size])
        (output,) = said["outputs"]
        data = body[size:] if self._raw else np.array(output["data"], "<f4").tobytes()
        return {"outputs": data, "shape": output["shape"], "step": said["parameters"]["stepcast_step"]}


class BatchDoor:
    """The batch step: sessions as columns, one step each; everything else goes through door 1."""

    def __init__(self, url: str, model: str, packed: bool, named: str | None = None) -> None:
        self._http = HttpDoor(url, model, packed, named)

    def together(self, calls: Sequence[Call]) -> list[Answer]:
        steps = [_Stepping(call) for call in calls if call.op == "step"]
        if len(steps) < len(calls):
            return self._http.together(calls)
        while going := [step for step in steps if step.goes_on]:
            answer = self._http.post("/step", _columns(going))
            for place, step in enumerate(going):
                step.take(answer, place)
        return [step.answer() for step in steps]

    def drop(self, call: Call) -> None:
        self._http.drop(Call("post", "/step", _columns([_Stepping(call)])))

    def close(self) -> None:
        self._http.close()


class _Stepping:
    """A step call of one example as steps of batches."""

    def __init__(self, call: Call) -> None:
        x: Array = call.fields["inputs"]
        assert "mask" not in call.fields, "the batch step has no mask"
        assert x.size == x.shape[-1] * (x.shape[1] if x.ndim == 3 else 1), "the batch step has one example a session"
        self.session, self.rank, self.x = call.session, x.ndim, x.reshape(-1, x.shape[-1])
        self.seq = None if "seq" not in call.fields else call.fields["seq"] - len(self.x) + 1
        self.outputs: list[Array] = []
        self.number = 0
        self.error: StepcastError | ConnectionError | None = None

    @property
    def goes_on(self) -> bool:
        return self.error is None and len(self.outputs) < len(self.x)

    def take(self, answer: Answer, place: int) -> None:
        """The next step's answer, in a batch's."""
        if isinstance(answer, Exception):
            self.error = answer
        elif problem := {int(i): p for i, p in answer["errors"].items()}.get(place):
            self.error = from_problem(problem)
        else:
            self.outputs.append(_array(answer["outputs"], "float32", answer.get("shape"))[place])
            self.number = answer["steps"][place]
            self.seq = None if self.seq is None else self.seq + 1

    def answer(self) -> Answer:
        if self.error is not None:
            return self.error
        y = np.stack(self.outputs)
        return {"outputs": y[0] if self.rank == 1 else y if self.rank == 2 else y[None], "step": self.number}


def _has_more(line: socket.socket) -> bool:
    """Whether something has come that nobody waits for: the end, mostly. (select() ends at 1,024 open files.)"""
    poll = select.poll()
    poll.register(line, select.POLLIN)
    return bool(poll.poll(0))


def _columns(steps: Sequence[_Stepping]) -> dict[str, Any]:
    inputs = np.stack([step.x[len(step.outputs)] for step in steps])
    fields = {"sessions": [step.session for step in steps], "inputs": inputs}
    seq = [step.seq for step in steps]
    return fields if seq == [None] * len(seq) else {**fields, "seq": seq}


class WebSocketDoor:
    """Door 2: any number of sessions on one socket, JSON or msgpack frames."""

    def __init__(self, url: str, model: str, packed: bool, named: str | None = None) -> None:
        self._opened = ExitStack()
        address = f"ws{url.removeprefix('http')}/v1/models/{model}/stream"
        try:
            self._socket = self._opened.enter_context(
                connect(address, max_size=None, compression=None, ping_interval=None)
            )
        except InvalidStatus as error:
            raise from_problem(json.loads(error.response.body)) from error
        self._packed, self._wire = packed, wire(url, model, packed, named)
        self._number = 0

    def call(self, op: str, session: str, **fields: Any) -> dict[str, Any]:
        """One operation; raises the error that the server answered."""
        (answer,) = self.together([Call(op, session, fields)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def together(self, calls: Sequence[Call]) -> list[Answer]:
        answers: list[Answer] = [ConnectionError("no answer")] * len(calls)
        first = self._number + 1
        try:
            for call in calls:
                self._send(call)
            for _ in calls:
                answer = self._wire.decode(self._socket.recv(timeout=TIMEOUT_S))
                place = answer.pop("id") - first
                answers[place] = from_problem(answer["error"]) if "error" in answer else answer
        except (ConnectionClosed, OSError) as error:
            lost = ConnectionError(repr(error))
            return [lost if isinstance(answer, ConnectionError) else answer for answer in answers]
        return answers

    def drop(self, call: Call) -> None:
        self._send(call)
        self._socket.socket.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        self._opened.close()

    def _send(self, call: Call) -> None:
        self._number += 1
        fields = {"op": call.op, "id": self._number, "session": call.session, **call.fields}
        frame = self._wire.encode(fields)
        self._socket.send(frame if self._packed else frame.decode())


Opener = Callable[[str, str], Door]
DOORS: dict[str, Opener] = {
    "http-json": lambda url, model: HttpDoor(url, model, packed=False),
    "http-msgpack": lambda url, model: HttpDoor(url, model, packed=True),
    "websocket-json": lambda url, model: WebSocketDoor(url, model, packed=False),
    "websocket-msgpack": lambda url, model: WebSocketDoor(url, model, packed=True),
    "inference-raw": lambda url, model: InferenceDoor(url, model, raw=True),
}


def _grpc(url: str, model: str, streams: bool) -> Door:
    from grpc_doors import GrpcDoor  # which is made of what stands here

    return GrpcDoor(url, model, streams)


DOORS |= {
    "grpc-calls": lambda url, model: _grpc(url, model, streams=False),
    "grpc-stream": lambda url, model: _grpc(url, model, streams=True),
}
BATCH_DOORS: dict[str, Opener] = {
    "batch-json": lambda url, model: BatchDoor(url, model, packed=False),
    "batch-msgpack": lambda url, model: BatchDoor(url, model, packed=True),
}
"""For steps of one example by one step, without masks."""

STEP_DOORS = DOORS | BATCH_DOORS

_KINDS: dict[str, type[HttpDoor | WebSocketDoor | BatchDoor]] = {
    "http": HttpDoor,
    "websocket": WebSocketDoor,
    "batch": BatchDoor,
}
NAMED_DOORS: dict[str, Opener] = {
    f"{kind}-{'msgpack' if packed else 'json'}-{named}": partial(door, packed=packed, named=named)
    for kind, door in _KINDS.items()
    for packed in (False, True)
    for named in ("columns", "records")
}
"""The same ways with inputs and outputs by name."""


class Wire:
    """Between fields with arrays and bytes; arrays by position."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def encode(self, fields: dict[str, Any]) -> bytes:
        """A body or a frame."""
        plain = dict(fields)
        for name, value in fields.items():
            if isinstance(value, np.ndarray) and name == "inputs" and self.packed:
                plain["inputs"] = value.astype("<f4").tobytes()
                plain["shape"] = list(value.shape)
            elif isinstance(value, np.ndarray):
                plain[name] = _nulls(value.tolist())
        return msgspec.msgpack.encode(plain) if self.packed else json.dumps(plain).encode()

    def decode(self, data: str | bytes) -> dict[str, Any]:
        """An answer."""
        answer: dict[str, Any] = msgspec.msgpack.decode(data) if self.packed else msgspec.json.decode(data)
        return answer


class NamedWire(Wire):
    """Inputs and outputs go by name: as an object of columns, or, where there is one step, as records."""

    def __init__(self, packed: bool, manifest: dict[str, Any], style: str) -> None:
        super().__init__(packed)
        self._style = style
        self._widths = {feature["name"]: feature["width"] for feature in manifest["features"]}
        self._categories = {
            f["name"]: ["none of them", *f["categories"]] for f in manifest["features"] if f["categories"]
        }
        self._outputs = manifest["classes"] or [output["name"] for output in manifest["outputs"]]
        self._classifies = manifest["classes"] is not None

    def encode(self, fields: dict[str, Any]) -> bytes:
        inputs = fields.get("inputs")
        if not isinstance(inputs, np.ndarray):
            return super().encode(fields)
        plain = {**fields, "inputs": self.named(inputs)}
        if self.packed and inputs.ndim > 1 and self._style == "columns":
            plain["inputs"] = {
                name: self._plain(name, c) if name in self._categories else np.array(c, "<f4").tobytes()
                for name, c in self._columns(inputs).items()
            }
            plain["shape"] = list(inputs.shape[:-1])
        mask = fields.get("mask")
        return super().encode(plain if mask is None else {**plain, "mask": np.asarray(mask).tolist()})

    def decode(self, data: str | bytes) -> dict[str, Any]:
        answer = super().decode(data)
        outputs = answer.get("outputs")
        if isinstance(outputs, list | dict):
            answer["outputs"] = self._by_position(outputs, answer.pop("shape", None))
        return answer

    def named(self, x: Array) -> Any:
        """Inputs (F), (N, F) or (N, T, F) by name, as plain lists and numbers."""
        if self._style == "records" and x.ndim == 2:
            return [self.named(row) for row in x]
        return {name: self._plain(name, column) for name, column in self._columns(x).items()}

    def _plain(self, name: str, column: Array) -> Any:
        """A column as lists and numbers; categories as their texts."""
        if name not in self._categories:
            return _nulls(column.tolist())
        texts = np.array([*self._categories[name], None], object)
        found = texts[np.where(np.isnan(column), -1, np.nan_to_num(column)).astype(int)]
        return found.tolist() if column.ndim else found

    def _columns(self, x: Array) -> dict[str, Array]:
        found, at = {}, 0
        for name, width in self._widths.items():
            found[name] = x[..., at] if width == 1 else x[..., at : at + width]
            at += width
        return found

    def _by_position(self, outputs: Any, shape: Any) -> Array:
        if isinstance(outputs, list):
            return np.stack([self._by_position(record, None) for record in outputs])
        if self._classifies:
            assert list(outputs) == ["class", "probabilities"]
            label, outputs = np.array(outputs["class"], object), outputs["probabilities"]
        assert list(outputs) == self._outputs
        y = np.stack([_array(value, "float32", shape) for value in outputs.values()], axis=-1)
        if self._classifies:
            names = np.array([*self._outputs, None], object)
            masked = np.isnan(y).any(-1)
            np.testing.assert_array_equal(label, names[np.where(masked, -1, np.nan_to_num(y).argmax(-1))])
        return y


def wire(url: str, model: str, packed: bool, named: str | None) -> Wire:
    """How a door's arrays go over the wire; by the names of the live version where they go `named`."""
    if named is None:
        return Wire(packed)
    with urlopen(f"{url}/v1/models/{model}", timeout=TIMEOUT_S) as response:
        return NamedWire(packed, json.load(response), named)


def _nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_nulls(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _array(value: Any, dtype: str, shape: Any) -> Array:
    array = np.frombuffer(value, dtype) if isinstance(value, bytes) else np.array(value, dtype)
    return array if shape is None else array.reshape(shape)
