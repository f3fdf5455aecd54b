"""The site of the documentation: built strictly, free of other people's servers, its recipes and shell lines true."""

import argparse
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer
import yaml
from pages import PAGES, blocks, reading
from pydantic import TypeAdapter
from serving import ROOT

from service.__main__ import _parser as service_parser
from stepcast import imports
from stepcast.cli.app import app
from training.__main__ import _parser as training_parser
from training.config import Config, TrainingConfig
from training.layers.specs import LayerSpec

# What a recipe of the pages leaves out.
REST: dict[str, Any] = {
    "name": "example",
    "data": {"kind": "python", "class": "training.examples.control_charts:ControlCharts"},
    "network": [{"kind": "lstm", "units": 8}, {"kind": "rnn_output"}],
}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "least"), [("training", 9), ("data", 1), ("score", 4)])
def test_page_of_the_trainer_shows_what_happens(page: str, least: int, tmp_path: Path) -> None:
    """Every command and program of the page, in an empty directory: a recipe is made, trained, served and stepped."""
    with reading(ROOT / "docs" / f"{page}.md", tmp_path) as reader:
        assert reader.read() >= least


def test_recipes_of_the_pages_are_accepted() -> None:
    """Every YAML block is a recipe, or a part of one, that the trainer takes; the rest are Kubernetes' own."""
    recipes = [
        yaml.safe_load(block.body)
        for page in PAGES
        for block in blocks(page)
        if block.kind == "yaml" and "apiVersion" not in block.body  # tests/test_kubernetes.py renders these
    ]
    assert len(recipes) >= 5
    for recipe in recipes:
        Config.model_validate({**REST, **recipe})


def test_layers_and_settings_in_running_text_are_accepted() -> None:
    """`{kind: ...}` is a layer, `training: {...}` a way to train."""
    layer = TypeAdapter[Any](LayerSpec)
    for page in PAGES:
        text = page.read_text()
        for found in re.findall(r"`(\{kind: .*?\})`", text):
            layer.validate_python(yaml.safe_load(found))
        for found in re.findall(r"`(training: \{.*?\})`", text):
            TrainingConfig.model_validate(yaml.safe_load(found)["training"])


def options() -> dict[str, set[str]]:
    """The options of every command."""
    group: Any = typer.main.get_command(app)
    found = {
        name: {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for name, command in group.commands.items()
    }
    for parser in (service_parser("x"), training_parser("x")):
        (rooms,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for name, room in rooms.choices.items():
            found.setdefault(name, set()).update(room._option_string_actions)
    for kind in imports.KINDS:
        found["import"].update(imports.parser(kind, "x")._option_string_actions)
    return found


def test_shell_lines_of_the_pages_name_what_there_is() -> None:
    """Commands, options, verbs of make and extras in the blocks that are not run, and in running text."""
    known = options()
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(re.findall(r"^([a-z0-9-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        shell = "\n".join(block.body for block in blocks(page) if block.kind in ("sh", "console"))
        for line in re.findall(r"^(?:\$ )?(stepcast .*|make .*)", shell, re.MULTILINE) + re.findall(
            r"`((?:stepcast|make) [a-z].*?)`", text
        ):
            tool, name, *words = line.partition("#")[0].split()
            if tool == "make":
                assert name in verbs, f"{page.name}: {line}"
                continue
            assert name in known, f"{page.name}: {line}"
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= known[name], f"{page.name}: {line}"
        assert set(re.findall(r"stepcast\[([a-z0-9-]+)", text)) <= extras, page.name


class Links(HTMLParser):
    """What a built page loads, what it links to, and the anchors in it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.anchors.add(str(found["id"]))
        if tag in ("script", "img", "iframe", "source", "link"):
            self.loads += [url for url in (found.get("src"), found.get("href")) if url]
        elif tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
class TestSite:
    """`make docs`."""

    def test_loads_nothing_from_elsewhere(self, site: Path) -> None:
        """No script, style sheet, font or picture of another host."""
        for file in site.rglob("*.html"):
            assert [url for url in Links(file).loads if urlsplit(url).netloc] == [], file
        styles = "".join(file.read_text() for file in site.rglob("*.css"))
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", styles) == []

    def test_links_lead_somewhere(self, site: Path) -> None:
        """Every link and every anchor within the site."""
        pages = {file: Links(file) for file in site.rglob("*.html") if file.name != "404.html"}
        for file, page in pages.items():
            for url in {*page.links, *page.loads}:
                parts = urlsplit(url)
                if parts.scheme or parts.netloc:
                    continue
                target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
                target = target / "index.html" if target.is_dir() else target
                assert target.exists(), f"{file}: {url}"
                if parts.fragment and target in pages and not parts.fragment.startswith("__"):
                    assert unquote(parts.fragment) in pages[target].anchors, f"{file}: {url}"

    def test_reference_has_the_public_names(self, site: Path) -> None:
        """Each class of the SDK, with the methods that are made of descriptions."""
        text = (site / "reference" / "index.html").read_text()
        names = ["Client", "AsyncClient", "Session", "AsyncSession", "Stream", "AsyncStream", "Retry", "Manifest"]
        names += [
            "Client.predict",
            "Session.step",
            "Session.rollout",
            "Session.get_layer",
            "Stream.map",
            "AsyncStream.map",
        ]
        missing = [name for name in names if not re.search(rf'id="stepcast\.[\w.]*\b{re.escape(name)}"', text)]
        assert missing == []
        assert "TypeVar" not in text
