"""The command `stepcast`: what it prints, its exit status, and the one line it says where something is wrong."""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import typer
from rich.console import Console
from serving import MODELS, ROOT, Running, golden, running

import stepcast
from service.settings import Settings
from stepcast.__main__ import main
from stepcast.cli.load import Tally
from stepcast.cli.watch import blocks, picture
from stepcast.client import Client
from stepcast.errors import ConfigError
from stepcast.manifest import Tolerance, read_manifest

pytestmark = pytest.mark.service


@pytest.fixture(autouse=True)
def _to_the_server(memory_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands talk to the tests' server, by the variable that users would set."""
    monkeypatch.setenv("STEPCAST_URL", memory_server.url)


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> list[str]:
    """The lines that a command prints; on stderr where it fails."""
    assert main(list(words)) == status
    shown = capsys.readouterr()
    return (shown.err if status else shown.out).splitlines()


def wrong(capsys: pytest.CaptureFixture[str], *words: str, status: int = 1) -> str:
    """The one line that a command fails with."""
    (line,) = said(capsys, *words, status=status)
    return line


def features(model: str) -> list[str]:
    return [feature.name for feature in read_manifest(MODELS / model / "1").features]


def offline(server: Running, model: str, x: Any) -> Any:
    """The outputs [T,O] of a whole sequence [T,F], without a session."""
    with Client(server.url) as client:
        return client.predict(model, x)


# --- step -----------------------------------------------------------------------------------------------------------


def test_step_answers_the_same_by_names_numbers_and_json(
    capsys: pytest.CaptureFixture[str], memory_server: Running
) -> None:
    """Four ways to write one step; each answers the offline output, by output name."""
    x = golden("lstm")["x"][0, 0]
    y = offline(memory_server, "lstm", x[None])[0]
    names = features("lstm")
    outputs = [output.name for output in read_manifest(MODELS / "lstm" / "1").outputs]
    named = [f"{name}={value}" for name, value in zip(names, x.tolist(), strict=True)]
    ways = [named, named[::-1], [str(value) for value in x], [json.dumps(dict(zip(names, x.tolist(), strict=True)))]]
    for number, words in enumerate(ways):
        (line,) = said(capsys, "step", "lstm", f"way-{number}", *words)
        answer = json.loads(line)
        assert (answer["step"], answer["version"]) == (1, 1)
        assert list(answer["outputs"]) == outputs
        np.testing.assert_allclose(list(answer["outputs"].values()), y, rtol=1e-4, atol=1e-5)


def test_step_reads_one_json_value_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, memory_server: Running
) -> None:
    """With `-` a session goes on line by line."""
    x = golden("lstm")["x"][0]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{json.dumps(row.tolist())}\n" for row in x)))
    lines = [json.loads(line) for line in said(capsys, "step", "lstm", "lines", "-")]
    assert [line["step"] for line in lines] == list(range(1, len(x) + 1))
    got = [list(line["outputs"].values()) for line in lines]
    np.testing.assert_allclose(got, offline(memory_server, "lstm", x), rtol=1e-4, atol=1e-5)


