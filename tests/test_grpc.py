"""The Open Inference Protocol over gRPC: an unmodified tritonclient, the standard services, errors by their codes."""

import json
import queue
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor
from grpc_calls import (
    PATIENCE_S,
    InferenceServerException,
    Talk,
    address,
    infer,
    model_config_pb2,
    offline,
    output,
    request,
    sequence,
    service_pb2,
    tensor,
    triton,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from serving import Running, running

from service.doors.grpc import messages
from service.doors.grpc.callers import PROBLEM, PUSHBACK
from service.doors.oip.errors import failure
from stepcast.errors import every_error

pytestmark = pytest.mark.service

MODEL = "lstm"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server with a port for gRPC."""
    with running(store="memory://", grpc_port=0) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    """tritonclient, as it comes."""
    with triton.InferenceServerClient(address(server)) as client:
        yield client


@pytest.fixture
def channel(server: Running) -> Iterator[grpc.Channel]:
    """A plain channel."""
    with grpc.insecure_channel(address(server)) as channel:
        yield channel


# --- what is told -----------------------------------------------------------------------------------------------------


def test_messages_have_the_published_names_and_numbers() -> None:
    """Every message and field that is served is one of the client's generated ones: number, type, label, choice."""
    published = {**service_pb2.DESCRIPTOR.message_types_by_name, **model_config_pb2.DESCRIPTOR.message_types_by_name}
    ours = messages.POOL.FindFileByName("open_inference_grpc.proto")
    compared = sum(same_message(message, published[name]) for name, message in ours.message_types_by_name.items())
    assert compared > 150
    for name, enum in ours.enum_types_by_name.items():
        same_enum(enum, model_config_pb2.DESCRIPTOR.enum_types_by_name[name])
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    for method in ours.services_by_name["GRPCInferenceService"].methods:
        other = theirs.methods_by_name[method.name]
        assert (method.input_type.full_name, method.output_type.full_name, method.client_streaming) == (
            other.input_type.full_name,
            other.output_type.full_name,
            other.client_streaming,
        )


def same_message(ours: Descriptor, theirs: Descriptor) -> int:
    """Assert that a message's fields are the other's; how many there are."""
    for name, field in ours.fields_by_name.items():
        other = theirs.fields_by_name[name]
        assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated), name
        for kind in ("message_type", "enum_type", "containing_oneof"):
            one, two = getattr(field, kind), getattr(other, kind)
            assert (one and one.full_name) == (two and two.full_name), name
    for enum in ours.enum_types:
        same_enum(enum, theirs.enum_types_by_name[enum.name])
    nested = sum(same_message(each, theirs.nested_types_by_name[each.name]) for each in ours.nested_types)
    return len(ours.fields) + nested


def same_enum(ours: EnumDescriptor, theirs: EnumDescriptor) -> None:
    """Assert that the values are the same."""
    assert {v.name: v.number for v in ours.values} == {v.name: v.number for v in theirs.values}


def test_the_client_finds_everything_it_asks_for(client: Any) -> None:
    """Health, metadata, configuration with its sequence batching, the repository."""
    assert (client.is_server_live(), client.is_server_ready()) == (True, True)
    ready = [client.is_model_ready(MODEL), client.is_model_ready(MODEL, "1"), client.is_model_ready(MODEL, "7")]
    assert ready == [True, True, False]
    assert not client.is_model_ready("nobody")
    told = client.get_server_metadata()
    assert told.name == "stepcast"
    assert {"sequence", "sequence(string_id)", "statistics"} <= set(told.extensions)
    (x,), (y,) = client.get_model_metadata(MODEL).inputs, client.get_model_metadata(MODEL).outputs
    assert (x.name, x.datatype, list(x.shape)) == ("x", "FP32", [-1, 3])
    assert (y.name, y.datatype, list(y.shape)) == ("y", "FP32", [-1, 2])
    config = client.get_model_config(MODEL).config
    assert (config.name, config.input[0].data_type, list(config.input[0].dims)) == (MODEL, 11, [3])
    assert config.WhichOneof("scheduling_choice") == "sequence_batching"
    assert config.sequence_batching.WhichOneof("strategy_choice") == "oldest"
    index = client.get_model_repository_index(as_json=True)["models"]
    assert {"name": MODEL, "version": "1", "state": "READY"} in index


