"""docs/design.md shows the way of a step; here a step is traced, and must take that way."""

import re
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from serving import ROOT, Running, running

pytestmark = pytest.mark.service

MOST_CALLS = 45
MOST_FILES = 12
BODY = b'{"inputs":[0.5,-0.25,1.0]}'
NAMED = b'{"inputs":{"u":0.5,"v":-0.25,"w":1.0}}'
HEAD = b"POST /v1/models/lstm/sessions/traced/step HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"


def on_loop(server: Running, work: Callable[[], Any]) -> None:
    """Do something on the server's thread, and wait until it is done."""
    done = threading.Event()
    server.loop.call_soon_threadsafe(lambda: (work(), done.set()))
    assert done.wait(10)


def traced_step(body: bytes = BODY) -> list[str]:
    """Our functions that a hot step enters, as `file function`, in order."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and "/service/" in code.co_filename:
            calls.append(f"{code.co_filename.rpartition('/service/')[2]} {code.co_qualname}")

    with running(store="memory://") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as line:

            def step() -> None:
                line.sendall(HEAD % len(body) + body)
                assert line.recv(65536).startswith(b"HTTP/1.1 200")

            for _ in range(40):  # until the record's shape is steady and the head is known
                step()
            on_loop(server, lambda: sys.setprofile(note))
            step()
            on_loop(server, lambda: sys.setprofile(None))
    own = __name__  # the lambdas above are no part of the way
    return [call for call in calls if own not in call]


def documented() -> list[str]:
    """The files on the page, in the order of the way."""
    page = (ROOT / "docs" / "design.md").read_text()
    block = page.split("<!-- the traced way of a step -->")[1].split("```")[1]
    return re.findall(r"^(\S+\.py)", block, re.MULTILINE)


def test_a_hot_step_takes_the_documented_way() -> None:
    """It enters the files that the page names, in that order, and few functions of ours."""
    calls = traced_step()
    files = list(dict.fromkeys(call.split()[0] for call in calls))
    assert files == documented(), "\n".join(calls)
    assert len(files) <= MOST_FILES
    assert len(calls) <= MOST_CALLS, "\n".join(calls)


def test_a_named_step_takes_the_same_way() -> None:
    """Its answer's names are what it needs more."""
    calls, plain = traced_step(NAMED), traced_step()
    more = [call for call in calls if call not in plain]
    assert [call.split()[0] for call in more] == ["doors/names.py"] * len(more), "\n".join(calls)
    assert len(calls) <= len(plain) + 1, "\n".join(more)
