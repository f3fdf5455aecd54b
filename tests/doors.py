"""The ways into a server, with one face, so that one script can be run through all of them."""

import json
from contextlib import ExitStack
from typing import Any, ClassVar, Protocol

import httpx
import msgspec
import numpy as np
from websockets.sync.client import connect

from stepcast.errors import from_problem

Array = np.ndarray[Any, Any]
State = dict[str, dict[str, Array]]


class Door(Protocol):
    """What a script needs of a door: one call of one session's operation."""

    def call(self, op: str, session: str, **fields: Any) -> dict[str, Any]:
        """An operation by its WebSocket name; raises the error that the server answered."""

    def close(self) -> None:
        """Give connections back."""


class Script:
    """A door's user: numpy in, numpy out."""

    def __init__(self, door: Door) -> None:
        self.door = door

    def step(self, session: str, x: Array, seq: int | None = None, mask: Any = None) -> tuple[Array, int]:
        """Step; outputs of the inputs' rank, and the step number."""
        fields: dict[str, Any] = {"inputs": x}
        if seq is not None:
            fields["seq"] = seq
        if mask is not None:
            fields["mask"] = mask
        answer = self.door.call("step", session, **fields)
        return _outputs(answer), answer["step"]

    def state(self, session: str) -> State:
        """The whole state."""
        return _state(self.door.call("state.get", session))

    def document(self, session: str) -> dict[str, Any]:
        """What state.get answers, as it is."""
        return self.door.call("state.get", session)

    def put(self, session: str, state: State, **fields: Any) -> dict[str, Any]:
        """Set the whole state."""
        plain = {layer: {key: value.tolist() for key, value in keys.items()} for layer, keys in state.items()}
        return self.door.call("state.set", session, state=plain, **fields)


class HttpDoor:
    """Door 1, with JSON or msgpack bodies for steps."""

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

    def __init__(self, url: str, model: str, packed: bool, timeout: float = 20) -> None:
        self._client = httpx.Client(base_url=f"{url}/v1/models/{model}/sessions", timeout=timeout, verify=False)
        self._packed = packed

    def call(self, op: str, session: str, **fields: Any) -> dict[str, Any]:
        method, path = self._ROUTES[op]
        kind = "application/msgpack" if self._packed else "application/json"
        content = None if method in ("GET",) or op in ("clear", "end") else _encode(fields, self._packed)
        headers = {"content-type": kind, "accept": kind}
        response = self._client.request(method, f"/{session}{path}", content=content, headers=headers)
        if response.status_code == 204:
            return {}
        if response.status_code >= 400:
            assert response.headers["content-type"] == "application/problem+json", response.text
            raise from_problem(response.json())
        return _decode(response.content, self._packed)

    def close(self) -> None:
        self._client.close()


class WebSocketDoor:
    """Door 2: any number of sessions on one socket, JSON or msgpack frames."""

    def __init__(self, url: str, model: str, packed: bool) -> None:
        self._opened = ExitStack()
        address = f"ws{url.removeprefix('http')}/v1/models/{model}/stream"
        self._socket = self._opened.enter_context(connect(address, max_size=None))
        self._packed = packed
        self._number = 0

    def call(self, op: str, session: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        frame = _encode({"op": op, "id": self._number, "session": session, **fields}, self._packed)
        self._socket.send(frame if self._packed else frame.decode())
        answer = _decode(self._socket.recv(timeout=20), self._packed)
        assert answer.pop("id") == self._number
        if "error" in answer:
            raise from_problem(answer["error"])
        return answer

    def close(self) -> None:
        self._opened.close()


DOORS = {
    "http-json": lambda url, model: HttpDoor(url, model, packed=False),
    "http-msgpack": lambda url, model: HttpDoor(url, model, packed=True),
    "websocket-json": lambda url, model: WebSocketDoor(url, model, packed=False),
    "websocket-msgpack": lambda url, model: WebSocketDoor(url, model, packed=True),
}


def _encode(fields: dict[str, Any], packed: bool) -> bytes:
    plain = dict(fields)
    for name, value in fields.items():
        if isinstance(value, np.ndarray) and name == "inputs" and packed:
            plain["inputs"] = value.astype("<f4").tobytes()
            plain["shape"] = list(value.shape)
        elif isinstance(value, np.ndarray):
            plain[name] = _nulls(value.tolist())
    return msgspec.msgpack.encode(plain) if packed else json.dumps(plain).encode()


def _nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_nulls(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _decode(data: str | bytes, packed: bool) -> dict[str, Any]:
    answer: dict[str, Any] = msgspec.msgpack.decode(data) if packed else msgspec.json.decode(data)
    return answer


def _outputs(answer: dict[str, Any]) -> Array:
    outputs = answer["outputs"]
    if isinstance(outputs, bytes):
        return np.frombuffer(outputs, "<f4").reshape(answer["shape"])
    return np.array(outputs, np.float32)


def _state(answer: dict[str, Any]) -> State:
    rows = answer["examples"]
    return {
        layer: {
            key: np.frombuffer(value, "<f4").reshape(rows, -1)
            if isinstance(value, bytes)
            else np.array(value, np.float32).reshape(rows, -1)
            for key, value in keys.items()
        }
        for layer, keys in answer["state"].items()
    }
