"""What a caller cannot do to a server over gRPC, who may call it, and how it starts and stops."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_calls import INFER, PATIENCE_S, Talk, address, infer, output, request, service_pb2, triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import GRPC_ADDRESSES, MODELS, ROOT, Process, Running, running

from service.doors.grpc import messages
from service.doors.grpc.callers import PROBLEM

pytestmark = pytest.mark.service

ONES = [1.0, 1.0, 1.0]
CERTIFICATE = ROOT / "tests" / "data" / "localhost.pem"
METHODS = [
    *((f"/{messages.SERVICE}/{name}", name == messages.STREAM) for name in messages.METHODS),
    ("/grpc.health.v1.Health/Check", False),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", True),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server with a port for gRPC and small limits."""
    limits = {"frames_limit": 16, "stall_s": 0.5, "body_limit_bytes": 2**20}
    with running(store="memory://", grpc_port=0, **limits) as server:
        yield server


@pytest.fixture
def channel(server: Running) -> Iterator[grpc.Channel]:
    """A plain channel."""
    with grpc.insecure_channel(address(server)) as channel:
        yield channel


# --- what comes in ----------------------------------------------------------------------------------------------------


def test_no_bytes_make_the_server_fail(channel: grpc.Channel) -> None:
    """Random bytes, and good requests with some bytes changed, to every method: an answer, or the caller's fault."""
    chance = random.Random(5)
    good = request(ONES, sequence_id="fuzz", sequence_start=True, stepcast_seq=1).SerializeToString()
    seen = set()
    for _ in range(40):
        for method, streams in METHODS:
            if chance.random() < 0.5:
                data = bytearray(good)
                for _ in range(chance.randrange(1, 6)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
            else:
                data = bytearray(chance.randbytes(chance.choice([1, 5, 40, 300])))
            try:
                if streams:
                    list(channel.stream_stream(method)(iter([bytes(data)]), timeout=PATIENCE_S))
                else:
                    channel.unary_unary(method)(bytes(data), timeout=PATIENCE_S)
            except grpc.RpcError as error:
                seen.add(error.code().name)
    assert "INVALID_ARGUMENT" in seen
    assert seen <= {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED"}
    assert output(infer(channel, request(ONES))).size == 2


def test_messages_are_limited_packed_ones_too(channel: grpc.Channel) -> None:
    """Over body_limit_bytes: RESOURCE_EXHAUSTED; so is what would be longer once it is unpacked."""
    zeros = service_pb2.ModelInferRequest(model_name="lstm", raw_input_contents=[bytes(2**26)]).SerializeToString()
    for packing, told in (
        (grpc.Compression.NoCompression, "Received message"),
        (grpc.Compression.Gzip, "Decompressed"),
    ):
        with pytest.raises(grpc.RpcError, match=f"{told} .*larger than max") as caught:
            channel.unary_unary(INFER)(zeros, compression=packing, timeout=PATIENCE_S)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert output(infer(channel, request(ONES))).size == 2


def test_a_stream_that_is_not_read_harms_itself_alone(server: Running, channel: grpc.Channel) -> None:
    """Its answers are bounded, it is not read any more, others go on; after stall_s it ends, and says why."""
    many = np.ones((2000, 3), np.float32)
    with grpc.insecure_channel(address(server), [("grpc.use_local_subchannel_pool", 1)]) as own:
        deaf = Talk(own)
        deaf.say(request(many, sequence_id="deaf", sequence_start=True))
        deaf.say(*(request(many, sequence_id="deaf") for _ in range(600)))
        (stream,) = wait_for(lambda: [s for s in server.app.grpc._streams if s._written and s._writing])  # type: ignore[union-attr]
        talk = Talk(channel)
        for step in range(100):
            talk.say(request(ONES, sequence_id="lively", sequence_start=step == 0))
            assert output(*talk.hear()).size == 2
            assert stream._talk.in_flight + len(stream._out) <= 16
        talk.end()
        wait_for(lambda: not server.app.grpc._streams)  # type: ignore[union-attr]
        answers, error = deaf.rest()
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "left unread for 0.5 s" in error.details()
        assert 0 < len(answers) < 600
        deaf.end()


def wait_for(found: Callable[[], Any]) -> Any:
    """What comes, within PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return value


def test_a_client_that_is_gone_leaves_nothing_behind(server: Running, channel: grpc.Channel) -> None:
    """Its stream ends; what was accepted is applied, and the sequence goes on by another stream."""
    gone, numbered = Talk(channel), [request(ONES, sequence_id="gone", stepcast_seq=n) for n in range(1, 4)]
    numbered[0].parameters["sequence_start"].bool_param = True
    gone.say(*numbered)
    gone.hear()
    gone.cancel()
    wait_for(lambda: not server.app.grpc._streams)  # type: ignore[union-attr]
    talk = Talk(channel)
    talk.say(*numbered[1:], request(ONES, sequence_id="gone", stepcast_seq=4))
    steps = [answer.infer_response.parameters["stepcast_step"].int64_param for answer in talk.hear(3)]
    assert steps == [2, 3, 4]
    talk.end()


def test_a_deadline_is_the_clients_own(channel: grpc.Channel) -> None:
    """It hears DEADLINE_EXCEEDED while the server steps on; sent again by its number, the call is made once."""
    steps = 40_000
    asked = request(np.ones((1, steps, 3)), sequence_id="late", sequence_start=True, stepcast_seq=steps)
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(INFER)(asked.SerializeToString(), timeout=0.01)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    for _ in range(2):
        assert infer(channel, asked).parameters["stepcast_step"].int64_param == steps


# --- who calls --------------------------------------------------------------------------------------------------------


def test_keys_roles_and_tenants_are_those_of_http() -> None:
    """By metadata, as by headers: no key, a reader's, a stepper's, another tenant's; probes need none."""
    keys = "read:acme:key-of-a-reader,step:acme:key-of-a-stepper,step:rival:key-of-a-rival"
    with (
        running(store="memory://", api_keys=keys, grpc_port=0) as guarded,
        grpc.insecure_channel(address(guarded)) as channel,
        triton.InferenceServerClient(address(guarded)) as client,
    ):
        asked = request(ONES, sequence_id="mine", sequence_start=True).SerializeToString()

        def answer(data: bytes, **metadata: str) -> str:
            given = [(name.replace("_", "-"), value) for name, value in metadata.items()]
            try:
                channel.unary_unary(INFER)(data, metadata=given, timeout=PATIENCE_S)
            except grpc.RpcError as error:
                return str(error.code().name)
            return "OK"

        assert answer(asked) == "UNAUTHENTICATED"
        assert answer(asked, x_api_key="another") == "UNAUTHENTICATED"
        assert answer(asked, x_api_key="key-of-a-reader") == "PERMISSION_DENIED"
        assert answer(asked, authorization="Bearer key-of-a-stepper") == "OK"
        going_on = request(ONES, sequence_id="mine").SerializeToString()
        assert answer(going_on, x_api_key="key-of-a-rival") == "INVALID_ARGUMENT"
        assert answer(going_on, x_api_key="key-of-a-stepper") == "OK"
        for talk in (Talk(channel), Talk(channel, [("x-api-key", "key-of-a-reader")])):
            with pytest.raises(grpc.RpcError, match=r"UNAUTHENTICATED|PERMISSION_DENIED"):
                talk.hear()
            talk.end()
        assert client.is_server_live()
        assert client.is_server_ready()
        with pytest.raises(
            triton.InferenceServerException if hasattr(triton, "InferenceServerException") else Exception
        ):
            client.get_model_metadata("lstm")
        assert client.get_model_metadata("lstm", headers={"x-api-key": "key-of-a-reader"}).name == "lstm"


# --- start and stop ---------------------------------------------------------------------------------------------------


def test_tls_by_the_certificate_of_http(spawn: Callable[..., Process]) -> None:
    """Both ports; without it a client is not let in."""
    process = spawn("memory://", "--grpc-port", "0", "--ssl-certfile", str(CERTIFICATE))
    name = GRPC_ADDRESSES[process.url].replace("127.0.0.1", "localhost")
    credentials = grpc.ssl_channel_credentials(CERTIFICATE.read_bytes())
    with grpc.secure_channel(name, credentials) as channel:
        assert output(infer(channel, request(ONES))).size == 2
    with grpc.insecure_channel(name) as channel, pytest.raises(grpc.RpcError) as caught:
        infer(channel, request(ONES))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_workers_share_the_port_and_the_sessions(spawn: Callable[..., Process], tmp_path: Path) -> None:
    """Connections go to both; a sequence goes on over whichever; a port that is taken stops the start."""
    process = spawn(f"sqlite:///{tmp_path}/s.db", "--workers", "2", "--grpc-port", "0")
    name, own = GRPC_ADDRESSES[process.url], [("grpc.use_local_subchannel_pool", 1)]
    for step in range(6):
        with grpc.insecure_channel(name, own) as channel:
            grpc.channel_ready_future(channel).result(PATIENCE_S)
            said = infer(channel, request(ONES, sequence_id="shared", sequence_start=step == 0))
            assert said.parameters["stepcast_step"].int64_param == step + 1
    for workers in ("1", "2"):
        with pytest.raises(RuntimeError, match=r"cannot listen on 127\.0\.0\.1"):
            spawn(f"sqlite:///{tmp_path}/s.db", "--workers", workers, "--grpc-port", name.rpartition(":")[2])


def test_without_the_extra_the_start_says_what_to_install() -> None:
    """One line, status 2."""
    program = (
        "import sys; sys.modules['grpc'] = None\n"
        "from service.__main__ import main\n"
        f"sys.exit(main(['serve', '--models', {str(MODELS)!r}, '--store', 'memory://', '--grpc-port', '0']))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines() == [
        "ConfigError: 'grpc' is not installed. pip install \"stepcast[service,grpc]\""
    ]


def test_a_drain_answers_what_was_accepted_then_ends_the_streams(spawn: Callable[..., Process], tmp_path: Path) -> None:
    """SIGTERM in the middle of a stream: answers in order, then UNAVAILABLE; watchers of health hear of it."""
    process = spawn(f"sqlite:///{tmp_path}/s.db", "--grpc-port", "0")
    with grpc.insecure_channel(GRPC_ADDRESSES[process.url]) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        talk = Talk(channel)
        talk.say(request(ONES, sequence_id="d", sequence_start=True))
        talk.say(*(request(ONES, sequence_id="d") for _ in range(199)))
        talk.hear()
        process.process.terminate()
        answers, error = talk.rest()
        steps = [1, *(answer.infer_response.parameters["stepcast_step"].int64_param for answer in answers)]
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert steps == list(range(1, len(steps) + 1))
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        talk.end()
    process.wait()
    again = spawn(f"sqlite:///{tmp_path}/s.db")
    assert httpx.get(f"{again.url}/v1/models/lstm/sessions/d").json()["step"] == len(steps)


def test_bytes_in_flight_are_bounded_over_grpc_too() -> None:
    """A request beyond intake_bytes is refused, by a call and on a stream; what is counted is given back."""
    with (
        running(store="memory://", intake_bytes=2**20, tenant_intake_bytes=2**20, grpc_port=0) as small,
        grpc.insecure_channel(address(small)) as channel,
    ):
        much, some = request(np.ones((2**17, 3))), request(np.ones((2**15, 3)))
        with pytest.raises(grpc.RpcError) as caught:
            infer(channel, much)
        assert json.loads(dict(caught.value.trailing_metadata())[PROBLEM])["code"] == "intake_full"
        talk = Talk(channel)
        for _ in range(4):
            talk.say(much, some)
            refused, answered = talk.hear(2)
            assert refused.infer_response.parameters["stepcast_code"].string_param == "intake_full"
            assert output(answered).shape == (2**15, 2)
            assert output(infer(channel, some)).shape == (2**15, 2)
        talk.end()
