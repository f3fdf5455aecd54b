"""The files around the code keep their word: Makefile, constraints.txt, the operations page."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from service.settings import PREFIX, Settings
from service.telemetry import Metrics
from stepcast.errors import BY_CODE

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / "docs" / "operations.md").read_text()


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_make_names_every_verb() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    shown = re.findall(r"^make ([a-z-]+) ", make("help").stdout, flags=re.MULTILINE)
    assert sorted(shown) == sorted(set(phony.split()) - {"help", "python"})


def test_make_says_what_to_install_without_python(tmp_path: Path) -> None:
    """Nothing is made, and the message names what was looked for and how to go on."""
    run = make("install", "PYTHONS=python-of-no-machine", f"VENV={tmp_path / 'venv'}")
    assert run.returncode != 0
    assert "No Python >= 3.11" in run.stderr
    assert "python-of-no-machine" in run.stderr
    assert "make PYTHON=/path/to/python3" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_workflows_are_valid_and_call_the_verbs_of_make() -> None:
    """GitHub's schema takes every workflow; each verb they call exists, and every verb of .ci/run is called."""
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.stem for path in workflows] == ["check", "docs", "images", "release", "test"]
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.github-workflows"]
    run = subprocess.run([*command, *workflows], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout
    called = set(re.findall(r"run: make ([a-z-]+)", "".join(path.read_text() for path in workflows)))
    verbs = set(re.findall(r"^make ([a-z-]+) ", make("help").stdout, flags=re.MULTILINE))
    assert called <= verbs
    local = set(re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE))
    assert local <= called


def test_workflows_test_every_python_that_is_declared() -> None:
    """The matrix is that of the classifiers, the first of them the least that is required."""
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    (matrix,) = re.findall(r"python: \[(.*)\]", text)
    declared = [
        c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language :: Python :: ")
    ]
    assert re.findall(r"[\d.]+", matrix) == declared
    assert PROJECT["requires-python"] == f">={declared[0]}"


def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


# GluonTS needs a pandas below 3, which constraints.txt does not have: this extra lives in an environment of its own.
UNPINNED = {"peers"}


@pytest.mark.parametrize("extra", ["", *sorted(PROJECT["optional-dependencies"].keys() - UNPINNED)])
def test_every_dependency_has_a_tested_version(extra: str) -> None:
    """constraints.txt pins each direct dependency within the bounds of pyproject.toml."""
    pinned = pins()
    declared = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in map(Requirement, declared):
        if requirement.name != PROJECT["name"]:
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_constraints_fit_machines_with_and_without_a_gpu() -> None:
    """No local version (torch's +cpu) and none of CUDA's packages; both runtimes at the same version."""
    pinned = pins()
    assert [name for name, version in pinned.items() if version.local] == []
    assert [name for name in pinned if name == "triton" or name.startswith(("nvidia", "cuda"))] == []
    assert pinned["onnxruntime"] == pinned["onnxruntime-gpu"]


def test_suite_runs_on_the_pinned_versions() -> None:
    """What passes here passed with the versions that constraints.txt names."""
    pinned = pins()
    installed = {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in distributions()}
    different = {
        name: (str(version), str(pinned[name]))
        for name, version in installed.items()
        if name in pinned and version.public != pinned[name].public
    }
    assert different == {}


def test_operations_page_names_what_exists() -> None:
    """Every setting, metric and error code on the page is one of the server's."""
    variables = set(re.findall(rf"\b{PREFIX}[A-Z_]+[A-Z]\b", PAGE))
    assert variables
    assert variables <= {PREFIX + name.upper() for name in Settings.model_fields}
    metrics = set(re.findall(r"\bstepcast_[a-z_]+[a-z]\b", PAGE))
    families = {family.name for family in Metrics().registry.collect()}
    assert metrics
    assert {name.removesuffix("_total") for name in metrics} <= families
    codes = set(re.findall(r'code="([a-z_]+)"|\b503 `([a-z_]+)`', PAGE))
    assert codes
    assert {code for pair in codes for code in pair if code} <= set(BY_CODE)


def test_operations_page_repeats_the_redis_configuration() -> None:
    conf = (ROOT / "k8s" / "base" / "redis.conf").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| `([^`]+)` \|", PAGE.split("### Redis")[1], flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["appendonly", "appendfsync", "save", "maxmemory-policy"]
    for name, value in rows:
        assert re.search(rf"^{name} {re.escape(value)}$", conf, flags=re.MULTILINE)
