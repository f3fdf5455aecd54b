"""Sample paths of a rollout: what is drawn, answered, refused. test_distributions.py has torch's own fan."""

import json
import math
from contextlib import closing
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from doors import WebSocketDoor
from serving import MODELS, Running

from stepcast import Client
from stepcast.__main__ import main
from stepcast.errors import InvalidRequest, TooLarge
from stepcast.manifest import Distribution, Manifest, read_manifest
from stepcast.predictive import Predictive, between_quantiles

pytestmark = pytest.mark.service

LEVELS = np.array([0.1, 0.5, 0.8])
FUTURE = {"w": [0.5, -0.5, None, 2.0]}


@pytest.fixture
def name() -> str:
    """A session id that no other test has."""
    return f"s-{uuid4().hex}"


# --- draws ------------------------------------------------------------------------------------------------------------


def test_quantiles_are_interpolated_and_have_exponential_tails() -> None:
    """By value: at the levels, between them, far out on both sides, and at 0 and 1 themselves."""
    quantiles = np.array([2.0, 3.0, 7.0])
    at = np.array([0.1, 0.5, 0.8, 0.3, 0.65, 0.01, 0.999])
    upper = 7.0 - 4.0 / math.log(0.5 / 0.2) * math.log(0.001 / 0.2)
    want = [2.0, 3.0, 7.0, 2.5, 5.0, 2.0 + 1.0 / math.log(5.0) * math.log(0.1), upper]
    got = between_quantiles(np.broadcast_to(quantiles, (7, 3)), LEVELS, at)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    ends = between_quantiles(np.broadcast_to(quantiles, (2, 3)), LEVELS, np.array([0.0, 1.0]))
    assert np.isfinite(ends).all()
    fine = between_quantiles(np.broadcast_to(quantiles, (999, 3)), LEVELS, np.arange(1, 1000) / 1000)
    assert (np.diff(fine) > 0).all()


def predictive_of(kind: str, targets: dict[str, tuple[str, ...]], outputs: list[str], **more: Any) -> Predictive:
    """The predictive distributions of a model with these outputs."""
    manifest = Manifest.model_validate(
        {
            "name": "m",
            "version": 1,
            "features": [{"name": "f"}],
            "outputs": [{"name": output} for output in outputs],
            "task": "regression",
            "distribution": {"kind": kind, "targets": targets, **more},
            "sha256": "0" * 64,
        }
    )
    assert manifest.distribution is not None
    return Predictive(manifest.outputs, manifest.distribution)


def test_draws_of_quantiles_are_below_each_as_often_as_its_level_says() -> None:
    """20,000 rows of two targets with quantiles of their own; targets are drawn apart."""
    targets = {"a": ("a@0.1", "a", "a@0.8"), "b": ("b@0.1", "b", "b@0.8")}
    predictive = predictive_of(
        "quantile", targets, ["b", "a", "a@0.1", "b@0.1", "a@0.8", "b@0.8"], levels=LEVELS.tolist()
    )
    row = np.array([-5.0, 1.0, 0.0, -9.0, 4.0, -4.0], np.float32)
    drawn = predictive.draw(np.tile(row, (20_000, 1)), np.random.default_rng(1))
    assert drawn.shape == (20_000, 2)
    for column, quantiles in zip(drawn.T, ([0.0, 1.0, 4.0], [-9.0, -5.0, -4.0]), strict=True):
        np.testing.assert_allclose([(column < q).mean() for q in quantiles], LEVELS, atol=0.01)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.03


# --- rollouts ---------------------------------------------------------------------------------------------------------


def stepped(client: Client, name: str, examples: int = 1) -> Any:
    """A session of the quantile model that has taken three steps."""
    session = client.session("quantile", name)
    x = np.random.default_rng(3).normal(size=(examples, 3, 3)).astype(np.float32)
    session.step(x)
    return session


def test_a_fan_stands_beside_the_same_rollout(memory_server: Running, name: str) -> None:
    """Outputs and session are those without paths; quantiles are those of the paths; the seed decides."""
    with Client(memory_server.url) as client:
        session = stepped(client, name, examples=2)
        before = session.get_state()
        plain = session.rollout(4, FUTURE)
        fan, again, other = (session.rollout(4, FUTURE, paths=30, seed=s, keep_paths=True) for s in (5, 5, 6))
        after = session.get_state()
    assert plain.paths is plain.quantiles is None
    for target in ("u", "v"):
        np.testing.assert_allclose(fan.outputs[target], plain.outputs[target], rtol=1e-5, atol=1e-6)
        assert fan.paths[target].shape == (2, 30, 4)
        want = np.quantile(fan.paths[target], fan.levels, axis=1).transpose(1, 2, 0)
        np.testing.assert_allclose(fan.quantiles[target], want, rtol=1e-6)
        np.testing.assert_array_equal(fan.paths[target], again.paths[target])
        assert not np.isin(fan.paths[target], other.paths[target]).any()
    assert fan.levels == (0.05, 0.1, 0.5, 0.8)  # the model's
    assert (fan.step, after.step) == (3, before.step)
    np.testing.assert_array_equal(after.state["gru_0"]["h"], before.state["gru_0"]["h"])


