"""What the documents show is what happens: their commands, programs and frames are run, and the answers compared.

STEPCAST_UPDATE_DOCS=1 writes the real answers into the pages instead.
"""

import json
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from pages import PAGES, README, UPDATE, blocks, reading
from prometheus_client import Counter, Gauge
from serving import ROOT, running

from service.telemetry import Histogram, Metrics
from stepcast.errors import every_error

pytestmark = pytest.mark.service

DOCS = ROOT / "docs"
PROTOCOL = DOCS / "protocol.md"
DOORS = ("http-json", "ws-json-4x16")
LOST = 3
"""Answers that never reach the reader of README: as many as its client tries to get."""


@pytest.fixture
def url() -> Iterator[str]:
    """A server on the committed models."""
    with running(store="memory://", models=ROOT / "models", grpc_port=0) as server:
        yield server.url


@pytest.mark.parametrize(
    ("page", "least"), [("index", 2), ("protocol", 7), ("sdk", 15), ("errors", 3), ("inference-protocol", 6)]
)
def test_page_shows_what_happens(page: str, least: int, url: str, tmp_path: Path) -> None:
    """Every command, program and frame of the page, in order, against the models of this repository."""
    with reading(DOCS / f"{page}.md", tmp_path, url) as reader:
        assert reader.read() >= least


@pytest.mark.parametrize(("page", "least"), [("quickstart", 4), ("command", 2), ("import", 3)])
def test_page_works_from_an_empty_directory(page: str, least: int, tmp_path: Path) -> None:
    """Pages that start a server themselves."""
    with reading(DOCS / f"{page}.md", tmp_path) as reader:
        assert reader.read() >= least


class Losing:
    """A way to a server on which the first answers to steps are lost: the connection ends instead."""

    def __init__(self, url: str, lost: int) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._to, self.left = (host, int(port)), lost
        self._step = False
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._door.getsockname()[1]}"
        threading.Thread(target=self._take, daemon=True).start()

    def close(self) -> None:
        self._door.close()

    def _take(self) -> None:
        while True:
            try:
                near, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        """Requests one way, answers the other, until an answer is lost."""
        with near, socket.create_connection(self._to) as far:
            threading.Thread(target=self._answer, args=(far, near), daemon=True).start()
            while asked := _received(near):
                self._step = asked.startswith(b"POST") and b"/step " in asked
                far.sendall(asked)

    def _answer(self, far: socket.socket, near: socket.socket) -> None:
        while answer := _received(far):
            if self._step and self.left:
                self.left -= 1
                near.shutdown(socket.SHUT_RDWR)
                return
            near.sendall(answer)


def _received(end: socket.socket) -> bytes:
    """What has come; nothing at the end."""
    try:
        return end.recv(65536)
    except OSError:
        return b""


def test_readme_shows_what_happens(url: str, tmp_path: Path) -> None:
    """README's commands, and its program though the first three answers get lost."""
    assert f"attempts={LOST}" in README.read_text()
    with reading(README, tmp_path, url) as reader:
        for block in blocks(README):
            way = Losing(url, LOST) if block.kind == "python" else None
            reader.url = way.url if way else url
            reader.run(block)
            if way:
                assert way.left == 0
                way.close()


def test_every_block_says_what_it_is() -> None:
    """Blocks that no test looks at are few: shell lines (test_site.py checks them) and drawings."""
    kinds = [(page.name, block.kind) for page in PAGES for block in blocks(page)]
    assert {kind for _, kind in kinds} <= {"console", "python", "text", "frames", "yaml", "json", "sh", ""}
    assert sum(kind == "" for _, kind in kinds) <= 20


def test_json_blocks_are_json() -> None:
    """What is shown as JSON can be read."""
    for page in PAGES:
        for block in blocks(page):
            if block.kind == "json":
                json.loads(block.body)


def test_error_table_is_that_of_the_classes() -> None:
    """Code and status of every class a caller can meet, once."""
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \|", PROTOCOL.read_text(), re.MULTILINE)
    classes = {(error.code, str(error.status)) for error in every_error()}
    assert len(rows) == len(set(rows))
    assert set(rows) == classes


def test_every_error_has_a_section() -> None:
    """docs/errors.md: code, status and title of every class, in the order of the classes' tree, and what to do."""
    text = (DOCS / "errors.md").read_text()
    sections = re.findall(
        r"^### (\w+)\n\n\*(\d{3}), (.*?)\.\* (.*?)\n\n(.*?)(?=\n#|\Z)", text, re.MULTILINE | re.DOTALL
    )
    shown = {code: (int(status), title) for code, status, title, _, _ in sections}
    assert len(shown) == len(sections)
    assert shown == {error.code: (error.status, error.title) for error in every_error()}
    assert all(cause.strip() and advice.startswith("**Do:** ") for _, _, _, cause, advice in sections)


