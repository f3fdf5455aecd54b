"""The demo as a newcomer runs it, shortened: it forecasts, beats persistence, and leaves a server that Ctrl-C ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.xdist_group("demo")  # one store, one session


def demo(*arguments: str) -> "subprocess.Popen[str]":
    """The demo as a process of its own, on a free port."""
    command = [sys.executable, "demo/replay.py", "--committed", "--port", "0", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TERM": "dumb"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_demo_ends_with_forecast_against_truth_and_skill() -> None:
    """Ten days, without a terminal; the forecast of the temperature is better than the last observation."""
    process = demo("--days", "10", "--exit")
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 0, text
    assert "2013-11-11 00:00 UTC  forecast / truth" in text
    assert "step 408 of 'new-york'" in text
    for airport in ("EWR", "JFK", "LGA"):
        assert re.search(rf"{airport} +\d+\.\d / \d+\.\d", text), text
    ratio = re.search(r"temp \(°F\) +[\d.]+ +[\d.]+ +([\d.]+)", text)
    assert ratio is not None, text
    assert 0.5 < float(ratio[1]) < 1.0
    assert "a day from 2013-11-11T00:00Z: temp °F" in text
    assert re.search(r"JFK +\d+\.\d +\d+\.\d +\d+\.\d +\d+\.\d", text), text


def test_demo_leaves_the_server_up_until_it_is_interrupted() -> None:
    """The printed addresses answer; then nothing is left behind."""
    process = demo("--days", "1")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "/state" in line:
            break
    url = re.search(r"http://[\d.:]+", lines[-1])
    assert url is not None, "".join(lines)
    session = httpx.get(f"{url[0]}/v1/models/weather/sessions/new-york").json()
    assert (session["step"], session["examples"]) == (168 + 24, 3)
    assert httpx.get(f"{url[0]}/docs").status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    process.stdout.close()
    try:
        httpx.get(f"{url[0]}/healthz/live")
    except httpx.ConnectError:
        return
    raise AssertionError("the server is still there")
