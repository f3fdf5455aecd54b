"""`stepcast score`: bad rows, odd files and wrong options are one line each, and rows can be left out."""

from datetime import timedelta
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from long_tables import ATOL, RTOL, START, inputs, refused, rows_of, score, write
from serving import MODELS

from service.__main__ import main
from service.scoring import files
from service.scoring.scratch import Scratch
from stepcast.manifest import read_manifest

pytestmark = pytest.mark.service

TEXT = "key,when,u,v,w\na,2026-01-01T00:00:00Z,1,2,3\nb,2026-01-01T00:00:00Z,1,2,3\na,2026-01-01T01:00:00Z,1,2,3\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a,2026-01-01T02:00:00Z,abc,2,3", "in.csv:5: column 'u' has 'abc', wanted a number. Mend the row"),
        ("a,2026-01-01T02:00:00Z,inf,2,3", "in.csv:5: column 'u' has inf, wanted a number"),
        ("a,2026-01-01T02:00:00Z,1,1e39,3", "in.csv:5: feature 'v' is infinite in float32"),
        ("a,2026-01-01T02:00:00Z,1,2,NA", "in.csv:5: feature 'w' is missing, and must not be"),
        (",2026-01-01T02:00:00Z,1,2,3", "in.csv:5: column 'key' has nothing, wanted a session's id"),
        ("a,yesterday,1,2,3", "in.csv:5: column 'when' has 'yesterday', wanted a moment"),
        ("a,9999999999999,1,2,3", "in.csv:5: column 'when' has '9999999999999', wanted a moment"),
        ("a,2026-01-01T01:00:00Z,1,2,3", "in.csv:5: session 'a' at 2026-01-01T01:00:00Z, which is not later than"),
        ("a,2025-12-31T23:00:00Z,1,2,3", "Sort the table by time"),
        ("a,2026-01-01T02:00:00Z,1,2", "in.csv:5: Expected 5 columns, got 4"),
        ("a,2026-01-01T02:00:00Z,1,2,\xff", "in.csv:5: CSV conversion error to string: invalid UTF8 data"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(
    line: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, and no output."""
    table = tmp_path / "in.csv"
    table.write_bytes((TEXT + line + "\n").encode("latin-1"))
    out = tmp_path / "out.csv"
    assert says in refused(capsys, table, "lstm", out, "--key", "key", "--time", "when")
    assert not out.exists()


def test_bad_rows_are_left_out_if_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their sessions go on as if they had not come; each has its empty row; the first ones are told."""
    manifest = read_manifest(MODELS / "lstm" / "1")
    rows = rows_of(manifest, inputs(manifest, (8, 8)))
    early = dict(rows[0], when=START - timedelta(hours=1))
    bad = [dict(rows[0], u="x"), dict(rows[1], key=""), *rows[:6], dict(rows[2]), *rows[6:], early]
    options = "--key", "key", "--time", "when"
    want = score(write(tmp_path / "good.parquet", rows), "lstm", tmp_path / "want.parquet", *options)
    capsys.readouterr()
    got = score(write(tmp_path / "bad.csv", bad), "lstm", tmp_path / "got.csv", *options, "--skip-bad-rows")
    said = capsys.readouterr()
    left = [row for row, step in enumerate(got["step"].to_pylist()) if step is None]
    assert left == [0, 1, 8, 19]
    assert "4 of 20 rows were left out" in said.err
    assert "bad.csv:2: column 'u' has 'x', wanted a number" in said.err
    assert "bad.csv:10: session 's0' at 2026-03-08T05:00:00Z, which is not later than" in said.err
    kept = got.filter(pa.array([row not in left for row in range(len(bad))]))
    for name in ("step", "u", "v"):
        np.testing.assert_allclose(kept[name].to_numpy(), want[name].to_numpy(), RTOL, ATOL)
        assert [got[name][row].as_py() for row in left] == [None] * 4


@pytest.mark.parametrize("sessions", [1, 3, 80])
def test_a_row_that_would_make_the_state_infinite_fails_alone(
    sessions: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sum of inputs beyond float32: by the sequence way and by single steps, the row is named, or left out."""
    values = [1.0, 3e38, 3e38, -1.0, 2.0]
    rows = [{"key": f"s{n}", "x0": value if n == 0 else 1.0} for value in values for n in range(sessions)]
    table, out = write(tmp_path / "in.csv", rows), tmp_path / "out.csv"
    line = 2 + 2 * sessions
    says = refused(capsys, table, "foreign_counter", out, "--key", "key")
    assert f"in.csv:{line}: the model's outputs or its state would not be finite" in says
    got = score(table, "foreign_counter", out, "--key", "key", "--skip-bad-rows")
    assert got["step"].to_pylist()[::sessions] == [1, 2, None, 3, 4]
    assert got["y0"].null_count == 1
    if sessions > 1:
        assert got["step"].to_pylist()[1::sessions] == [1, 2, 3, 4, 5]


def test_a_cell_that_is_no_number_late_in_a_large_file_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a CSV is read as numbers at first: line, answers and the rest are as if it had been text throughout."""
    lines = [f"s{n % 50},{n / 7:.9f},{n % 13 / 7:.9f},{-n % 11:.9f}" for n in range(120_000)]
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    good.write_text("\n".join(["key,u,v,w", *lines]))
    assert good.stat().st_size > files.BLOCK_BYTES
    want = score(good, "lstm", tmp_path / "want.parquet", "--key", "key")
    cells = lines[-30].split(",")
    lines[-30] = ",".join([cells[0], "abc", *cells[2:]])
    lines.append(lines[-1].replace("s49", "s7"))
    bad.write_text("\n".join(["key,u,v,w", *lines]))
    capsys.readouterr()
    got = score(bad, "lstm", tmp_path / "got.parquet", "--key", "key", "--skip-bad-rows")
    assert "bad.csv:119972: column 'u' has 'abc', wanted a number" in capsys.readouterr().err
    assert got["step"].to_pylist()[119_970] is None
    for name in ("u", "v"):  # the other sessions, before it and after
        others = np.arange(120_000) % 50 != 119_970 % 50
        np.testing.assert_array_equal(got[name].to_numpy()[:120_000][others], want[name].to_numpy()[others])
    bad.write_text("\n".join(["key,u,v,w", *lines, "s1,1,2"]))
    says = refused(capsys, bad, "lstm", tmp_path / "never.csv", "--key", "key", "--skip-bad-rows")
    assert "bad.csv:120003: Expected 4 columns, got 3: s1,1,2. Mend this row." in says


def test_a_row_off_the_grid_is_refused_unless_any_time_will_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's step is an hour: a row half an hour later is none, two hours later is a gap."""
    cells = {"station": "Brae", "u": 1.0, "price": 2.0}
    rows = [{"key": "a", "when": START + timedelta(hours=hour), **cells} for hour in (0, 2, 2.5)]
    table, options = write(tmp_path / "in.csv", rows), ("--time", "when", "--key", "key", "--known-in-row")
    says = refused(capsys, table, "covariates", tmp_path / "out.csv", *options)
    assert "in.csv:4: session 'a' at 2026-03-08T06:30:00Z, which is not on its grid of 1:00:00" in says
    got = score(table, "covariates", tmp_path / "out.csv", *options, "--any-time", "--force")
    assert got["step"].to_pylist() == [1, 2, 3]


GOOD = TEXT.encode()


@pytest.mark.parametrize(
    ("name", "data", "options", "says"),
    [
        ("in.csv", b"", (), "in.csv: no CSV that can be read (Empty CSV file)"),
        ("in.csv", b"key,u,v,w\n", (), "in.csv: no row"),
        ("in.csv", b"key,u,v\na,1,2\n", (), "no column 'w' among key, u, v; model 'lstm' was trained"),
        ("in.csv", b"u;v;w\n1;2;3\n", (), "no column 'u', 'v', 'w' among u;v;w"),
        ("in.csv", b"u,v,w,w\n1,2,3,4\n", (), "2 columns are called 'w'"),
        ("in.csv", GOOD, ("--key", "kay"), "no column 'kay' (nearest: 'key') among"),
        ("in.csv", GOOD, ("--column", "uu=key"), "model 'lstm' has no such feature. The nearest is 'u'."),
        ("in.csv", GOOD, ("--column", "u"), "--column 'u': want FEATURE=COLUMN"),
        ("in.csv", GOOD, ("--keep", "u"), "column 'u' of the table has the name of an output. Say --prefix"),
        ("in.csv", GOOD, ("--model", "lstn"), "has no model 'lstn'. The nearest is 'lstm'."),
        ("in.csv", GOOD, ("--model", "bidirectional"), "reads sequences from both ends"),
        ("in.csv", GOOD, ("--version", 7), "no version 7 of model 'lstm'"),
        ("in.csv", GOOD, ("--out", "here.xlsx"), "want a file called .csv, .parquet or .pq"),
        ("in.csv", GOOD, ("--continue",), "--continue goes on from the sessions of a store. Name it: --store URL"),
        ("in.csv", GOOD, ("--store", "memory://"), "--store memory:// ends with this command"),
        ("in.csv", GOOD, ("--out", "/nowhere/at/all.csv"), "all.csv.unfinished: cannot be made (No such file"),
        ("in.csv", GOOD, ("--session", "a b"), "session id 'a b' is not 1 to 256"),
        ("in.csv", GOOD, ("--mask", "key"), "in.csv:2: column 'key' has 'a', wanted 0 or 1"),
        ("in.csv", b"\x1f\x8b\x08" + bytes(range(256)) * 4, (), "in.csv"),
        ("in.parquet", GOOD, (), "in.parquet: no Parquet file that can be read"),
        ("in.parquet", b"PAR1" + bytes(64) + b"PAR1", (), "in.parquet: no Parquet file that can be read"),
        ("in.xlsx", GOOD, (), "in.xlsx: want a file of .csv, .parquet, .pq, or a directory of them"),
    ],
)
def test_an_odd_file_or_option_is_one_line(
    name: str, data: bytes, options: tuple[object, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong, and what is nearest."""
    table = tmp_path / name
    table.write_bytes(data)
    assert says in refused(capsys, table, "lstm", tmp_path / "out.csv", *options)


def test_no_bytes_make_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A good file with bytes of it changed at random: it is stepped, or refused in one line."""
    random, out = Random(5), tmp_path / "out.csv"
    manifest = read_manifest(MODELS / "lstm" / "1")
    parquet_bytes = write(tmp_path / "in.parquet", rows_of(manifest, inputs(manifest, (9, 9)))).read_bytes()
    for name, good in (("in.csv", GOOD), ("in.parquet", parquet_bytes)):
        for _ in range(12):
            data = bytearray(good)
            for _ in range(random.choice((1, 3, 9))):
                data[random.randrange(len(data))] = random.randrange(256)
            (tmp_path / name).write_bytes(data)
            words = [
                "score",
                tmp_path / name,
                "--model",
                "lstm",
                "--models",
                MODELS,
                "--out",
                out,
                "--key",
                "key",
                "--force",
            ]
            assert main([str(word) for word in words]) in (0, 1, 2)
            assert capsys.readouterr().err.count("\n") <= 1


def test_a_run_that_is_under_way_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second process with the same output is refused, as is a table that is to be its own output."""
    table, out = tmp_path / "in.csv", tmp_path / "out.csv"
    table.write_bytes(GOOD)
    (tmp_path / "out.csv.unfinished").mkdir()
    scratch = Scratch(tmp_path / "out.csv.unfinished" / "progress.db", "another plan", b"n" * 16)
    assert "progress.db: cannot be used (database is locked)" in refused(capsys, table, "lstm", out, "--key", "key")
    scratch.close()
    assert "is the table itself" in refused(capsys, table, "lstm", table, "--force")


def test_an_output_that_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless that is asked for; a run of other options does not go on from an unfinished one."""
    table, out = tmp_path / "in.csv", tmp_path / "out.csv"
    table.write_bytes(GOOD)
    score(table, "lstm", out, "--key", "key")
    assert "is there already. Write over it by --force." in refused(capsys, table, "lstm", out, "--key", "key")
    score(table, "lstm", out, "--key", "key", "--force")
    out.unlink()
    table.write_bytes(GOOD + b"a,,,,\n")
    refused(capsys, table, "lstm", out, "--key", "key")
    assert "is of an unfinished run with other files" in refused(capsys, table, "gru", out, "--key", "key")
    score(table, "lstm", out, "--key", "key", "--skip-bad-rows")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]
