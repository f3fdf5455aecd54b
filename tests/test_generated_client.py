"""A client that a public generator makes from /openapi.json compiles, and steps."""

import json
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from serving import ROOT, running

from service.doors.bodies import READINGS

NPM = shutil.which("npm")


@pytest.mark.service
@pytest.mark.slow
@pytest.mark.node
@pytest.mark.timeout(300)
def test_a_generated_typescript_client_compiles_and_steps(tmp_path: Path) -> None:
    """openapi-typescript's types under tsc --strict; a step, its retry, a refusal, the session: as over plain HTTP."""
    assert NPM is not None, "npm is not on the PATH: install Node.js 20 or later, or leave out with -m 'not node'"

    def npm(*arguments: str) -> str:
        run = subprocess.run([str(NPM), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    shutil.copytree(ROOT / "tests" / "generated_client", tmp_path, dirs_exist_ok=True)
    npm("install", "--no-audit", "--no-fund", "--ignore-scripts")
    with running(store="memory://", models=ROOT / "models") as server:
        (tmp_path / "openapi.json").write_bytes(httpx.get(f"{server.url}/openapi.json").content)
        npm("run", "generate")
        npm("run", "compile")
        seen = json.loads(npm("run", "--silent", "step", "--", server.url, json.dumps(READINGS)))
        names = [model["name"] for model in httpx.get(f"{server.url}/v1/models").json()["models"]]
        plain = httpx.post(f"{server.url}/v1/models/weather/sessions/plain/step", json={"inputs": READINGS}).json()
    assert seen.pop("outputs") == seen.pop("again") == plain["outputs"]
    assert seen == {"step": 1, "refusal": "step_conflict", "models": names}
