"""LitServe with its batching, states in the worker's memory."""

from typing import Any

import litserve

from benchmarks.peers.common import EMPTY, Stepper


class Step(litserve.LitAPI):
    """Steps the sessions of a batch."""

    def setup(self, device: str) -> None:
        """Load the model."""
        self._stepper, self._states = Stepper(), dict[str, bytes]()

    def decode_request(self, request: dict[str, Any]) -> tuple[str, list[float]]:
        """Session and inputs."""
        return request["session"], request["inputs"]

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Requests as they are."""
        return inputs

    def predict(self, batch: list[tuple[str, list[float]]]) -> list[list[float]]:
        """One batch."""
        states = [self._states.get(session, EMPTY) for session, _ in batch]
        outputs, states = self._stepper.step([inputs for _, inputs in batch], states)
        self._states.update(zip([session for session, _ in batch], states, strict=True))
        rows: list[list[float]] = outputs.tolist()
        return rows

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Answers as they are."""
        return output

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        """An answer."""
        return {"outputs": output}


def serve(port: int, _: str) -> None:
    """Serve."""
    api = Step(max_batch_size=64, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=30)
    server.run(port=port, host="127.0.0.1", generate_client_file=False, log_level="warning", access_log=False)