def test_statistics_count_requests(client: Any) -> None:
    """Good and bad ones, every part with its time."""

    def counts() -> tuple[int, int, int]:
        (told,) = client.get_inference_statistics("gru").model_stats
        stats = told.inference_stats
        assert min(stats.success.ns, stats.compute_infer.ns) > 0 or not stats.success.count
        assert stats.compute_infer.count == stats.queue.count == stats.compute_input.count == stats.compute_output.count
        return told.inference_count, stats.success.count, stats.fail.count

    before = counts()
    for step in range(3):
        client.infer("gru", [tensor(sequence("gru")[step])], sequence_id="counted", sequence_start=step == 0)
    with pytest.raises(InferenceServerException):
        client.infer("gru", [tensor(sequence("gru")[0])], sequence_id="never")
    after = counts()
    assert tuple(b - a for a, b in zip(before, after, strict=True)) == (3, 3, 1)


def test_standard_health_and_reflection(server: Running, channel: grpc.Channel) -> None:
    """What probes and grpcurl ask; a name that is no service is not found."""
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", messages.SERVICE):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=PATIENCE_S)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    found = ProtoReflectionDescriptorDatabase(channel)
    assert {messages.SERVICE, "grpc.health.v1.Health"} <= set(found.get_services())
    file = found.FindFileContainingSymbol(messages.SERVICE)
    assert [method.name for method in file.service[0].method] == list(messages.METHODS)
    assert found.FindFileContainingSymbol("grpc.health.v1.Health").package == "grpc.health.v1"


# --- sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [7, 2**63 - 1, "pump-7", "any text, 100 %"])
def test_a_sequence_by_number_or_text(client: Any, server: Running, name: int | str) -> None:
    """Its flags start and end it; the outputs are the offline pass', the steps are counted."""
    x = sequence()
    want = offline(server, MODEL, x[None])[0]
    for step, row in enumerate(x):
        last = step == len(x) - 1
        said = client.infer(MODEL, [tensor(row)], sequence_id=name, sequence_start=step == 0, sequence_end=last)
        np.testing.assert_allclose(said.as_numpy("y"), want[step], 1e-4, 1e-5)
        assert said.get_response().parameters["stepcast_step"].int64_param == step + 1
    with pytest.raises(InferenceServerException, match=r"has ended.*START flag") as caught:
        client.infer(MODEL, [tensor(x[0])], sequence_id=name)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_number_beyond_63_bits_is_a_sequence_too(channel: grpc.Channel, server: Running) -> None:
    """C++ clients put a uint64 into the parameter's int64."""
    infer(channel, request(sequence()[0], sequence_id=-1, sequence_start=True))
    told = httpx.get(f"{server.url}/v1/models/{MODEL}/sessions", params={"prefix": "oip:"}).json()["sessions"]
    assert f"oip:{2**64 - 1}" in told


def test_sessions_are_those_of_every_other_door(client: Any, server: Running) -> None:
    """A sequence goes on over native HTTP, and a native session is a sequence."""
    x = sequence()
    want = offline(server, MODEL, x[None])[0]
    at = f"{server.url}/v1/models/{MODEL}/sessions/shared"
    client.infer(MODEL, [tensor(x[0])], sequence_id="shared", sequence_start=True)
    answer = httpx.post(f"{at}/step", json={"inputs": x[1].tolist(), "seq": 2}).json()
    np.testing.assert_allclose(answer["outputs"], want[1], 1e-4, 1e-5)
    said = client.infer(MODEL, [tensor(x[2])], sequence_id="shared", sequence_end=True)
    np.testing.assert_allclose(said.as_numpy("y"), want[2], 1e-4, 1e-5)
    assert httpx.get(at).status_code == 404


def test_a_numbered_step_is_made_once(client: Any) -> None:
    """The same step again has the same answer; a gap is refused with the number that is expected."""
    x = tensor(sequence()[0])
    client.infer(MODEL, [x], sequence_id="once", sequence_start=True, parameters={"stepcast_seq": 1})
    first, again = (client.infer(MODEL, [x], sequence_id="once", parameters={"stepcast_seq": 2}) for _ in range(2))
    assert first.get_response() == again.get_response()
    with pytest.raises(InferenceServerException, match=r"got seq 9 with a gap. Send seq 3") as caught:
        client.infer(MODEL, [x], sequence_id="once", parameters={"stepcast_seq": 9})
    assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"