def test_step_names_the_likeliest_class(capsys: pytest.CaptureFixture[str]) -> None:
    """A classifier's answer has the class and every probability; they sum to 1."""
    names = features("last_step")
    (line,) = said(capsys, "step", "last_step", "classes", *(f"{name}=-0.5" for name in names))
    outputs = json.loads(line)["outputs"]
    assert list(outputs["probabilities"]) == ["calm", "gust", "storm"]
    assert sum(outputs["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert outputs["class"] == max(outputs["probabilities"], key=outputs["probabilities"].get)


def test_step_leaves_names_out_where_the_model_allows(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is left out is a missing reading; where none may be missing all absent names are listed."""
    names = features("policies")
    (left_out,) = said(capsys, "step", "policies", "left-out", f"{names[0]}=0.25")
    (as_null,) = said(capsys, "step", "policies", "null", json.dumps({name: None for name in names} | {names[0]: 0.25}))
    assert left_out == as_null
    first, *absent = features("lstm")
    line = wrong(capsys, "step", "lstm", "absent", f"{first}=1")
    assert absent
    assert all(repr(name) in line for name in absent)


def test_step_says_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a feature, a model, an option, a command: one line each; nothing was stepped."""
    name = features("lstm")[0]
    assert f"(nearest: {name!r})" in wrong(capsys, "step", "lstm", "near", f"{name}x=1")
    assert "The nearest is 'lstm'." in wrong(capsys, "step", "lstn", "near", "1")
    assert "The nearest is '--prefix'." in wrong(capsys, "sessions", "lstm", "--prefx", "a", status=2)
    assert "'sessions'" in wrong(capsys, "sesions", "lstm", status=2)
    assert said(capsys, "sessions", "lstm", "--prefix", "near") == []


def test_step_refuses_what_is_no_reading(capsys: pytest.CaptureFixture[str]) -> None:
    """Too few numbers, a word, broken JSON: what was wanted stands in the line."""
    names = features("lstm")
    few = wrong(capsys, "step", "lstm", "few", "1")
    assert f"takes {len(names)} numbers, got 1" in few
    assert f"{names[0]}=..." in few
    assert "'fast' is no number" in wrong(capsys, "step", "lstm", "word", "fast")
    assert "no JSON" in wrong(capsys, "step", "lstm", "json", "[1,")
    assert "READINGS" in wrong(capsys, "step", "lstm", "none", status=2)


# --- sessions, state, fork, rollout ---------------------------------------------------------------------------------


def test_state_of_a_fork_is_its_parents(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Fork, print, set into another session, clear: the state is the same until it is cleared."""
    width = len(features("gru"))
    said(capsys, "step", "gru", "parent", *["-1.25"] * width)
    assert said(capsys, "fork", "gru", "parent", "child") == ["child"]
    (parent,) = said(capsys, "state", "gru", "parent")
    (child,) = said(capsys, "state", "gru", "child")
    assert parent == child
    held = json.loads(parent)["state"]
    assert np.abs(held["gru_0"]["h"]).max() > 0.01

    file = tmp_path / "state.json"
    file.write_text(parent)
    said(capsys, "state", "gru", "other", "--set", str(file))
    (other,) = said(capsys, "state", "gru", "other", "--layer", "gru_0")
    assert json.loads(other)["state"] == held
    assert "The nearest is 'gru_0'." in wrong(capsys, "state", "gru", "other", "--layer", "gru_1")

    said(capsys, "state", "gru", "other", "--clear")
    assert said(capsys, "sessions", "gru", "--prefix", "chi") == ["child"]
    assert {"child", "parent"} <= set(said(capsys, "sessions", "gru"))
    (head, *rows) = said(capsys, "sessions", "gru", "--prefix", "parent", "--long")
    assert head.split()[:4] == ["session", "step", "examples", "version"]
    assert rows[0].split()[:4] == ["parent", "1", "1", "1"]


def test_rollout_is_what_the_client_gets(capsys: pytest.CaptureFixture[str], memory_server: Running) -> None:
    """A line for each step ahead, with the class and its probabilities."""
    with Client(memory_server.url) as client:
        session = client.session("characters", "told")
        session.step([1.0, 0.0, 0.0])
        want = session.rollout(4)
    lines = [json.loads(line) for line in said(capsys, "rollout", "characters", "told", "4")]
    assert [line["ahead"] for line in lines] == [1, 2, 3, 4]
    got = [list(line["outputs"]["probabilities"].values()) for line in lines]
    np.testing.assert_allclose(got, want.outputs[0], rtol=1e-6)
    assert [line["outputs"]["class"] for line in lines] == want.classes[0]  # type: ignore[index]


# --- load and watch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["websocket", "http"])
@pytest.mark.parametrize("model", ["stacked", "last_step"])
def test_load_finds_every_answer_right(capsys: pytest.CaptureFixture[str], model: str, door: str) -> None:
    """Models that answer each step, and models that answer at the end; none is wrong, and all sessions ended."""
    options = ["--sessions", "3", "--seconds", "0.5", "--steps", "7", "--door", door]
    line = said(capsys, "load", model, *options)[-1]
    assert line.endswith("wrong = 0")
    assert int(line.split()[0]) > 7
    assert said(capsys, "sessions", model, "--prefix", "load-") == []


def test_load_fails_when_an_answer_is_wrong(
    capsys: pytest.CaptureFixture[str], http: httpx.Client, memory_server: Running
) -> None:
    """Somebody else steps the load's sessions: answers are no longer those of the offline result, the status is 1."""
    done = threading.Event()

    def disturb() -> None:
        with httpx.Client(base_url=memory_server.url) as other:
            while not done.is_set():
                for name in other.get("/v1/models/gru/sessions?prefix=load-").json()["sessions"]:
                    other.delete(f"/v1/models/gru/sessions/{name}/state")

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert main(["load", "gru", "--sessions", "1", "--seconds", "1", "--door", "http"]) == 1
    finally:
        done.set()
        thread.join()
    assert "wrong = 0" not in capsys.readouterr().out.splitlines()[-1]


def test_tally_counts_what_is_out_of_tolerance() -> None:
    tally = Tally(Tolerance(rtol=0, atol=0.1))
    for got in (1.05, 1.2, np.nan):
        tally.compare(np.float32([got]), np.float32([1]), 0.002)
    assert tally.wrong == 2
    assert tally.report(2.0) == "3 steps, 2 steps/s, p50 2.00 ms, p99 2.00 ms, wrong = 2"


def test_watch_steps_a_csv_and_plots_its_outputs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each row is a step; columns that are no features are left out, empty cells are missing."""
    names = features("policies")
    csv = tmp_path / "rows.csv"
    csv.write_text(f"note,{','.join(names)}\n" + "".join(f"x{',0.5' * (len(names) - 1)},\n" for _ in range(5)))
    shown = "\n".join(said(capsys, "watch", "policies", "watched", "--csv", str(csv), "--rate", "100"))
    assert "policies/watched step 5" in shown
    (line,) = said(capsys, "sessions", "policies", "--prefix", "watched", "--long")[1:]
    assert line.split()[1] == "5"
    csv.write_text("a,b\n1,2\n")
    assert "no column of 'policies'" in wrong(capsys, "watch", "policies", "none", "--csv", str(csv))


def test_watch_plots_the_state_that_others_step(capsys: pytest.CaptureFixture[str], http: httpx.Client) -> None:
    """Without a CSV it looks at the session until its time is over."""
    http.post("/v1/models/gru/sessions/seen/step", json={"inputs": [0.5] * len(features("gru"))}).raise_for_status()
    shown = "\n".join(said(capsys, "watch", "gru", "seen", "--rate", "50", "--seconds", "0.2"))
    assert "gru/seen step 1" in shown
    assert "gru_0.h[0]" in shown


def test_blocks_span_the_values() -> None:
    """The lowest value is the lowest block, the highest the highest, a missing one a gap."""
    assert blocks([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert blocks([-5.0, float("nan"), 5.0]) == "▁ █"
    assert blocks([3.0, 3.0]) == "▁▁"


def test_picture_fits_its_terminal() -> None:
    """Only the latest values are drawn, and only the first lines where there are many."""
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(picture("title", {f"v{n}": deque(range(100)) for n in range(20)}, 40))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 40
    assert sum(line.strip().endswith("99") for line in lines) == 16
    assert "and 4 more" in lines[-1]


# --- around them ----------------------------------------------------------------------------------------------------


def test_version_is_fast_and_loads_nothing_heavy() -> None:
    """It imports none of the libraries that serve, train or talk."""
    program = (
        "import sys; from stepcast.__main__ import main; main(['version'])\n"
        "print(sorted({'numpy', 'httpx', 'stepcast.manifest', 'fastapi', 'onnxruntime', 'torch'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert run.stdout.splitlines() == [f"stepcast {stepcast.__version__}", "[]"]


@pytest.mark.parametrize("command", ["serve", "check", "import"])
def test_help_of_a_room_is_complete(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """The service's own help, under the name that was typed."""
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: stepcast {command} ")
    own = {"serve": "--workers", "check": "MODEL_DIR", "import": "--manifest"}
    assert own[command] in shown


def test_a_room_says_in_one_line_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A wrong option names the nearest, status 2; a failure is status 1."""
    with pytest.raises(SystemExit) as done:
        main(["serve", "--prot", "1"])
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stepcast serve: unrecognized argument '--prot'. The nearest is '--port'.")
    assert "manifest.json" in wrong(capsys, "check", str(tmp_path))
    with pytest.raises(SystemExit) as done:
        main(["check", str(tmp_path), "--device", "cpux"])
    assert done.value.code == 2
    assert "The nearest is 'cpu'." in capsys.readouterr().err


def test_a_start_without_models_is_one_line(tmp_path: Path) -> None:
    """What a newcomer's first `stepcast serve` says in an empty directory; status 1."""
    command = [sys.executable, "-m", "stepcast", "serve", "--port", "0", "--store", "memory://"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("STEPCAST_")} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    reasons = [line for line in run.stderr.splitlines() if "ERROR" in line]
    assert reasons[0].endswith("ManifestError: model repository 'models' is not a directory")
    assert "Traceback" not in run.stderr


def test_schema_of_the_manifest_knows_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    described = json.loads("\n".join(said(capsys, "schema", "manifest")))
    assert {"features", "outputs", "states", "sha256"} <= described["properties"].keys()


def test_a_server_starts_beside_the_variables_of_the_command() -> None:
    """STEPCAST_URL and STEPCAST_KEY are the command's; a variable that is nobody's still stops the start."""
    assert Settings.read({"STEPCAST_URL": "http://x", "STEPCAST_KEY": "k"}) == Settings.read({})
    with pytest.raises(ConfigError, match="STEPCAST_KEYS"):
        Settings.read({"STEPCAST_KEYS": "k"})


def test_a_key_comes_from_the_variable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with keys refuses without one, and takes the one of STEPCAST_KEY."""
    with running(store="memory://", api_keys="step:mine:secret-key") as server:
        assert "Unauthorized" in wrong(capsys, "sessions", "gru", "--url", server.url)
        monkeypatch.setenv("STEPCAST_KEY", "secret-key")
        assert said(capsys, "sessions", "gru", "--url", server.url) == []


def test_completion_offers_the_commands() -> None:
    """What the shell's completion asks for is answered."""
    asked = {"_STEPCAST_COMPLETE": "complete_bash", "COMP_WORDS": "stepcast s", "COMP_CWORD": "1"}
    program = "import sys; from stepcast.__main__ import main; sys.exit(main([]))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | asked, capture_output=True, text=True, timeout=30
    )
    assert {"serve", "score", "step", "sessions", "state", "schema"} == set(run.stdout.split())


def test_an_unreachable_server_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not begin with http://" in wrong(capsys, "sessions", "lstm", "--url", "localhost:8000")


def test_command_page_names_every_command_and_option() -> None:
    """docs/command.md is complete: commands of the application, and the service's own options."""
    from service.__main__ import _parser
    from stepcast.cli.app import app

    page = (ROOT / "docs" / "command.md").read_text()
    names = set()
    for command in app.registered_commands:
        assert command.callback is not None
        names.add(command.name or command.callback.__name__)
    assert {name for name in names if not re.search(rf"`{name}\b", page)} == set()
    group = typer.main.get_command(app)
    options = {
        option
        for command in group.commands.values()  # type: ignore[attr-defined]
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--")
    }
    (rooms,) = (action for action in _parser("x")._actions if isinstance(action, argparse._SubParsersAction))
    options |= {o for room in rooms.choices.values() for o in room._option_string_actions if o.startswith("--")}
    assert {option for option in options if option not in page} == set()
