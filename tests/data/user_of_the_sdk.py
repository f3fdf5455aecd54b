"""A user's program with every part of the SDK in it; tests/test_sdk_types.py runs it, and mypy --strict on it."""

import asyncio
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import pandas as pd

from stepcast import Answer, AsyncClient, Client, Manifest, Retry, SessionState
from stepcast.errors import SessionNotFound

Floats = npt.NDArray[np.float32]


def main(url: str) -> int:
    with Client(url, timeout_s=10, retry=Retry(attempts=5, deadline_s=20)) as client:
        client.wait_ready(timeout_s=20)
        assert_type([model["versions"] for model in client.models()], list[list[int]])
        manifest = client.manifest("lstm")
        assert_type(manifest, Manifest)
        names = [feature.name for feature in manifest.features]
        row: dict[str, float | None] = dict.fromkeys(names, 0.5)
        x = np.ones((4, manifest.n_features), np.float32)
        frame = pd.DataFrame(x, columns=names)
        with client.session("lstm") as session:
            answer = session.step(row)
            assert_type(answer.outputs["u"], float)
            assert_type(session.step({name: [1.0] for name in names}).outputs["u"], Floats)
            assert_type(session.step([row]).outputs[0]["u"], float)
            assert_type(session.step(frame, rows="steps").outputs, pd.DataFrame)
            assert_type(session.step(x[None], mask=np.ones((1, 4))).outputs, Floats)
            assert_type(session.step([0.1, 0.2, 0.3], version_policy="replay").step, int)
            state = session.get_state()
            assert_type(state, SessionState)
            layer: dict[str, npt.NDArray[Any]] = session.get_layer("lstm_0")
            session.set_layer("lstm_0", {key: 0 * value for key, value in layer.items()})
            session.set_state(state)
            assert_type(session.checkpoint("here"), str)
            session.rewind("here")
            with session.fork() as child:
                assert_type(child.rollout(3, x[:3]).outputs, Floats)
                assert_type(child.rollout(2, {"w": [1.0, 2.0]}).outputs["v"], Floats)
                assert_type(child.rollout(3, x[:3]).quantiles, dict[str, Floats] | None)
            with session.stream() as stream:
                assert_type(stream.send(row).result().outputs["v"], float)
                outputs = [answer.outputs for answer in stream.map(x)]
                assert_type(outputs, list[Floats])
                assert_type([a.outputs["u"] for a in stream.map([row, row])], list[float])
                assert_type([a.outputs["u"] for a in stream.map(frame)], list[float])
            assert_type(session.info()["step"], int)
        try:
            session.info()
        except SessionNotFound as error:
            assert_type(error.facts, dict[str, Any])
        with client.session("rnn_loss_classes") as classifier:
            guess = classifier.step(row).outputs
            assert_type(guess["class"], str)
            assert_type(guess["probabilities"], dict[str, float])
        assert_type(client.predict("lstm", x), Floats)
        assert_type(client.predict("lstm", frame), pd.DataFrame)
        batch = client.step_many("lstm", ["a", "b"], x[:2])
        assert_type(batch.outputs, Floats)
    return asyncio.run(later(url, row))


async def later(url: str, row: dict[str, float | None]) -> int:
    async with AsyncClient(url) as client, client.session("lstm") as session:
        assert_type((await session.step(row)).outputs["u"], float)
        async with session.stream() as stream:
            answers: list[Answer[Floats]] = [answer async for answer in stream.map(np.ones((3, 3), np.float32))]
        return answers[-1].step
