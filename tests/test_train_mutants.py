"""The catalogue of `make mutants` keeps up with the code, and its runner tells killed from survived."""

from collections import Counter
from pathlib import Path

import mutants
import pytest
from mutants import ROOT, Mutant

CATALOGUE = list(mutants.mutants())
JUDGED = (
    *("train.py", "segments.py", "losses.py", "masks.py", "metrics.py", "optimise.py"),
    *("averaging.py", "distributions.py", "probabilistic.py", "calibration.py", "checkpoint.py", "data/table.py"),
)


@pytest.mark.parametrize("mutant", CATALOGUE, ids=lambda m: f"{m.file}-{m.new[:40]}")
def test_mutant_still_fits_the_code(mutant: Mutant) -> None:
    """Its text stands there exactly once, the patched file is Python, and its tests exist."""
    source = (ROOT / "training" / mutant.file).read_text()
    assert source.count(mutant.old) == 1
    patched = source.replace(mutant.old, mutant.new)
    assert patched != source
    compile(patched, mutant.file, "exec")
    assert mutant.tests
    assert all((ROOT / "tests" / name).is_file() for name in mutant.tests)


def test_catalogue_reaches_every_file_that_decides_what_is_learned() -> None:
    """All of the loop, and every layer that computes; no patch twice."""
    per_file = Counter(mutant.file for mutant in CATALOGUE)
    layers = {f"layers/{path.name}" for path in (ROOT / "training" / "layers").glob("*.py")}
    specs = {f"layers/{name}.py" for name in ("spec", "specs", "cell_specs", "distribution_specs")}
    names_only = {"layers/__init__.py", "layers/stack.py", *specs}
    assert set(per_file) == {*JUDGED, *(layers - names_only)}
    assert len(CATALOGUE) >= 60
    assert len({(m.file, m.old, m.new) for m in CATALOGUE}) == len(CATALOGUE)


def test_few_mutants_are_excused_and_each_says_why() -> None:
    """At most one in twenty means the same as the original."""
    excused = [mutant for mutant in CATALOGUE if mutant.equal]
    assert len(excused) <= len(CATALOGUE) / 20
    assert all(len(mutant.equal) > 20 for mutant in excused)


@pytest.mark.slow
def test_runner_tells_killed_from_survived_and_takes_the_patch_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tree of one module and one test: a wrong number is killed, another spelling survives, bad syntax is broken."""
    mutants.SERVER.set_forkserver_preload(["pytest"])  # a tree like this one needs no torch
    (tmp_path / "training").mkdir()
    (tmp_path / "tests").mkdir()
    module = tmp_path / "training" / "two.py"
    module.write_text("TWO = 2\n")
    (tmp_path / "tests" / "test_two.py").write_text(
        "import sys\nsys.path.insert(0, 'training')\nfrom two import TWO\n\n\ndef test_two():\n    assert TWO == 2\n"
    )
    words = [
        mutants.judge(Mutant("two.py", "2", new, ("test_two.py",)), tmp_path).word for new in ("3", "1 + 1", "2 +")
    ]
    assert words == ["killed", "survived", "broken"]
    assert module.read_text() == "TWO = 2\n"
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "tests" / "models").mkdir()
    monkeypatch.setattr(mutants, "CATALOGUE", {("two.py", ("test_two.py",)): [("2", "3"), ("2", "1 + 1", "the same")]})
    assert mutants.main(["--workers", "1"]) == 1
    assert mutants.main(["--workers", "1", "--least", "0.5"]) == 0
    assert "1 of 2 mutants killed (50.0%)" in capsys.readouterr().out
    (tmp_path / "tests" / "test_two.py").write_text("def test_two():\n    assert False\n")
    with pytest.raises(SystemExit, match="fail without any mutant"):
        mutants.main(["--workers", "1"])
