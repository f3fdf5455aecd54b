"""Long tables for the tests of `stepcast score`, and what the command makes of them."""

import csv
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv as arrow_csv
from pyarrow import parquet
from serving import MODELS

from service.__main__ import main
from stepcast.manifest import Manifest

RTOL, ATOL = 1e-4, 1e-5
START = datetime(2026, 3, 8, 4, tzinfo=UTC)
Rows = list[dict[str, Any]]


def score(data: Path, model: str, out: Path, *options: object, models: Path = MODELS) -> pa.Table:
    """What the command makes of a table."""
    arguments = ["score", data, "--model", model, "--models", models, "--out", out, *options]
    assert main([str(word) for word in arguments]) == 0
    return arrow_csv.read_csv(out) if out.suffix == ".csv" else parquet.read_table(out)


def refused(capsys: pytest.CaptureFixture[str], data: Path, model: str, out: Path, *options: object) -> str:
    """The line that the command ends with."""
    arguments = ["score", data, "--model", model, "--models", MODELS, "--out", out, *options]
    assert main([str(word) for word in arguments]) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert "\n" not in said, said
    return said


def inputs(manifest: Manifest, counts: Sequence[int], seed: int = 1) -> dict[str, np.ndarray]:
    """Sessions of so many steps, [T,F] each; gaps where the model takes them."""
    random = np.random.default_rng(seed)
    made = {}
    for place, count in enumerate(counts):
        x = random.normal(size=(count, manifest.n_features)).astype(np.float32)
        if manifest.name == "embedding":
            x = random.integers(0, 4, size=x.shape).astype(np.float32)
        holes = np.repeat([f.missing != "refuse" for f in manifest.features], [f.width for f in manifest.features])
        x[(random.random(x.shape) < 0.2) & holes] = np.nan
        made[f"s{place}"] = x
    return made


def rows_of(manifest: Manifest, sessions: dict[str, np.ndarray], order: str = "time") -> Rows:
    """The rows of a long table, sorted by key, by time, or by a seed's chance within that."""
    slices = manifest.feature_slices()
    rows = []
    for key, x in sessions.items():
        for step, values in enumerate(x):
            cells = {name: values[cut].tolist() for name, cut in slices.items()}
            plain = {name: cell[0] if len(cell) == 1 else cell for name, cell in cells.items()}
            named = {name: None if cell != cell else cell for name, cell in plain.items()}
            rows.append({"key": key, "when": START + timedelta(hours=step), "n": step, **named})
    if order != "key":
        rows.sort(key=lambda row: row["when"])
    return rows


def write(path: Path, rows: Rows, **parquet_options: Any) -> Path:
    """A table as a file of either kind."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {k: v.isoformat() if isinstance(v, datetime) else v for k, v in row.items()} for row in rows
            )
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path, **parquet_options)
    return path


def by_session(table: pa.Table, manifest: Manifest) -> dict[str, tuple[list[int | None], np.ndarray]]:
    """Step numbers and outputs [T,O] of each session."""
    names = manifest.classes or [output.name for output in manifest.outputs]
    y = np.stack([table[name].to_numpy() for name in names], axis=1).astype(np.float64)
    found: dict[str, tuple[list[int | None], np.ndarray]] = {}
    keys = np.array(table["key"].to_pylist())
    for key in dict.fromkeys(keys):
        here = keys == key
        found[key] = [step for step, mine in zip(table["step"].to_pylist(), here, strict=True) if mine], y[here]
    return found