def test_fifty_interleaved_sequences_equal_the_offline_pass(client: Any, server: Running) -> None:
    """100 steps each, half of them on one stream, half by calls of their own that overlap."""
    x = np.random.default_rng(3).standard_normal((50, 100, 3)).astype(np.float32)
    heard: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: heard.put((result, error)))
    got: dict[tuple[int, int], Any] = {}
    for step in range(100):
        flags = {"sequence_start": step == 0, "sequence_end": step == 99}
        for one in range(25):
            asked = [tensor(x[one, step])]
            client.async_stream_infer(MODEL, asked, sequence_id=f"on-{one}", request_id=f"{one} {step}", **flags)
        calls = []
        for one in range(25, 50):
            asked, done = [tensor(x[one, step])], queue.Queue()
            client.async_infer(MODEL, asked, lambda result, error, done=done: done.put((result, error)),
                               sequence_id=one, **flags)  # fmt: skip
            calls.append((one, done))
        for one, done in calls:
            result, error = done.get(timeout=PATIENCE_S)
            assert error is None
            got[one, step] = result.as_numpy("y")
    for _ in range(25 * 100):
        result, error = heard.get(timeout=PATIENCE_S)
        assert error is None
        one, step = map(int, result.get_response().id.split())
        assert (one, step - 1) in got or step == 0, "out of order"
        got[one, step] = result.as_numpy("y")
    client.stop_stream()
    outputs = np.array([[got[one, step] for step in range(100)] for one in range(50)])
    np.testing.assert_allclose(outputs, offline(server, MODEL, x), 1e-4, 1e-5)


def test_a_stream_keeps_the_order_of_a_sequence_across_its_ends(channel: grpc.Channel, server: Running) -> None:
    """Sent without waiting: two lives of one sequence, a step after its end, and requests of no sequence."""
    x = sequence()[:3]
    want = offline(server, MODEL, x[None])[0]
    talk = Talk(channel)
    life = [request(x[i], sequence_id="lives", sequence_start=i == 0, sequence_end=i == 2) for i in range(3)]
    talk.say(*life, *life, request(x[0], sequence_id="lives"), request(x[0]))
    answers = talk.hear(8)
    alone = [answer for answer in answers if "stepcast_step" not in answer.infer_response.parameters]
    (refused,) = (answer for answer in alone if answer.error_message)
    (stateless,) = (answer for answer in alone if not answer.error_message)
    assert "START flag" in refused.error_message
    assert refused.infer_response.parameters["stepcast_code"].string_param == "sequence_not_started"
    assert json.loads(refused.infer_response.parameters["stepcast_problem"].string_param)["cause"] == "ended"
    np.testing.assert_allclose(output(stateless).reshape(-1), want[0], 1e-4, 1e-5)
    lives = [answer for answer in answers if "stepcast_step" in answer.infer_response.parameters]
    assert [answer.infer_response.parameters["stepcast_step"].int64_param for answer in lives] == [1, 2, 3, 1, 2, 3]
    np.testing.assert_allclose([output(answer) for answer in lives], [*want, *want], 1e-4, 1e-5)
    talk.end()


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_of_every_width(client: Any, server: Running, kind: Any) -> None:
    """Two examples by one step, as a batch."""
    x = np.array([[0.5, -1.25, 2.0], [1.0, 0.0, -0.5]])
    said = client.infer(MODEL, [tensor(x.astype(kind))], sequence_id=f"width-{kind.__name__}", sequence_start=True)
    np.testing.assert_allclose(said.as_numpy("y"), offline(server, MODEL, x[:, None])[:, 0], 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("kind", "contents"),
    [("FP32", "fp32_contents"), ("FP64", "fp64_contents"), ("INT8", "int_contents"), ("INT64", "int64_contents")],
)
def test_typed_contents_are_raw_contents(channel: grpc.Channel, server: Running, kind: str, contents: str) -> None:
    """The same numbers, row-major; the answer's are raw."""
    x = np.array([[1.0, -2.0, 3.0], [0.0, 1.0, 2.0]])
    asked = service_pb2.ModelInferRequest(model_name=MODEL)
    given = asked.inputs.add(name="x", datatype=kind, shape=x.shape)
    values = x.reshape(-1) if kind.startswith("FP") else x.reshape(-1).astype(int)
    getattr(given.contents, contents).extend(values.tolist())
    np.testing.assert_allclose(output(infer(channel, asked)), offline(server, MODEL, x[:, None])[:, 0], 1e-4, 1e-5)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_requests_may_be_compressed(client: Any, server: Running, algorithm: str) -> None:
    """As HTTP's bodies may."""
    x = np.ones((64, 3), np.float32)
    said = client.infer(MODEL, [tensor(x)], compression_algorithm=algorithm)
    np.testing.assert_allclose(said.as_numpy("y"), offline(server, MODEL, x[:, None])[:, 0], 1e-4, 1e-5)


