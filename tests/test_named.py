"""Steps by name do what steps by position do: through every door, in every shape, with gaps, retries and versions."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from doors import BATCH_DOORS, DOORS, NAMED_DOORS, Array, Call, HttpDoor, NamedWire, Script, WebSocketDoor, step
from hypothesis import given
from hypothesis import strategies as st
from serving import MODELS, Running, golden, running

from service.doors import bodies, names
from service.doors.steps import Reader
from service.engine.repository import Repository
from stepcast.errors import InvalidRequest, ShapeMismatch, StateVersionMismatch, StepcastError
from stepcast.features import FeatureNames, likeliest
from stepcast.manifest import Manifest, read_manifest

pytestmark = pytest.mark.service

KINDS = ("lstm", "policies", "rnn_loss_classes", "characters", "conv2d", "embedding", "foreign_lstm")
JSON, MSGPACK = bodies.JSON, bodies.MSGPACK
PACKED = {"content-type": MSGPACK, "accept": JSON}
NAN = float("nan")


@pytest.fixture
def name() -> str:
    """A session id that no other test has."""
    return f"n-{Random().getrandbits(48):012x}"


def answered(response: httpx.Response) -> dict[str, Any]:
    """A good answer."""
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """A problem document."""
    problem: dict[str, Any] = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    return problem


# --- every door ---------------------------------------------------------------------------------------------------


def script(door: Script, model: str, name: str, batch: bool) -> list[Array]:
    """Steps of one and of three examples, with gaps and masks where they may be; outputs, then states."""
    x = np.nan_to_num(golden(model)["x"][:3, :4])  # (3, 4, F)
    if model == "policies":
        x[0, 1, 1] = x[1, 2, 0] = x[2, 0] = np.nan
    found = []
    for t, seq in enumerate((1, None, 3, 4)):
        found.append(door.step(f"{name}-1", x[0, t], seq)[0])
    if not batch:
        found.append(door.step(f"{name}-1", x[:1, :3])[0])
        found.append(door.step(f"{name}-3", x[:, 0])[0])
        found.append(door.step(f"{name}-3", x[:, 1:], seq=4, mask=[[1, 0, 1], [1, 1, 1], [0, 0, 0]])[0])
        found.append(door.step(f"{name}-3", x[:, 1], mask=[0, 1, 1])[0])
        found.append(door.step(f"{name}-1", x[0, 0], mask=0)[0])
        found.append(door.step(f"{name}-1", x[0, 0], seq=8)[0])  # a retry: the kept answer, of a masked step
    sessions = [f"{name}-1"] if batch else [f"{name}-1", f"{name}-3"]
    return found + [value for s in sessions for keys in door.state(s).values() for value in keys.values()]


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("opened", NAMED_DOORS)
def test_a_session_by_names_is_that_by_position(memory_server: Running, model: str, opened: str, name: str) -> None:
    """Every output and every bit of the states, through every door, as columns and as records."""
    batch = opened.startswith("batch")
    plain = (BATCH_DOORS if batch else DOORS)[opened.rpartition("-")[0]]
    made = []
    for place, opener in enumerate((plain, NAMED_DOORS[opened])):
        with closing(opener(memory_server.url, model)) as door:
            session = Script(door, read_manifest(MODELS / model / "1"))
            if batch:
                made.append(script(session, model, f"{name}-{place}", batch))
            else:
                try:
                    made.append(script(session, model, f"{name}-{place}", batch))
                except StepcastError as error:
                    made.append([np.array(str(error).replace(f"{name}-{place}", ""))])
    for by_position, by_name in zip(*made, strict=True):
        np.testing.assert_array_equal(by_position, by_name)
