"""Keys in a file: hashed, named, watched; none of them in a log."""

import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serving import MODELS, ROOT, Running, running

from service.app import create_app
from service.doors import keys as keys_module
from service.doors.keys import ROLES, Keys, Principal, new_key
from service.settings import Settings
from stepcast.errors import ConfigError, Unauthorized

pytestmark = pytest.mark.service

LSTM = "/v1/models/lstm"
ONES = {"inputs": [1, 1, 1]}


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that comes by itself."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def carrying(key: str) -> dict[bytes, bytes]:
    return {b"authorization": f"Bearer {key}".encode()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def write(file: Path, *lines: str) -> None:
    """As a careful operator does: the file is whole at any moment."""
    fresh = file.with_suffix(".new")
    fresh.write_text("".join(f"{line}\n" for line in lines))
    os.replace(fresh, file)


def test_a_key_of_the_file_is_known_by_its_hash(file: Path) -> None:
    """Name, role and namespace are the line's; comments and empty lines say nothing; the hash opens nothing."""
    key, line = new_key("pump-7", "step", "acme")
    write(file, "# keys of the plant", "", line, new_key("boss", "admin", "acme")[1])
    keys = Keys("read:acme:key-of-a-reader", str(file))
    found = keys.authenticate(carrying(key))
    assert (found, found.name) == (Principal("acme", "step"), "pump-7")
    assert keys.authenticate(carrying("key-of-a-reader")).name == "STEPCAST_API_KEYS[0]"
    for wrong in (line.split()[3], line.split()[3].removeprefix("sha256:"), key[:-1], "", "pump-7"):
        with pytest.raises(Unauthorized):
            keys.authenticate(carrying(wrong))


def test_what_is_configured_is_held_as_hashes(file: Path) -> None:
    """Neither those of the file nor those of the setting."""
    write(file, new_key("a", "read", "acme")[1])
    held = Keys("read:acme:key-of-a-reader", str(file))
    assert "key-of-a-reader" not in repr([vars(held), held._keys])
    assert held._keys[0][0] == hashlib.sha256(b"key-of-a-reader").digest()


def test_a_file_without_a_key_lets_nobody_in(file: Path) -> None:
    """An emptied file never means that no key is needed."""
    write(file, "# none yet")
    with pytest.raises(Unauthorized):
        Keys("", str(file)).authenticate({})


GOOD = new_key("good", "step", "acme")[1]
WRONG = {
    "a key in clear": "pump step acme sck_this-is-the-key-itself",
    "too few words": "pump step sha256:" + "0" * 64,
    "too many words": f"{GOOD} more",
    "no role": "pump owner acme sha256:" + "0" * 64,
    "no namespace": "pump step a/b sha256:" + "0" * 64,
    "no name": "pu:mp step acme sha256:" + "0" * 64,
    "a short hash": "pump step acme sha256:" + "0" * 63,
    "a name twice": GOOD,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_line_stops_the_start_and_is_named_by_its_number(file: Path, wrong: str) -> None:
    """What stands there is not repeated: it may be a key."""
    write(file, GOOD, "", wrong)
    with pytest.raises(ConfigError) as refusal:
        create_app(Settings.read({}, models=MODELS, store="memory://", api_keys_file=str(file)))
    assert f"{file}:3 " in str(refusal.value) or f"{file}:3:" in str(refusal.value)
    assert not [word for word in wrong.split() if len(word) > 8 and word in str(refusal.value)]


def test_a_file_that_is_not_there_stops_the_start(file: Path) -> None:
    """As any wrong setting."""
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        Keys("", str(file))


@pytest.fixture
def watched(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, str]]:
    """A server that looks at its key file all the time, and the key that it begins with."""
    monkeypatch.setattr(keys_module, "POLL_S", 0.01)
    key, line = new_key("first", "admin", "acme")
    write(file, line)
    with running(store="memory://", api_keys_file=str(file)) as server:
        yield server, key


def status(server: Running, key: str, client: httpx.Client) -> int:
    """What a step by a key is answered with."""
    headers = {"authorization": f"Bearer {key}"}
    return client.post(f"{server.url}{LSTM}/sessions/s/step", json=ONES, headers=headers).status_code


def test_the_file_is_watched(watched: tuple[Running, str], file: Path) -> None:
    """On an open connection: a new key holds; one whose line is gone is refused, although its head was known."""
    server, first = watched
    second, line = new_key("second", "step", "acme")
    before = file.read_text().strip()
    with httpx.Client() as client:
        assert (status(server, first, client), status(server, second, client)) == (200, 401)
        write(file, before, line)
        until(lambda: status(server, second, client) == 200)
        assert status(server, first, client) == 200
        write(file, line)
        until(lambda: status(server, first, client) == 401)
        assert status(server, second, client) == 200


def test_a_file_that_turns_wrong_or_goes_changes_nothing(
    watched: tuple[Running, str], file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The keys from before hold, and the log says which line is wrong."""
    server, first = watched
    with httpx.Client() as client, caplog.at_level(logging.INFO, "stepcast"):
        write(file, f"plain step acme {first}")
        until(lambda: "keys:1 is not" in caplog.text)
        assert status(server, first, client) == 200
        file.unlink()
        until(lambda: "FileNotFoundError" in caplog.text)
        assert status(server, first, client) == 200
        write(file, new_key("third", "read", "acme")[1])
        until(lambda: status(server, first, client) == 401)
    assert "keys that hold from now on: third (read)" in caplog.text
    assert first not in caplog.text


def test_logs_name_the_key_and_never_show_it(watched: tuple[Running, str], caplog: pytest.LogCaptureFixture) -> None:
    """Good and bad calls through every door: an admin's call is logged by the key's name, no line has a key."""
    server, first = watched
    unknown = "sck_a-key-that-nobody-has"
    with caplog.at_level(logging.DEBUG), httpx.Client(base_url=server.url) as client:
        for key in (first, unknown):
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
                client.get("/v1/models", headers=headers)
                client.post(f"{LSTM}/sessions/s/step", json=ONES, headers=headers)
                client.post(f"{LSTM}/sessions/s/step/", content=b"{", headers=headers)
                client.post(f"{LSTM}/versions/1/load", headers={**headers, "x-request-id": "req-9"})
            client.get(f"{LSTM}/stream?key={key}", headers={"connection": "upgrade", "upgrade": "websocket"})
    said = [record.getMessage() for record in caplog.records if record.name.startswith("stepcast")]
    assert f"POST {LSTM}/versions/1/load (request req-9) by key 'first'" in said
    assert not [line for line in said if first in line or unknown in line]


@pytest.mark.parametrize("role", ROLES)
def test_the_command_makes_a_key_that_its_line_knows(file: Path, role: str) -> None:
    """Printed once, each time another; the line goes into the file as it stands."""
    command = [sys.executable, "-m", "service", "key", "plant-3", "--role", role, "--namespace", "acme"]
    made = []
    for _ in range(2):
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        shown, line = (text.split(": ", 1)[1] for text in run.stdout.splitlines())
        made.append(shown)
        write(file, line)
        found = Keys("", str(file)).authenticate({b"x-api-key": shown.encode()})
        assert (found, found.name) == (Principal("acme", role), "plant-3")
    assert made[0] != made[1]
    assert all(len(key) > 40 for key in made)


@pytest.mark.parametrize("wrong", [["two words"], ["plant", "--namespace", "a/b"], ["plant", "--role", "owner"]])
def test_the_command_refuses_names_that_are_none(wrong: list[str]) -> None:
    """Exit status 2, and no key."""
    command = [sys.executable, "-m", "service", "key", *wrong]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (2, "")
