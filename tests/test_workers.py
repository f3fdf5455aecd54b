"""Several worker processes are one server: whichever takes a scrape answers for all."""

import re
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from serving import Process

from service.telemetry import Metrics, Scrape

pytestmark = pytest.mark.service

ONES = {"inputs": [1.0, 1.0, 1.0]}
STEPS = 40


def numbers(url: str) -> dict[str, float]:
    """A scrape on a connection of its own: samples by name and labels."""
    text = httpx.get(f"{url}/metrics", timeout=20).text
    return {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE)}


def test_metrics_are_those_of_all_workers(spawn: Callable[..., Process], tmp_path: Path) -> None:
    """Steps over many connections reach both workers; every scrape has them all, counted once, in every histogram."""
    url = spawn(f"sqlite:///{tmp_path}/s.db", "--workers", "2").url
    transport = httpx.HTTPTransport(retries=20)
    with httpx.Client(transport=transport, timeout=20) as client:
        assert client.get(f"{url}/healthz/ready").status_code == 200
    for _ in range(200):
        if numbers(url).get("stepcast_ready") == 2.0:
            break
    for i in range(STEPS):
        answer = httpx.post(f"{url}/v1/models/lstm/sessions/w{i}/step", json=ONES, timeout=20)
        assert answer.json()["step"] == 1
    for _ in range(8):
        found = numbers(url)
        assert (found["stepcast_workers"], found["stepcast_ready"]) == (2, 2)
        assert found['stepcast_steps_total{model="lstm"}'] == STEPS
        assert found['stepcast_batch_rows_sum{model="lstm"}'] == STEPS
        assert found['stepcast_batch_rows_bucket{le="1.0",model="lstm"}'] == STEPS
        assert found["stepcast_hot_sessions"] == STEPS
        assert found['stepcast_steps_created{model="lstm"}'] < 1e10


@pytest.mark.anyio
async def test_a_worker_that_does_not_answer_is_left_out_of_the_sums(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One is gone, one says nothing: the scrape is answered soon, and says of how many workers it is."""
    with ExitStack() as stack:
        for name, listens in (("gone", False), ("silent", True)):
            end = stack.enter_context(socket.socket(socket.AF_UNIX))
            end.bind(str(tmp_path / f"{name}.sock"))
            if listens:
                end.listen()

        metrics = Metrics()
        metrics.calls.labels("lstm").inc(3)
        scrape = Scrape(metrics, lambda: None, str(tmp_path))
        await scrape.open()
        text = (await scrape.text()).decode()
        scrape.close()
    assert "\nstepcast_workers 1.0\n" in text
    assert 'stepcast_step_calls_total{model="lstm"} 3.0\n' in text
    assert [name for name in ("gone", "silent") if f"worker {name} did not" not in caplog.text] == []


def test_workers_leave_no_folder_behind(
    spawn: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of their sockets goes with the server; it is nobody else's to look into."""
    with tempfile.TemporaryDirectory() as temporary:
        monkeypatch.setenv("TMPDIR", temporary)
        process = spawn(f"sqlite:///{tmp_path}/s.db", "--workers", "2")
        (folder,) = Path(temporary).glob("stepcast-*")
        assert folder.stat().st_mode & 0o077 == 0
        assert process.terminate() == 0
        assert not folder.exists()
