"""The walls between rooms: imports flow down, and each outside library has one door."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ROOT

DOORS = {
    "onnxruntime": ["service/engine/onnx_session.py", "service/engine/gpu_states.py", "training/"],
    "onnx": ["service/engine/onnx_door.py", "training/"],
    "torch": ["training/"],
    "pandas": ["training/"],
    "pyarrow": ["service/scoring/", "training/"],
    "sklearn": ["training/"],
    "matplotlib": ["training/"],
    "rich": ["training/", "stepcast/cli/", "stepcast/progress.py"],
    "typer": ["stepcast/cli/"],
    "yaml": ["training/"],
    "grpc": ["service/doors/grpc/"],
    "grpc_health": ["service/doors/grpc/server.py"],
    "grpc_reflection": ["service/doors/grpc/server.py"],
    "google": ["service/doors/grpc/"],  # google.protobuf
    "httptools": ["stepcast/wire.py"],
    "fastapi": ["service/app.py", "service/doors/http/"],
    "starlette": ["service/app.py", "service/doors/http/"],
    "uvicorn": ["service/__main__.py", "service/doors/http/guard.py", "service/doors/websocket/connection.py"],
    "prometheus_client": ["service/telemetry.py"],
    "redis": ["service/store/redis/"],
    "hiredis": ["service/store/redis/"],
    "sqlite3": ["service/store/", "service/scoring/scratch.py"],
    "safetensors": ["service/doors/state_files.py"],
    "orjson": ["service/doors/answers.py"],
    "pickle": ["training/checkpoint.py"],  # the name of an error; what it loads is weights only
}
"""Library: the files and folders that may import it."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the three packages."""
    for package in ("stepcast", "service", "training"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def imported(tree: ast.Module) -> set[str]:
    """Top-level names of all imports, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


IMPORTS = {path: imported(tree) for path, tree in sources()}


def test_the_contracts_hold() -> None:
    """import-linter: stepcast imports nobody, service and training never meet, imports flow down."""
    command = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout
    assert " 0 broken" in run.stdout
    kept = {line.partition(" KEPT")[0] for line in run.stdout.splitlines() if " KEPT" in line}
    assert kept >= {"stepcast imports nobody of ours", "service and training never meet", "imports flow down"}


@pytest.mark.service
@pytest.mark.parametrize("library", DOORS)
def test_an_outside_library_stays_behind_its_door(library: str) -> None:
    """It is imported where it may be, and nowhere else."""
    using = [path for path, names in IMPORTS.items() if library in names]
    strays = [path for path in using if not any(path == door or path.startswith(door) for door in DOORS[library])]
    assert not strays
    assert bool(using) == bool(DOORS[library])


@pytest.mark.service
def test_the_contract_needs_pydantic_alone() -> None:
    """Of stepcast, what both ends need imports nothing but pydantic from outside."""
    for path in ("stepcast/__init__.py", "stepcast/errors.py", "stepcast/manifest.py", "stepcast/protocol.py"):
        outside = {name for name in IMPORTS[path] if name not in sys.stdlib_module_names} - {"pydantic", "stepcast"}
        assert not outside, path


@pytest.mark.service
def test_the_service_runs_without_torch() -> None:
    """Importing everything that serves loads no training library."""
    program = (
        "import sys, service.__main__\n"
        "print(sorted(n for n in ('torch', 'onnx', 'pandas', 'matplotlib', 'sklearn') if n in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.service
def test_no_error_is_swallowed() -> None:
    """No `except Exception: pass`, and no bare except, in anything that ships."""
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}"
                broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                silent = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
                assert not (broad and silent), f"{path}:{node.lineno}"