def metric_rows() -> list[str]:
    """A row of the table for every metric that a server declares."""
    rows = []
    for collector in Metrics().registry._collector_to_names:
        if isinstance(collector, Histogram):
            name, kind, labels, about = collector._name, "histogram", collector._labels, collector._about
        else:
            assert isinstance(collector, Counter | Gauge)
            name, kind, labels = collector._name, collector._type, collector._labelnames
            name, about = name + ("_total" if kind == "counter" else ""), collector._documentation
        rows.append(f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {about} |")
    return rows


def test_every_metric_is_documented() -> None:
    """docs/metrics.md holds the table that the declarations give."""
    page = DOCS / "metrics.md"
    text = page.read_text()
    table = re.compile(r"(?<=\|---\|---\|---\|---\|\n)(?:\|.*\n)+")
    rows = "".join(f"{row}\n" for row in metric_rows())
    if UPDATE:
        page.write_text(table.sub(lambda _: rows, text, count=1))
    else:
        (shown,) = table.findall(text)
        assert shown == rows


def test_laws_of_readme_name_their_tests() -> None:
    """Each of the seven laws links to a test that exists."""
    laws = re.findall(r"^(\d)\. .*\(\[`(test_law\d_\w+)`\]\((.*?)\)\)\.$", README.read_text(), re.MULTILINE)
    assert [number for number, _, _ in laws] == list("1234567")
    for number, name, file in laws:
        assert name.startswith(f"test_law{number}_")
        assert f"def {name}(" in (ROOT / file).read_text()


def number_rows() -> list[str]:
    """README's rows of rates and latencies, from the last run of `make bench`: medians of its rounds."""
    contenders = json.loads((ROOT / "benchmarks" / "results" / "latest.json").read_text())["contenders"]

    def middle(door: str, store: str, field: str) -> float:
        return median(one[field] for one in contenders[f"{door}-{store}"]["rounds"])

    stores = ("memory", "sqlite", "redis")
    rates = [[f"{round(middle(door, store, 'steps_per_s'), -2):,.0f}" for store in stores] for door in DOORS]
    late = ["; ".join(f"{middle(door, store, 'p99_ms'):.1f} ms" for door in DOORS) for store in stores]
    names = (
        "steps per second, HTTP JSON, 64 connections",
        "steps per second, WebSocket JSON, 4 sockets with 16 in flight",
    )
    rows = zip((*names, "p99 at those rates, HTTP; WebSocket"), (*rates, late), strict=True)
    return [f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows]


def test_numbers_of_readme_are_those_of_the_last_benchmark() -> None:
    """Rates, latencies, machine, command and commit are what benchmarks/results/latest.json says."""
    text, rows = README.read_text(), "".join(number_rows())
    facts = json.loads((ROOT / "benchmarks" / "results" / "latest.json").read_text())["facts"]
    arguments = facts["command"].removeprefix("python -m benchmarks ")
    if UPDATE:
        text = re.sub(r"(?:\| (?:steps per second|p99 at).*\n)+", lambda _: rows, text, count=1)
        text = re.sub(
            r"`make bench ARGS=\".*?\"`, commit \w+", f'`make bench ARGS="{arguments}"`, commit {facts["commit"]}', text
        )
        README.write_text(text)
    assert rows in text
    assert f'`make bench ARGS="{arguments}"`, commit {facts["commit"]}.' in text


def test_every_route_is_documented(url: str) -> None:
    """Each path of the OpenAPI document stands in docs/protocol.md."""
    with urllib.request.urlopen(f"{url}/openapi.json") as response:
        paths = json.load(response)["paths"]
    text = PROTOCOL.read_text()
    assert [path for path in paths if f"{path}`" not in text and f"{path}?" not in text] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())).strip("-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that is there, and a heading in it; pages of the site stay within docs/."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}#{anchor}"
        assert page.parent != DOCS or file.parent == DOCS or file.is_relative_to(DOCS), f"{page.name}: {target}"


def test_every_setting_of_the_text_is_one() -> None:
    """No page names a variable that a server or the command would not know."""
    from service.settings import Settings

    known = {f"STEPCAST_{name.upper()}" for name in Settings.model_fields}
    known |= {"STEPCAST_URL", "STEPCAST_KEY", "STEPCAST_UPDATE_DOCS", "STEPCAST_PORT"}
    named = {name for page in PAGES for name in re.findall(r"\bSTEPCAST_[A-Z_]+\b", page.read_text())}
    assert {name for name in named if not name.endswith("_")} - known == set()


@pytest.mark.parametrize(
    "text",
    [
        '```console\n$ curl -s localhost:8000/v1/models/lstm\n{"code": "found"}\n```\n',
        "```console\n$ echo 1\n2\n```\n",
        "```console\n$ false\n```\n",
        "```console\n$ curl -sf localhost:8000/v1/models/none\n```\n",
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
    ],
)
def test_reader_notices_a_wrong_page(text: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that shows another answer, output or success than there is fails."""
    monkeypatch.setattr("pages.UPDATE", False)
    page = tmp_path / "page.md"
    page.write_text(text)
    with reading(page, tmp_path, url) as reader, pytest.raises(AssertionError):
        reader.read()