def test_draws_go_by_example_then_path_then_target(memory_server: Running, name: str) -> None:
    """One step whose inputs are all known: the paths are draws from its outputs, by the seed's second stream."""
    manifest = read_manifest(MODELS / "quantile" / "1")
    assert isinstance(manifest.distribution, Distribution)
    with Client(memory_server.url) as client:
        session = stepped(client, name, examples=3)
        made = session.rollout(1, np.ones((1, 3)), paths=4, seed=9, keep_paths=True)
    random = np.random.default_rng(np.random.SeedSequence(9).spawn(2)[1])
    uniforms = random.random((12, 2)).reshape(3, 4, 2)
    for k, target in enumerate(("u", "v")):
        places = [[o.name for o in manifest.outputs].index(name) for name in manifest.distribution.targets[target]]
        quantiles = np.repeat(made.outputs[:, 0][:, None, places].astype(np.float64), 4, axis=1)
        want = between_quantiles(quantiles, np.array(manifest.distribution.levels), uniforms[..., k])
        np.testing.assert_allclose(made.paths[target][..., 0], want, rtol=1e-5)


def test_every_door_answers_the_same_fan(memory_server: Running, name: str) -> None:
    """JSON by position and by name, msgpack, WebSocket."""
    with Client(memory_server.url) as client:
        packed = stepped(client, name).rollout(4, FUTURE, paths=8, seed=1, levels=[0.25, 0.75], keep_paths=True)
    at = f"{memory_server.url}/v1/models/quantile/sessions/{name}/rollout"
    body = {"steps": 4, "paths": 8, "seed": 1, "levels": [0.25, 0.75], "keep_paths": True}
    by_place = [[None, None, w] for w in FUTURE["w"]]
    answers = [httpx.post(at, json={**body, "inputs": inputs}).json() for inputs in (FUTURE, by_place)]
    with closing(WebSocketDoor(memory_server.url, "quantile", packed=True)) as door:
        frame = door.call("rollout", name, inputs=by_place, **body)
    for target in ("u", "v"):
        for answer in answers:
            assert answer["levels"] == [0.25, 0.75]
            np.testing.assert_allclose(answer["quantiles"][target], packed.quantiles[target], rtol=1e-6)
            np.testing.assert_allclose(answer["paths"][target], packed.paths[target], rtol=1e-6)
        told = np.frombuffer(frame["paths"][target], "<f4").reshape(1, 8, 4)
        np.testing.assert_array_equal(told, packed.paths[target])
    lean = httpx.post(at, json={**body, "keep_paths": False, "inputs": FUTURE}).json()
    assert "paths" not in lean
    assert lean["quantiles"] == answers[0]["quantiles"]


@pytest.mark.parametrize(
    ("model", "body", "told"),
    [
        ("quantile", {"paths": 5, "commit": True}, "cannot be committed"),
        ("quantile", {"levels": [0.5]}, "belong to a rollout with paths"),
        ("quantile", {"keep_paths": True}, "belong to a rollout with paths"),
        ("quantile", {"paths": -1}, "paths"),
        ("quantile", {"paths": 5, "levels": [1.5]}, "levels"),
        ("lstm", {"paths": 5}, "forecasts no distribution"),
    ],
)
def test_what_is_no_fan_is_refused(
    memory_server: Running, name: str, model: str, body: dict[str, Any], told: str
) -> None:
    """Before anything runs, with what is wrong."""
    at = f"{memory_server.url}/v1/models/{model}/sessions/{name}"
    httpx.post(f"{at}/step", json={"inputs": [1, 2, 3]}).raise_for_status()
    answer = httpx.post(f"{at}/rollout", json={"steps": 2, "inputs": [[1, 1, 1]] * 2, **body}).json()
    assert answer["code"] == InvalidRequest.code
    assert told in answer["detail"]


def test_a_fan_is_bounded_by_cells(memory_server: Running, name: str) -> None:
    """Examples times paths times steps, or the paths' states, beyond a body's bytes."""
    with Client(memory_server.url) as client:
        session = stepped(client, name)
        with pytest.raises(TooLarge, match=r"1 examples by 1000 steps on 1000 paths each takes 32032000 bytes"):
            session.rollout(1000, np.ones((1000, 3)), paths=1000)
        with pytest.raises(TooLarge, match=r"on 9007199254740992 paths each"):
            session.rollout(1, np.ones((1, 3)), paths=2**53)


def test_the_command_prints_quantiles(capsys: pytest.CaptureFixture[str], memory_server: Running, name: str) -> None:
    """Beside each step's outputs, by target and level."""
    with Client(memory_server.url) as client:
        want = stepped(client, name).rollout(2, {"w": [0.5, 0.5]}, paths=20, seed=4)
    known = json.dumps({"w": [0.5, 0.5]})
    command = ["rollout", "quantile", name, "2", "--known", known, "--paths", "20", "--seed", "4"]
    main([*command, "--url", memory_server.url])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["ahead"] for line in lines] == [1, 2]
    assert list(lines[0]["quantiles"]["u"]) == ["0.05", "0.1", "0.5", "0.8"]
    got = [list(line["quantiles"]["v"].values()) for line in lines]
    np.testing.assert_allclose(got, want.quantiles["v"][0], rtol=1e-6)
