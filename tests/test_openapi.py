"""What /openapi.json says is what the server does: schemathesis calls every operation with good and bad data."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate
from schemathesis.generation import GenerationMode
from serving import MODELS, ROOT, Running, running

from service.app import create_app
from service.settings import Settings

pytestmark = pytest.mark.service

DOCUMENT: dict[str, Any] = create_app(Settings.read({}, models=MODELS, store="memory://")).api.openapi()
OPERATIONS = [(method, path) for path, operations in DOCUMENT["paths"].items() for method in operations]
THERE: dict[str, list[Any]] = {"model": ["lstm", "characters"], "session": ["one", "two"], "layer": ["lstm_0"]}
QUICK = settings(
    max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LIMITS = [412, 413]
"""Good data may be refused by a limit of the server, or because If-Match names another state."""
SHAPES = ("/step", "/predict", "/rollout", "/state", "/state/{layer}")
"""Where good data may be refused as 422: what shape and numbers fit is the model's to say, not the document's."""


def of_what_is_there() -> dict[str, Any]:
    """The document with names of models, sessions and layers that are there, so that calls get beyond 404."""
    document = copy.deepcopy(DOCUMENT)
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path" and parameter["name"] in THERE:
                    parameter["schema"]["enum"] = THERE[parameter["name"]]
    return document


def schema(document: dict[str, Any], accepted: list[int]) -> Any:
    """A schema whose good data may be answered with some 4xx more than schemathesis takes."""
    made = schemathesis.openapi.from_dict(document)
    checks = made.config.checks
    taken, refused = checks.positive_data_acceptance, checks.negative_data_rejection
    taken.expected_statuses = [*taken.expected_statuses, *map(str, accepted)]
    refused.expected_statuses = [*refused.expected_statuses, *map(str, LIMITS)]
    return made


WRITTEN = schema(DOCUMENT, [])
FIXED = schema(of_what_is_there(), LIMITS)
SHAPED = schema(of_what_is_there(), [*LIMITS, 422])


def check_operation(operation: Any, mode: GenerationMode, url: str) -> None:
    """Call an operation with generated data, and check every answer."""

    @QUICK
    @given(st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        case.call_and_validate(base_url=url)

    check()


@pytest.fixture(scope="module")
def memory_server() -> Iterator[Running]:
    """A server of this file's own: what is tried on it includes removing versions."""
    with running(store="memory://") as server:
        yield server


def test_the_server_gives_this_document(http: httpx.Client) -> None:
    """/openapi.json is the document that is tested here, each parameter in it once."""
    assert http.get("/openapi.json").json() == DOCUMENT
    for method, path in OPERATIONS:
        named = [(p["in"], p["name"]) for p in DOCUMENT["paths"][path][method].get("parameters", [])]
        assert len(named) == len(set(named)), (method, path)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_good_data_is_taken_and_answers_conform(memory_server: Running, method: str, path: str) -> None:
    """On what is there: status, content type and body are documented, nothing is a 500."""
    schema = SHAPED if path.endswith(SHAPES) else FIXED
    check_operation(schema[path][method], GenerationMode.POSITIVE, memory_server.url)


def test_the_document_is_valid_openapi() -> None:
    """By the specification's own schemas; every operation has an id of its own, a tag, and named schemas alone."""
    validate(DOCUMENT)
    operations = [DOCUMENT["paths"][path][method] for method, path in OPERATIONS]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert {tag for operation in operations for tag in operation["tags"]} == {tag["name"] for tag in DOCUMENT["tags"]}
    text = json.dumps(DOCUMENT)
    unused = [name for name in DOCUMENT["components"]["schemas"] if f'"#/components/schemas/{name}"' not in text]
    assert unused == []


def example_of(method: str, path: str) -> dict[str, Any]:
    """The request that the document's examples make of an operation."""
    operation = DOCUMENT["paths"][path][method]
    given = {p["name"]: p.get("example") for p in operation.get("parameters", []) if p["in"] != "header"}
    url = path.format(**given)
    queries = {name: value for name, value in given.items() if f"{{{name}}}" not in path and value is not None}
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    return {"method": method.upper(), "url": url, "params": queries, "json": content.get("example")}


def test_every_example_succeeds_as_it_stands() -> None:
    """On a server of the committed models: a step first, what deletes last, from the inside out."""
    step = ("post", "/v1/models/{model}/sessions/{session}/step")
    others = [operation for operation in OPERATIONS if operation != step and operation[0] != "delete"]
    order = [step, *sorted(others, key=lambda one: one[0] == "get"), *[o for o in OPERATIONS[::-1] if o[0] == "delete"]]
    assert sorted(order) == sorted(OPERATIONS)
    with running(store="memory://", models=ROOT / "models") as server, httpx.Client(base_url=server.url) as client:
        for method, path in order:
            answer = client.request(**example_of(method, path))
            documented = DOCUMENT["paths"][path][method]["responses"]
            assert answer.is_success, (method, path, answer.text)
            assert str(answer.status_code) in documented
            assert "x-request-id" in answer.headers


def can_be_wrong(method: str, path: str) -> bool:
    """Whether there is anything in a call that the document does not allow: every string is a good model's name."""
    operation = DOCUMENT["paths"][path][method]
    named = {p["name"] for p in operation.get("parameters", [])}
    return "requestBody" in operation or not named <= {"model"}


@pytest.mark.parametrize(("method", "path"), [operation for operation in OPERATIONS if can_be_wrong(*operation)])
def test_bad_data_is_refused_and_answers_conform(memory_server: Running, method: str, path: str) -> None:
    """What the document does not allow is a documented 4xx."""
    check_operation(WRITTEN[path][method], GenerationMode.NEGATIVE, memory_server.url)
