"""The pages of the documentation, run as a reader would: blocks in order, their output compared with what is shown.

```console   `$ command` in a shell, with what it prints below (nothing: only its success counts)
```python    one program per page
```text      what the Python above has printed since the last such block
```frames    WebSocket frames: sent and answered
```sh        is not run, but for `stepcast serve`, where the page has no server yet
"""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from serving import GRPC_ADDRESSES, ROOT
from websockets.sync.client import connect

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md")
UPDATE = bool(os.environ.get("STEPCAST_UPDATE_DOCS"))
"""Write what really happens into the pages."""
_BLOCK = re.compile(r'^```(\w*)(?: title="(.*?)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_CHANGING = {"created_at", "used_at", "expires_at"}


class Block(NamedTuple):
    """A fenced block of a page."""

    kind: str
    title: str
    body: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    return [Block(*found) for found in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def commands(body: str) -> list[tuple[str, str]]:
    """(command, shown output) of a console block; a command goes on after a backslash."""
    parts = re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]
    found = (re.match(r"((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", part, re.DOTALL) for part in parts)
    return [(match[1], match[2]) for match in found if match]


def alike(got: Any, shown: Any) -> bool:
    """Equal, floats within 1e-4, times whatever they are."""
    if isinstance(got, dict) and isinstance(shown, dict):
        return got.keys() == shown.keys() and all(k in _CHANGING or alike(got[k], shown[k]) for k in got)
    if isinstance(got, list) and isinstance(shown, list):
        return len(got) == len(shown) and all(map(alike, got, shown))
    if isinstance(got, float) and isinstance(shown, float | int):
        return math.isclose(got, shown, rel_tol=1e-4, abs_tol=1e-5)
    return bool(got == shown)


def _same_text(got: str, shown: str) -> bool:
    """Equal texts; lines of JSON are compared as values."""
    theirs, ours = got.strip().splitlines(), shown.strip().splitlines()
    return len(theirs) == len(ours) and all(map(_same_line, theirs, ours))


def _same_line(got: str, shown: str) -> bool:
    try:
        return alike(json.loads(got), json.loads(shown))
    except ValueError:
        return got.rstrip() == shown.rstrip()


class Reader:
    """Somebody who does what a page says, in a folder of their own.

    Args:
        page: The page.
        folder: Where commands run.
        url: A server that is there already; None: the page starts its own.
    """

    def __init__(self, page: Path, folder: Path, url: str | None = None) -> None:
        self.page, self.folder, self.url = page, folder, url
        self.names: dict[str, Any] = {"url": url, "__name__": "__main__"}
        self._printed = io.StringIO()
        self._servers: list[subprocess.Popen[str]] = []
        text = page.read_text(encoding="utf-8")
        self._variables = re.findall(r"^([A-Z]=.*?)(?:   #.*)?$", text, re.MULTILINE)

    def read(self) -> int:
        """Run all blocks; how many were run. An AssertionError says which differs and what came instead."""
        ran = [self.run(block) for block in blocks(self.page)]
        return sum(ran)

    def close(self) -> None:
        """Stop what the page has started."""
        for thing in self.names.values():
            if type(thing).__module__.startswith("stepcast") and hasattr(thing, "close"):
                thing.close()
        for server in self._servers:
            server.terminate()
            server.wait(30)
            assert server.stdout is not None
            server.stdout.close()

    def run(self, block: Block) -> bool:
        """Do what a block says; False if there is nothing to do."""
        way = {"console": self._console, "python": self._python, "text": self._text, "frames": self._frames}
        if block.title:
            (self.folder / block.title).write_text(block.body, encoding="utf-8")
        elif block.kind in way:
            way[block.kind](block.body)
        elif block.kind == "sh" and self._serves(block.body):
            self._serve(block.body)
        else:
            return False
        return True

    def _here(self, text: str) -> str:
        """The text with the real server's address."""
        text = text.replace("localhost:8001", GRPC_ADDRESSES.get(self.url or "", ""))
        return text.replace("localhost:8000", (self.url or "").removeprefix("http://"))

    def _environ(self) -> dict[str, str]:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("STEPCAST_")}
        known = {"PYTHONPATH": str(ROOT), "STEPCAST_LOG_LEVEL": "error", "COLUMNS": "100", "NO_COLOR": "1"}
        return {**outside, **known, **({"STEPCAST_URL": self.url} if self.url else {})}

    def _console(self, body: str) -> None:
        prelude = ["set -eo pipefail", f'stepcast() {{ "{sys.executable}" -m stepcast "$@"; }}', *self._variables]
        for command, shown in commands(body):
            script = self._here("\n".join([*prelude, command]))
            done = subprocess.run(
                ["bash", "-c", script],
                capture_output=True,
                text=True,
                timeout=100,
                cwd=self.folder,
                env=self._environ(),
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            if shown.strip() and not _same_text(done.stdout, shown):
                self._replace(f"{command}\n{shown}", f"{command}\n{done.stdout.strip()}\n")

    def _python(self, body: str) -> None:
        with contextlib.redirect_stdout(self._printed), contextlib.chdir(self.folder):
            exec(compile(self._here(body), str(self.page), "exec"), self.names)

    def _text(self, shown: str) -> None:
        printed = self._printed.getvalue()
        self._printed.seek(0)
        self._printed.truncate()
        if printed != shown:
            self._replace(f"```text\n{shown}```", f"```text\n{printed}```")

    def _frames(self, body: str) -> None:
        """Frames on a socket of their own; `X` is the page's variable."""
        sent, shown = ([line[2:] for line in body.splitlines() if line.startswith(arrow)] for arrow in "→←")
        (x,) = (value[3:-1] for value in self._variables if value.startswith("X='"))
        assert self.url is not None
        with connect(f"ws{self.url.removeprefix('http')}/v1/models/weather/stream") as socket:
            for frame in sent:
                socket.send(frame.replace(": X", f": {x}"))
            answers = [json.loads(socket.recv(timeout=20)) for _ in sent]
        by_id = {answer["id"]: answer for answer in answers}
        assert [alike(by_id[json.loads(line)["id"]], json.loads(line)) for line in shown] == [True] * len(sent), answers

    def _serves(self, body: str) -> bool:
        return self.url is None and any(line.startswith("stepcast serve") for line in body.splitlines())

    def _serve(self, body: str) -> None:
        (line,) = (line for line in body.splitlines() if line.startswith("stepcast serve"))
        words = line.partition("#")[0].split()[1:]
        server = subprocess.Popen(
            [sys.executable, "-m", "stepcast", *words, "--port", "0"],
            cwd=self.folder,
            env={**self._environ(), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._servers.append(server)
        assert server.stdout is not None
        said = server.stdout.readline()
        assert "http://" in said, said
        self.url = self.names["url"] = said[said.index("http://") :].strip()

    def _replace(self, old: str, new: str) -> None:
        """A difference: written into the page if that is wanted."""
        assert UPDATE, f"{self.page.name} shows\n{old}\nbut this happened:\n{new}"
        text = self.page.read_text(encoding="utf-8")
        assert old in text, old
        self.page.write_text(text.replace(old, new, 1), encoding="utf-8")


@contextlib.contextmanager
def reading(page: Path, folder: Path, url: str | None = None) -> Iterator[Reader]:
    """A reader of a page, whose servers and clients end with the block."""
    reader = Reader(page, folder, url)
    try:
        yield reader
    finally:
        reader.close()