def test_one_output_and_best_classes(client: Any) -> None:
    """An output by its own name, and the classification extension."""
    (whole,) = client.get_model_metadata(MODEL).outputs
    wish = triton.InferRequestedOutput(whole.name, class_count=1)
    x = tensor(sequence()[0])
    y = client.infer(MODEL, [x]).as_numpy(whole.name)
    best = client.infer(MODEL, [x], outputs=[wish]).as_numpy(whole.name)
    value, place, *_ = best.reshape(-1)[0].decode().split(":")
    assert (float(value), int(place)) == (pytest.approx(y.max(), abs=1e-5), int(y.argmax()))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_every_error_has_a_status_of_its_own_kind() -> None:
    """A caller's fault is never INTERNAL, whatever the class; a server's, or a moment's, never the caller's."""
    for error in every_error():
        status = failure(error("told")).status
        assert grpc.StatusCode[status] is not grpc.StatusCode.OK
        assert (status == "INTERNAL") == (error.status == 500)
        assert (status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")) == (error.status in (429, 503, 504))


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        (request([1.0] * 3, "nobody", sequence_id=1), "NOT_FOUND", "model_not_found"),
        (request([1.0] * 3, "bidirectional", sequence_id=1, sequence_start=True), "UNIMPLEMENTED", "not_streaming"),
        (request([1.0] * 4, sequence_id=1, sequence_start=True), "INVALID_ARGUMENT", "shape_mismatch"),
        (request([np.inf] * 3, sequence_id=1, sequence_start=True), "INVALID_ARGUMENT", "non_finite"),
        (request([1.0] * 3, sequence_id=1.5), "INVALID_ARGUMENT", "invalid_request"),
        (request([1.0] * 3, sequence_start=True), "INVALID_ARGUMENT", "invalid_request"),
        (request([1.0] * 3, sequence_id=10**6), "INVALID_ARGUMENT", "sequence_not_started"),
        (service_pb2.ModelInferRequest(model_name=MODEL), "INVALID_ARGUMENT", "invalid_request"),
        (b"\xff\xff", "INVALID_ARGUMENT", "malformed"),
    ],
)
def test_errors_by_status_text_and_code(channel: grpc.Channel, asked: Any, status: str, code: str) -> None:
    """As the end of a call, with the problem document behind it, and as a message on a stream that goes on."""
    with pytest.raises(grpc.RpcError) as caught:
        infer(channel, asked)
    assert caught.value.code().name == status
    told = dict(caught.value.trailing_metadata())
    problem = json.loads(told[PROBLEM])
    assert (problem["code"], problem["detail"]) == (code, caught.value.details())
    talk = Talk(channel)
    talk.say(asked, request([1.0] * 3))
    for answer in talk.hear(2):
        if answer.error_message:
            assert answer.error_message == caught.value.details()
            assert answer.infer_response.parameters["stepcast_code"].string_param == code
        else:
            assert output(answer).size == 2
    talk.end()


def test_a_stream_ends_with_an_error_if_the_client_says_so(channel: grpc.Channel) -> None:
    """Metadata triton_grpc_error: what was asked before is answered, then the stream has the error's status."""
    talk = Talk(channel, metadata=[("triton_grpc_error", "true")])
    talk.say(request([1.0] * 3, sequence_id="errs", sequence_start=True), request([1.0] * 4, sequence_id="errs"))
    assert output(*talk.hear()).size == 2
    with pytest.raises(grpc.RpcError) as caught:
        talk.hear()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_full_queue_says_when_to_come_again() -> None:
    """UNAVAILABLE, and the pushback that clients with a retry policy heed."""
    with (
        running(store="memory://", queue_limit=1, grpc_port=0) as small,
        grpc.insecure_channel(address(small)) as channel,
    ):
        talk = Talk(channel)
        talk.say(request(np.ones((1, 100_000, 3)), sequence_id=1, sequence_start=True))
        talk.say(*(request([1.0] * 3, sequence_id=i, sequence_start=True) for i in range(2, 42)))
        refused = [answer for answer in talk.hear(41) if answer.error_message]
        assert refused
        assert {answer.infer_response.parameters["stepcast_code"].string_param for answer in refused} == {"queue_full"}
        problem = json.loads(refused[0].infer_response.parameters["stepcast_problem"].string_param)
        assert problem["retry_after_s"] > 0
        talk.end()
    assert PUSHBACK == "grpc-retry-pushback-ms"
