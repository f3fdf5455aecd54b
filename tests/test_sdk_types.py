"""What a user's type checker sees of the SDK: arrays, models and names, and no Any."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
from serving import ROOT, Running

USER = ROOT / "tests" / "data" / "user_of_the_sdk.py"


WRONG = """
import numpy as np
from stepcast import Client
client = Client("http://localhost:8000")
session = client.session("m")
session.step(np.ones(3), rows="columns")
session.step(np.ones(3)).output
session.step({"a": 1.0}).outputs["a"].shape
client.manifest("m").feature
client.models()[0]["nam"]
client.step_many("m", 3, np.ones(3))
reveal_type(session.step(np.ones(3)))
reveal_type(session.step({"a": None}).outputs)
reveal_type(client.manifest("m").features)
reveal_type(client.stream("m").step([1.0], session="s").outputs.dtype)
reveal_type(client.create("m"))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy --strict says of both files, outside the project and without its settings."""
    there = tmp_path_factory.mktemp("user")
    (there / "right.py").write_text(USER.read_text())
    (there / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "right.py", "wrong.py"]
    environ = {**os.environ, "MYPYPATH": str(ROOT)}
    run = subprocess.run(command, cwd=there, env=environ, capture_output=True, text=True, timeout=110)
    assert run.returncode == 1, run.stderr
    return run.stdout.splitlines()


@pytest.mark.slow
def test_mypy_strict_passes_on_a_users_program(said: list[str]) -> None:
    """Its assert_type lines say what everything is."""
    assert USER.read_text().count("assert_type(") > 20
    assert [line for line in said if line.startswith("right.py") or line.startswith("stepcast")] == []


@pytest.mark.slow
def test_mypy_finds_what_a_user_does_wrong(said: list[str]) -> None:
    """Types that were Any would let each of these pass; what is revealed are arrays, models and names."""
    wrong = {int(line.split(":")[1]) for line in said if ": error:" in line}
    assert wrong == {6, 7, 8, 9, 10, 11}, said
    revealed = [line.partition('Revealed type is "')[2].rstrip('"') for line in said if "Revealed" in line]
    assert revealed[0].startswith("stepcast.codec.Answer[numpy.ndarray[")
    assert "numpy.floating[" in revealed[0] or "float32" in revealed[0]
    assert revealed[1] == "stepcast.inputs.Named[float, str]"
    assert revealed[2].removeprefix("builtins.") == "tuple[stepcast.manifest.Feature, ...]"
    assert revealed[3].startswith("numpy.dtype[numpy.float")
    assert revealed[4] == "stepcast.client.Session"


@pytest.mark.service
def test_the_users_program_works(memory_server: Running) -> None:
    """The same file, against a server."""
    spec = importlib.util.spec_from_file_location("user_of_the_sdk", USER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(memory_server.url) == 4


@pytest.mark.service
def test_importing_stepcast_loads_no_client() -> None:
    """The names are there, what they need is loaded when they are asked for, and named where it is missing."""
    program = textwrap.dedent(
        """
        import sys
        import stepcast
        assert not {"numpy", "httptools", "websockets", "msgspec", "pydantic"} & set(sys.modules)
        assert "Client" in dir(stepcast)
        from stepcast import Client, Manifest
        assert Client is stepcast.client.Client
        assert "pandas" not in sys.modules and "rich" not in sys.modules
        for name in [name for name in sys.modules if name.partition(".")[0] in ("stepcast", "httptools")]:
            del sys.modules[name]
        sys.modules["httptools"] = None
        import stepcast
        from stepcast import Manifest
        try:
            stepcast.AsyncClient
        except ImportError as error:
            print(error)
        try:
            stepcast.Cleint
        except AttributeError as error:
            print(error)
        """
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines() == [
        'stepcast.AsyncClient needs httptools, which is not installed. Run: pip install "stepcast[client]"',
        "module 'stepcast' has no attribute 'Cleint'",
    ], run.stderr
