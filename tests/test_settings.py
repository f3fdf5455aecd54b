"""Settings: read once, wrong ones stop the start, all of them documented."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from serving import MODELS, ROOT

from service.app import create_app
from service.settings import Settings
from stepcast.errors import ConfigError

pytestmark = pytest.mark.service

PAGE = ROOT / "docs" / "settings.md"


def test_variables_are_read_and_the_command_line_wins() -> None:
    """Variables over defaults, overrides over variables, None is no override; others' variables are not looked at."""
    environ = {"STEPCAST_PORT": "9000", "STEPCAST_TTL_S": "60", "STEPCAST_DOCS": "false", "PATH": "/bin", "PORT": "1"}
    settings = Settings.read(environ, port=7000, host=None)
    assert (settings.port, settings.ttl_s, settings.docs, settings.host) == (7000, 60, False, "127.0.0.1")
    assert Settings.read({}).store == "sqlite:///stepcast.db"


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("STEPCAST_QUEUE_LIMITS", "STEPCAST_QUEUE_LIMIT"),
        ("STEPCAST_STOER", "STEPCAST_STORE"),
        ("STEPCAST_TTL", "STEPCAST_TTL_S"),
        ("STEPCAST_DEADLINE", "STEPCAST_DEADLINE_S"),
        ("STEPCAST_APIKEYS", "STEPCAST_API_KEYS"),
        ("STEPCAST_store", "STEPCAST_STORE"),
    ],
)
def test_an_unknown_variable_names_the_nearest(wrong: str, near: str) -> None:
    """A typing error never becomes a default."""
    with pytest.raises(ConfigError) as caught:
        Settings.read({wrong: "1"})
    assert repr(wrong) in str(caught.value)
    assert f"The nearest is {near!r}" in str(caught.value) or wrong == "STEPCAST_store"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PORT", "65536"),
        ("PORT", "http"),
        ("PORT", "tcp://10.0.0.1:8000"),
        ("WORKERS", "0"),
        ("DEVICE", "gpu"),
        ("DURABILITY", "always"),
        ("DEADLINE_S", "0"),
        ("DEADLINE_S", "-1"),
        ("QUEUE_LIMIT", "0"),
        ("QUEUE_LIMIT", "1.5"),
        ("BODY_LIMIT_BYTES", "1000"),
        ("VERSION_POLICY", "latest"),
        ("DOCS", "maybe"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(variable: str, value: str) -> None:
    """The variable, what is wrong with it, what was given."""
    with pytest.raises(ConfigError) as caught:
        Settings.read({f"STEPCAST_{variable}": value})
    assert f"STEPCAST_{variable}: " in str(caught.value)
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"store": "mysql://x"}, "mysql"),
        ({"store": "memory://", "durability": "replicated"}, "replicated"),
        ({"store": "memory://", "api_keys": "root:a:12345678"}, "API_KEYS"),
        ({"store": "memory://", "api_keys": "read:a:short"}, "API_KEYS"),
        ({"store": "memory://", "api_keys": "read:a/b:12345678"}, "API_KEYS"),
        ({"store": "memory://", "api_keys": "12345678"}, "API_KEYS"),
    ],
)
def test_settings_that_do_not_go_together_stop_the_start(settings: dict[str, str], words: str) -> None:
    """Stores, levels and keys are checked before anything is served; a wrong key is not repeated in the message."""
    with pytest.raises(ConfigError, match=words) as caught:
        create_app(Settings.read({}, models=MODELS, **settings))
    assert "12345678" not in str(caught.value)


def test_settings_are_frozen() -> None:
    """Nobody changes them later."""
    with pytest.raises(ValidationError, match="frozen"):
        Settings.read({}).port = 1


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        ([], {"STEPCAST_STROE": "memory://"}, "The nearest is 'STEPCAST_STORE'"),
        (["--port", "x"], {}, "STEPCAST_PORT"),
        (["--store", "memory://", "--workers", "2"], {}, "memory://"),
    ],
)
def test_the_command_refuses_to_start_wrong(
    tmp_path: Path, arguments: list[str], environ: dict[str, str], words: str
) -> None:
    """Status 2 and one line, no traceback."""
    run = subprocess.run(
        [sys.executable, "-m", "service", "serve", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2
    assert words in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_every_setting_is_documented() -> None:
    """docs/settings.md holds the table that the settings give; STEPCAST_UPDATE_DOCS=1 writes it."""
    page = PAGE.read_text()
    at = page.index("| variable |")
    if os.environ.get("STEPCAST_UPDATE_DOCS"):
        PAGE.write_text(page[:at] + Settings.table())
    assert PAGE.read_text()[at:] == Settings.table(), "run this test with STEPCAST_UPDATE_DOCS=1"
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert f"| `STEPCAST_{name.upper()}` | " in page
