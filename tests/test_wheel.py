"""The wheel as strangers install it: in environments of its own for each extra, from an empty directory.

What the three extras do for each other goes by the command `stepcast` alone: one environment trains, one serves, one
steps.
"""

import contextlib
import csv
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from serving import ROOT

from stepcast import __version__

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Nothing of this process leads to the checkout.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "STEPCAST_", "COV_"))}


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and the empty directory in which its commands run."""

    root: Path
    here: Path

    def stepcast(self, *words: str, status: int = 0) -> str:
        """What the command prints; on stderr where it fails."""
        run = self.run("stepcast", *words)
        assert run.returncode == status, run.stdout + run.stderr
        return run.stderr if status else run.stdout

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [self.root / "bin" / program, *words]
        return subprocess.run(command, cwd=self.here, env=CLEAN, capture_output=True, text=True, timeout=600)

    def python(self, program: str) -> str:
        run = self.run("python", "-c", program)
        assert run.returncode == 0, run.stderr
        return run.stdout

    @contextlib.contextmanager
    def serving(self, *words: str) -> Iterator[str]:
        """`stepcast serve`; the server's address."""
        command = [self.root / "bin" / "stepcast", "serve", "--port", "0", *words]
        with subprocess.Popen(command, cwd=self.here, env=CLEAN, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line.startswith("stepcast serves on http://"), line
                yield line.split()[-1]
            finally:
                process.terminate()
                process.wait(30)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist, and the wheel that is built from it, as `make dist` builds them."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def environment(name: str, wheel: Path, folder: Path) -> Environment:
    """A fresh environment with the wheel and one extra."""
    root, here = folder / name, folder / f"{name}-here"
    venv.create(root)
    here.mkdir()
    pip = [sys.executable, "-m", "pip", "--python", str(root / "bin" / "python"), "--disable-pip-version-check"]
    install = [*pip, "install", "-qq", "--no-compile", "-c", str(ROOT / "constraints.txt"), f"{wheel}[{name}]"]
    run = subprocess.run(install, cwd=here, env=CLEAN, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return Environment(root, here)


@pytest.fixture(scope="module")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return environment("client", wheel, tmp_path_factory.mktemp("environments"))


@pytest.fixture(scope="module")
def service(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return environment("service", wheel, tmp_path_factory.mktemp("environments"))


@pytest.fixture(scope="module")
def training(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return environment("training", wheel, tmp_path_factory.mktemp("environments"))


def test_wheel_holds_one_package(wheel: Path) -> None:
    """All is below stepcast/: code of the service and the trainer, recipes, the marker of types, one small model."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"stepcast-{__version__}.dist-info/METADATA").decode()
        model = [file for file in archive.infolist() if "example_models" in file.filename]
    assert {name.partition("/")[0] for name in names} == {"stepcast", f"stepcast-{__version__}.dist-info"}
    code = {str(path.relative_to(ROOT)) for room in ("service", "training") for path in (ROOT / room).rglob("*.py")}
    assert {f"stepcast/{path}" for path in code} <= set(names)
    assert {"stepcast/py.typed", "stepcast/training/recipes/reviews.vec"} <= set(names)
    assert sorted(Path(file.filename).name for file in model) == ["golden.npz", "manifest.json", "model.onnx"]
    assert sum(file.file_size for file in model) < 50_000
    assert {"client", "service", "service-gpu", "training"} <= set(
        re.findall(r"^Provides-Extra: (.+)$", metadata, re.M)
    )


def test_sdist_holds_what_the_wheel_is_made_of(built: Path) -> None:
    """And no tests, benchmarks or sessions; the wheel was built from it."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", "service/app.py"} <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"stepcast", "service", "training", "models"}


@pytest.mark.parametrize("extra", ["client", "service", "training"])
def test_site_packages_hold_stepcast_alone(extra: str, request: pytest.FixtureRequest) -> None:
    """No package named service, training or tests, and nothing of the checkout on the path."""
    env: Environment = request.getfixturevalue(extra)
    program = (
        "import importlib.util as u, stepcast\n"
        "print(stepcast.__file__)\n"
        "print([n for n in ('service', 'training', 'tests', 'benchmarks') if u.find_spec(n)])"
    )
    file, strays = env.python(program).splitlines()
    assert Path(file).is_relative_to(env.root)
    assert strays == "[]"
    assert env.stepcast("version") == f"stepcast {__version__}\n"


def test_a_missing_extra_is_named_with_its_command(
    client: Environment, service: Environment, training: Environment
) -> None:
    """One line each."""
    for env, words, extra in (
        (client, ["serve", "--example"], "service"),
        (client, ["train", "x.yaml"], "training"),
        (service, ["train", "x.yaml"], "training"),
        (service, ["schema", "recipe"], "training"),
        (service, ["score", "x.csv", "--model", "m", "--out", "y.csv"], "parquet"),
        (training, ["sessions", "m"], "client"),
        (training, ["serve"], "service"),
    ):
        (line,) = env.stepcast(*words, status=1).splitlines()
        assert line.endswith(f'is not installed. pip install "stepcast[{extra}]"')


def test_the_example_answers_its_first_step(client: Environment, service: Environment) -> None:
    """By name, through the command and the SDK; by several processes as by one; nothing is left in the directory."""
    for words in ([], ["--workers", "2", "--store", f"sqlite:///{service.here.parent}/sessions.db"]):
        with service.serving("--example", *words) as url:
            where = ["--url", url]
            answer = json.loads(client.stepcast("step", "control_charts", "demo", "value=30.5", *where))
            assert answer["step"] == 1
            assert answer["outputs"]["class"] in answer["outputs"]["probabilities"]
            program = (
                "from stepcast.client import Client\n"
                f"with Client({url!r}) as client:\n"
                "    print(client.session('control_charts', 'demo').step([30.5]).step)"
            )
            assert client.python(program) == "2\n"
            load = client.stepcast("load", "control_charts", "--seconds", "1", "--sessions", "2", *where)
            assert load.strip().endswith("wrong = 0")
    assert list(service.here.iterdir()) == []


def test_a_recipe_of_a_csv_becomes_a_model_that_steps(
    client: Environment, service: Environment, training: Environment
) -> None:
    """new, train, evaluate, check, serve, step: a model of two columns answers by their names."""
    start = datetime(2026, 1, 1)
    with (training.here / "pump.csv").open("w", newline="") as file:
        rows = [[start + timedelta(hours=n), math.sin(n / 5), "" if n % 9 == 4 else n % 7] for n in range(120)]
        csv.writer(file).writerows([["time", "flow", "load"], *rows])
    training.stepcast("new", "pump.csv")
    assert "wrote models/pump/1" in training.stepcast("train", "pump.yaml", "--set", "training.epochs=2")
    training.stepcast("evaluate", "pump.yaml", "--report", "report")
    assert (training.here / "report" / "metrics.json").is_file()

    models = training.here / "models"
    assert service.stepcast("check", str(models / "pump" / "1")).startswith("pump version 1: ")
    with service.serving("--models", str(models), "--store", "memory://") as url:
        for step, words in enumerate((["flow=0.5", "load=3"], ["flow=-0.25"], ['{"load": null, "flow": 0.1}']), 1):
            answer = json.loads(client.stepcast("step", "pump", "east", *words, "--url", url))
            assert answer["step"] == step
            assert list(answer["outputs"]) == ["flow", "load"]
            assert all(math.isfinite(value) for value in answer["outputs"].values())


def test_a_worked_example_trains_from_its_copy(training: Environment) -> None:
    """Its recipe names a class of ours, which lies elsewhere in the wheel than in a checkout; so does the schema."""
    training.stepcast("new", "--example", "control_charts")
    shown = training.stepcast("train", "control_charts.yaml", "--set", "training.epochs=1", "--out", "charts")
    assert "wrote charts/control_charts/1" in shown
    assert "network" in json.loads(training.stepcast("schema", "recipe"))["properties"]
