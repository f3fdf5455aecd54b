"""What the documents show is what happens: README's commands are run, and their answers compared.

STEPCAST_UPDATE_DOCS=1 writes the real answers into README instead.
"""

import json
import math
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import ROOT, running
from websockets.sync.client import connect

from stepcast.errors import every_error

pytestmark = pytest.mark.service

README = ROOT / "README.md"
PROTOCOL = ROOT / "docs" / "protocol.md"
SDK = ROOT / "docs" / "sdk.md"
_BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
_CHANGING = {"created_at", "used_at", "expires_at"}


def commands(text: str) -> list[tuple[str, str]]:
    """(command, shown answer) of all console blocks, in order."""
    found: list[tuple[str, str]] = []
    for block in _BLOCK.findall(text):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            elif found:
                found[-1] = (found[-1][0], found[-1][1] + line)
    return found


def alike(got: Any, shown: Any) -> bool:
    """Equal, floats within 1e-4, times whatever they are."""
    if isinstance(got, dict) and isinstance(shown, dict):
        return got.keys() == shown.keys() and all(k in _CHANGING or alike(got[k], shown[k]) for k in got)
    if isinstance(got, list) and isinstance(shown, list):
        return len(got) == len(shown) and all(map(alike, got, shown))
    if isinstance(got, float) and isinstance(shown, float | int):
        return math.isclose(got, shown, rel_tol=1e-4, abs_tol=1e-5)
    return bool(got == shown)


def frames(text: str) -> list[tuple[list[str], list[str]]]:
    """(sent, shown answers) of every `frames` block."""
    blocks = re.findall(r"```frames\n(.*?)```", text, re.DOTALL)
    return [
        tuple([line[2:] for line in block.splitlines() if line.startswith(arrow)] for arrow in "→←") for block in blocks
    ]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server on the committed models."""
    with running(store="memory://", models=ROOT / "models") as server:
        yield server.url


def test_readme_commands_answer_what_readme_shows(url: str) -> None:
    """Every curl example of README gives the answer that stands below it."""
    text = README.read_text()
    examples = commands(text)
    assert len(examples) >= 7
    for command, shown in examples:
        real = command.replace("localhost:8000", url.removeprefix("http://"))
        done = subprocess.run(["bash", "-c", real], capture_output=True, text=True, timeout=20, check=True)
        answer = done.stdout.strip()
        if os.environ.get("STEPCAST_UPDATE_DOCS"):
            text = text.replace(f"$ {command}\n{shown}\n", f"$ {command}\n{answer}\n")
            README.write_text(text)
            continue
        assert alike(json.loads(answer), json.loads(shown)), f"{command}\n{answer}"


def test_protocol_commands_answer_what_the_page_shows(url: str) -> None:
    """Every curl example of docs/protocol.md works, and gives the answer below it where there is one."""
    text = PROTOCOL.read_text()
    variables = re.findall(r"^([MX]=.*?)(?:   #.*)?$", text, re.MULTILINE)
    assert len(variables) == 2
    examples = commands(text)
    assert len(examples) >= 20
    for command, shown in examples:
        real = "\n".join(["set -o pipefail", *variables, command]).replace(
            "localhost:8000", url.removeprefix("http://")
        )
        done = subprocess.run(["bash", "-c", real], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0, command
        if os.environ.get("STEPCAST_UPDATE_DOCS") and shown:
            text = text.replace(f"$ {command}\n{shown}\n", f"$ {command}\n{done.stdout.strip()}\n")
            PROTOCOL.write_text(text)
        elif shown:
            assert alike(json.loads(done.stdout), json.loads(shown)), f"{command}\n{done.stdout}"


def test_protocol_frames_are_answered_as_the_page_shows(url: str) -> None:
    """Every block of frames, on a socket of its own."""
    text = PROTOCOL.read_text()
    (x,) = re.findall(r"^X='(.*?)'", text, re.MULTILINE)
    for sent, shown in frames(text):
        with connect(f"ws{url.removeprefix('http')}/v1/models/weather/stream") as socket:
            for frame in sent:
                socket.send(frame.replace(": X", f": {x}"))
            answers = [json.loads(socket.recv(timeout=20)) for _ in sent]
        by_id = {answer["id"]: answer for answer in answers}
        assert [alike(by_id[json.loads(line)["id"]], json.loads(line)) for line in shown] == [True] * len(sent), answers


def test_sdk_snippets_print_what_the_page_shows(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All Python blocks of docs/sdk.md, in order, as one program; a text block is what was printed since the last."""
    text = SDK.read_text()
    names: dict[str, Any] = {"url": url}
    try:
        for kind, block in re.findall(r"```(python|text)\n(.*?)```", text, re.DOTALL):
            if kind == "python":
                exec(compile(block, str(SDK), "exec"), names)
            elif os.environ.get("STEPCAST_UPDATE_DOCS"):
                text = text.replace(f"```text\n{block}```", f"```text\n{capsys.readouterr().out}```")
                SDK.write_text(text)
            else:
                assert capsys.readouterr().out == block
    finally:
        names["client"].close()


def test_error_table_is_that_of_the_classes() -> None:
    """Code and status of every class a caller can meet, once."""
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \|", PROTOCOL.read_text(), re.MULTILINE)
    classes = {(error.code, str(error.status)) for error in every_error()}
    assert len(rows) == len(set(rows))
    assert set(rows) == classes


def test_every_route_is_documented(url: str) -> None:
    """Each path of the OpenAPI document stands in docs/protocol.md."""
    with urllib.request.urlopen(f"{url}/openapi.json") as response:
        paths = json.load(response)["paths"]
    text = PROTOCOL.read_text()
    assert [path for path in paths if f"{path}`" not in text and f"{path}?" not in text] == []


def test_relative_links_of_documents_lead_somewhere() -> None:
    """Every relative link in README and docs/ names a file that is there."""
    for document in (README, *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_error_code_is_unique_and_documented() -> None:
    """Each code belongs to one class and stands in docs/protocol.md."""
    codes = [error.code for error in every_error()]
    assert len(codes) == len(set(codes))
    text = Path(ROOT / "docs" / "protocol.md").read_text()
    assert [code for code in codes if f"`{code}`" not in text] == []
