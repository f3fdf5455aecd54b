"""Delimited sequence files: the arrays and masks of DL4J's documents by value, and an error for all that is wrong."""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stepcast.errors import ConfigError
from stepcast.manifest import Feature, Output
from training.data.align import align, one_hot
from training.data.batch import Batch
from training.data.csv_file import read_csv
from training.data.csv_sequences import CsvSequences, CsvSequencesConfig
from training.data.in_memory import Examples, InMemory
from training.data.moments import Moments
from training.data.numbered import globbed_files, numbered_files
from training.data.plan import epoch_order, plan_batches
from training.data.python_class import PythonConfig
from training.data.source import Source

Rows = Sequence[Sequence[float | str]]
Write = Callable[[str, Rows], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file with a header row."""

    def _write(name: str, rows: Rows, header: str = "# header\n") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + "".join(",".join(map(str, row)) + "\n" for row in rows))
        return path

    return _write


def ramp(example: int, steps: int, columns: int = 3) -> list[list[float]]:
    """100 per example, 10 per step, 1 per column: every value says where it came from."""
    return [[100 * example + 10 * step + column for column in range(columns)] for step in range(steps)]


def opened(root: Path, *, batch: int = 10, seed: int = 1, **keys: Any) -> CsvSequences:
    """Open `x_%d.csv` and `y_%d.csv`, numbers 0 to 2 unless told otherwise."""
    files = {"features": "x_%d.csv", "labels": "y_%d.csv", "numbers": (0, 2)}
    settings = {"kind": "csv_sequences", "task": "regression", "skip_rows": 1, "train": files, "test": files}
    config = CsvSequencesConfig.model_validate({**settings, **keys})
    return config.open(batch=batch, seed=seed, root=root)


def only(source: Source) -> Batch:
    """The one batch of the test split, which keeps its order."""
    (batch,) = source.batches("test")
    return batch


def test_equal_length_regression_keeps_every_number_and_has_no_masks(tmp_path: Path, write: Write) -> None:
    """The documents' first example: files with a header, labels beside them, one length."""
    for number in range(3):
        write(f"x_{number}.csv", ramp(number, 4))
        write(f"y_{number}.csv", ramp(number, 4, columns=2))
    batch = only(opened(tmp_path))
    assert batch.x.tolist() == [ramp(number, 4) for number in range(3)]
    assert batch.y.tolist() == [ramp(number, 4, columns=2) for number in range(3)]
    assert (batch.x_mask, batch.y_mask, batch.starts) == (None, None, None)
    assert batch.x.dtype == batch.y.dtype == torch.float32


def test_class_index_becomes_one_hot_when_labels_are_classes(tmp_path: Path, write: Write) -> None:
    """The documents' '2' to [0,0,1,0]."""
    for number, classes in enumerate([(2, 0), (1, 3), (3, 2)]):
        write(f"x_{number}.csv", ramp(number, 2))
        write(f"y_{number}.csv", [[index] for index in classes])
    source = opened(tmp_path, task="classification", classes=4)
    assert only(source).y.tolist() == [
        [[0, 0, 1, 0], [1, 0, 0, 0]],
        [[0, 1, 0, 0], [0, 0, 0, 1]],
        [[0, 0, 0, 1], [0, 0, 1, 0]],
    ]
    assert source.classes == ("0", "1", "2", "3")
    assert [output.name for output in source.outputs] == ["0", "1", "2", "3"]
    assert source.readout == "each"


def test_class_names_are_read_where_classes_names_them(tmp_path: Path, write: Write) -> None:
    """In label files and in label columns, beside indices; an empty one is missing, blanks do not matter."""
    for number, labels in enumerate([("storm_1", 0), (" calm ", "nan"), ("", "storm_1")]):
        write(f"x_{number}.csv", ramp(number, 2))
        write(f"y_{number}.csv", [[label] for label in labels])
        write(f"both_{number}.csv", [[7, 8, label] for label in labels])
    classes = {"task": "classification", "classes": ("calm", "storm_1")}
    files = {"features": "both_%d.csv", "numbers": (0, 2)}
    apart = only(opened(tmp_path, **classes))
    together = only(opened(tmp_path, **classes, train=files, test=files, label_columns=(-1,)))
    for batch in (apart, together):
        assert batch.y_mask is not None
        assert batch.y_mask.tolist() == [[True, True], [True, False], [False, True]]
        assert batch.y[batch.y_mask].tolist() == [[0, 1], [1, 0], [1, 0], [0, 1]]
    assert together.x.tolist() == [[[7, 8], [7, 8]]] * 3


@pytest.mark.parametrize(
    ("classes", "row", "message"),
    [
        (("calm", "storm"), [1, "strom"], "line 3, column 2: 'strom' is no class (nearest: 'storm'), wanted one of"),
        (("calm", "storm"), ["calm", "storm"], "line 3, column 1: 'calm' is not a finite float32 number"),
        (2, [1, "storm"], "line 3, column 2: 'storm' is not a finite float32 number"),
        (("calm", "storm"), [1, 2], "line 3: class 2, wanted an index in 0..1"),
    ],
)
def test_a_name_that_no_class_has_is_refused(
    tmp_path: Path, write: Write, classes: Any, row: list[Any], message: str
) -> None:
    """With file, line and column; names stand in label columns alone, and only where classes have names."""
    path = write("x_0.csv", [[1, 0], row])
    files = {"features": "x_%d.csv", "numbers": (0, 0)}
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, task="classification", classes=classes, label_columns=(1,), train=files, test=files)
    assert f"{path}, {message}" in str(caught.value)


def test_label_column_is_cut_out_when_one_file_has_both(tmp_path: Path, write: Write) -> None:
    """The documents' second example: labels in column 1, and the other columns keep their order."""
    for number in range(3):
        write(f"x_{number}.csv", [[7, 2, 9], [8, 0, 10]])
    files = {"features": "x_%d.csv", "numbers": (0, 2)}
    keys = {"train": files, "test": files, "label_columns": (1,)}
    batch = only(opened(tmp_path, task="classification", classes=("a", "b", "c"), **keys))
    assert batch.x[0].tolist() == [[7, 9], [8, 10]]
    assert batch.y[0].tolist() == [[0, 0, 1], [1, 0, 0]]
    last = only(opened(tmp_path, **{**keys, "label_columns": (-1, 0)}))
    assert last.x[0].tolist() == [[2], [0]]
    assert last.y[0].tolist() == [[9, 7], [10, 8]]


def test_align_start_pads_behind_and_masks_both_sides(tmp_path: Path, write: Write) -> None:
    """Many-to-many with lengths 4, 2, 3: padding is at the end, masks say where."""
    for number, steps in enumerate([4, 2, 3]):
        write(f"x_{number}.csv", ramp(number, steps, columns=1))
        write(f"y_{number}.csv", ramp(number, steps, columns=1))
    for alignment in ("start", "end"):  # the documents: identical if an example's two sequences are equally long
        batch = only(opened(tmp_path, alignment=alignment))
        expected = [[0, 10, 20, 30], [100, 110, 0, 0], [200, 210, 220, 0]]
        mask = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
        assert batch.x[..., 0].tolist() == batch.y[..., 0].tolist() == expected
        assert batch.x_mask is not None
        assert batch.y_mask is not None
        assert batch.x_mask.int().tolist() == batch.y_mask.int().tolist() == mask


def test_align_end_puts_the_single_label_at_each_last_step(tmp_path: Path, write: Write) -> None:
    """Many-to-one: the label stands where its own sequence ends, not where the batch does."""
    for number, steps in enumerate([4, 2, 3]):
        write(f"x_{number}.csv", ramp(number, steps, columns=1))
        write(f"y_{number}.csv", [[number]])
    source = opened(tmp_path, task="classification", classes=3, alignment="end")
    batch = only(source)
    nothing = [0, 0, 0]
    assert batch.y.tolist() == [
        [nothing, nothing, nothing, [1, 0, 0]],
        [nothing, [0, 1, 0], nothing, nothing],
        [nothing, nothing, [0, 0, 1], nothing],
    ]
    assert batch.x_mask is not None
    assert batch.y_mask is not None
    assert batch.x_mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.y_mask.int().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert source.readout == "last"


def test_long_side_gets_no_mask_when_all_of_its_sequences_fill_the_batch() -> None:
    """DL4J's rule; only labels beside masked features say in so many words that all of them are there."""
    x = [np.ones((3, 1), np.float32)] * 2
    y = [np.ones((1, 1), np.float32)] * 2
    batch = align(x, y, "end")
    assert batch.x_mask is None
    assert batch.y_mask is not None
    assert batch.y_mask.int().tolist() == [[0, 0, 1], [0, 0, 1]]
    one_to_many = align(y, x, "start")
    assert one_to_many.x_mask is not None
    assert one_to_many.y_mask is not None
    assert one_to_many.x_mask.int().tolist() == [[1, 0, 0], [1, 0, 0]]
    assert one_to_many.y_mask.int().tolist() == [[1, 1, 1], [1, 1, 1]]


def test_align_end_moves_the_shorter_features_when_labels_are_longer() -> None:
    """Within an example the ends meet; padding to the batch's length still goes behind."""
    x = [np.array([[1], [2]], np.float32), np.array([[3], [4], [5], [6]], np.float32)]
    y = [np.array([[7], [8], [9]], np.float32), np.array([[5]], np.float32)]
    batch = align(x, y, "end")
    assert batch.x[..., 0].tolist() == [[0, 1, 2, 0], [3, 4, 5, 6]]
    assert batch.y[..., 0].tolist() == [[7, 8, 9, 0], [0, 0, 0, 5]]
    assert batch.x_mask is not None
    assert batch.y_mask is not None
    assert batch.x_mask.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.y_mask.int().tolist() == [[1, 1, 1, 0], [0, 0, 0, 1]]


def test_missing_label_masks_its_step_or_only_its_output() -> None:
    """NaN labels never reach a loss: the mask takes them out, the array has 0."""
    nan = np.nan
    x = [np.ones((3, 1), np.float32)]
    whole = align(x, [np.array([[1, 2], [nan, nan], [5, 6]], np.float32)], "equal_length")
    assert whole.y.tolist() == [[[1, 2], [0, 0], [5, 6]]]
    assert whole.y_mask is not None
    assert whole.y_mask.tolist() == [[True, False, True]]
    single = align(x, [np.array([[1, 2], [nan, 4], [5, 6]], np.float32)], "equal_length")
    assert single.y_mask is not None
    assert single.y_mask.tolist() == [[[True, True], [False, True], [True, True]]]


def test_missing_class_is_an_unlabelled_step(tmp_path: Path, write: Write) -> None:
    """An empty label field is no class, and no error."""
    for number in range(3):
        write(f"x_{number}.csv", ramp(number, 3))
        write(f"y_{number}.csv", [[0], ["nan"], [1]])
    batch = only(opened(tmp_path, task="classification", classes=2))
    assert batch.y_mask is not None
    assert batch.y_mask.tolist() == [[True, False, True]] * 3
    assert batch.y[0].tolist() == [[1, 0], [0, 0], [0, 1]]


def test_batches_cover_every_sequence_once_and_the_last_is_small(tmp_path: Path, write: Write) -> None:
    """Ten files in batches of four: 4, 4 and 2; another order each epoch, the same one for the same seed and epoch."""
    for number in range(10):
        write(f"x_{number}.csv", [[number]])
        write(f"y_{number}.csv", [[number]])
    files = {"features": "x_%d.csv", "labels": "y_%d.csv", "numbers": (0, 9)}
    source = opened(tmp_path, batch=4, train=files, test=files)
    epochs = [[batch.x[:, 0, 0].tolist() for batch in source.batches("train", epoch)] for epoch in (0, 1, 0)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    assert sorted(chain(*epochs[0])) == sorted(chain(*epochs[1])) == list(range(10))
    assert epochs[0] == epochs[2] != epochs[1]
    assert [x for batch in source.batches("test", 7) for x in batch.x[:, 0, 0].tolist()] == list(range(10))
    assert list(source.batches("validation")) == []


def test_files_are_read_when_their_batch_comes(tmp_path: Path, write: Write) -> None:
    """Nothing is kept: what changed on disk since is what the next batch has."""
    for number in range(3):
        write(f"x_{number}.csv", [[number]])
        write(f"y_{number}.csv", [[number]])
    source = opened(tmp_path, batch=1)
    batches = source.batches("test")
    assert next(batches).x.item() == 0
    write("x_1.csv", [[77]])
    assert next(batches).x.item() == 77


def test_normalisation_counts_present_values_of_the_train_split_only(tmp_path: Path, write: Write) -> None:
    """Population deviation; a constant column gets scale 1; a missing value does not count."""
    write("x_0.csv", [[1, 5], ["", 5], [3, 5]])
    write("y_0.csv", [[10]])
    write("x_1.csv", [[1000, 5]])
    write("y_1.csv", [[1000]])
    names = {"features": "x_%d.csv", "labels": "y_%d.csv"}
    splits = {"train": {**names, "numbers": (0, 0)}, "test": {**names, "numbers": (1, 1)}}
    source = opened(tmp_path, missing="mean", alignment="end", **splits)
    assert [(f.mean, f.scale, f.missing) for f in source.features] == [(2, 1, "mean"), (5, 1, "mean")]
    assert [(o.mean, o.scale) for o in source.outputs] == [(10, 1)]
    plain = opened(tmp_path, missing="zero", alignment="end", normalise="none", normalise_labels="none", **splits)
    assert [(f.mean, f.scale) for f in plain.features] == [(0, 1), (0, 1)]
    assert torch.isnan(next(plain.batches("train")).x[0, 1, 0])


def test_moments_merge_to_what_numpy_says_when_means_are_large() -> None:
    """Three uneven parts with missing values, and a mean a million times the deviation."""
    values = np.random.default_rng(3).normal([1e6, -3.0], [1.0, 1e-3], (1000, 2))
    values[::7, 0] = np.nan
    moments = Moments(2)
    for part in (values[:1], values[1:400], values[400:]):
        moments.update(part)
    means, scales = zip(*moments.normalisation("standard"), strict=True)
    np.testing.assert_allclose(means, np.nanmean(values, axis=0), rtol=1e-12)
    np.testing.assert_allclose(scales, np.nanstd(values, axis=0), rtol=1e-9)
    lows, ranges = zip(*moments.normalisation("min_max"), strict=True)
    np.testing.assert_array_equal(lows, np.nanmin(values, axis=0))
    np.testing.assert_array_equal(ranges, np.nanmax(values, axis=0) - np.nanmin(values, axis=0))


def test_bucketing_keeps_lengths_together_and_loses_nothing() -> None:
    """Padding falls to a fraction of what random batches have, every index comes once, epochs differ."""
    lengths = np.random.default_rng(0).integers(1, 200, 512).tolist()

    def padded(bucket: int) -> int:
        plan = list(plan_batches(lengths, 16, bucket=bucket, order=epoch_order(1, 0)))
        assert sorted(np.concatenate(plan)) == list(range(512))
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in plan)

    assert sum(lengths) <= padded(16) < 1.15 * sum(lengths) < 1.5 * padded(16) < padded(0)
    first, second = (
        [batch.tolist() for batch in plan_batches(lengths, 16, bucket=16, order=epoch_order(1, epoch))]
        for epoch in (0, 1)
    )
    assert first != second
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_numbered_pattern_pads_with_zeros_and_both_ends_count(tmp_path: Path) -> None:
    """%03d is 007; a gap in the numbers is found before anything is read."""
    for number in (7, 8, 9):
        (tmp_path / f"in_{number:03d}.csv").write_text("1\n")
    names = [path.name for path in numbered_files("in_%03d.csv", (7, 9), tmp_path)]
    assert names == ["in_007.csv", "in_008.csv", "in_009.csv"]
    with pytest.raises(ConfigError, match=r"in_010\.csv: no such file \(2 of 5 missing"):
        numbered_files("in_%03d.csv", (7, 11), tmp_path)
    for pattern, places in (("in.csv", 0), ("%d_%d.csv", 2)):
        with pytest.raises(ConfigError, match=f"{places} places for a number"):
            numbered_files(pattern, (0, 1), tmp_path)


def test_glob_sorts_numbers_as_numbers_and_pairs_by_name(tmp_path: Path, write: Write) -> None:
    """x_9 comes before x_10, and a label file that belongs to another sequence is refused."""
    for number in (9, 10, 2):
        write(f"in/x_{number}.csv", [[number]])
        write(f"out/y_{number}.csv", [[number]])
    assert [path.name for path in globbed_files("in/x_*.csv", tmp_path)] == ["x_2.csv", "x_9.csv", "x_10.csv"]
    assert len(globbed_files(str(tmp_path / "in" / "*.csv"), Path("/"))) == 3
    files = {"features": "in/x_*.csv", "labels": "out/y_*.csv"}
    assert only(opened(tmp_path, train=files, test=files)).y.flatten().tolist() == [2, 9, 10]
    (tmp_path / "out" / "y_9.csv").rename(tmp_path / "out" / "y_8.csv")
    with pytest.raises(ConfigError, match=r"x_9\.csv and .*y_8\.csv have the same place in their lists, but not"):
        opened(tmp_path, train=files, test=files)
    (tmp_path / "out" / "y_8.csv").unlink()
    with pytest.raises(ConfigError, match=r"3 files match 'in/x_\*.csv', but 2 match 'out/y_\*.csv'"):
        opened(tmp_path, train=files, test=files)
    with pytest.raises(ConfigError, match="'nothing/\\*' matches no file"):
        globbed_files("nothing/*", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", r"line 3: 1 columns, line 2 has 2"),
        ("a,b\n1,2\n3,4,5\n", r"line 3: 3 columns, line 2 has 2"),
        ("a,b\n1,2\n3,x4\n", r"line 3, column 2: 'x4' is not a finite float32 number"),
        ("a,b\n1,2\n-inf,4\n", r"line 3, column 1: '-inf' is not"),
        ("a,b\n1,2\n3,1e39\n", r"line 3, column 2: '1e39' is not"),
        ("a,b\n1_0,2\n", r"line 2, column 1: '1_0' is not"),
        ("a,b\n1,2\n\n3,4\n", r"line 3: 1 columns, line 2 has 2"),
        ("a,b\n\n", r"no steps \(a sequence of length zero\) after skip_rows 1"),
        ("", r"no steps"),
    ],
)
def test_bad_file_is_refused_with_file_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    """Where DL4J leaves zeros, runs over the end of an array or goes on, here is the place."""
    path = tmp_path / "one.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"one\.csv.*{message}"):
        read_csv(path, skip_rows=1)


def test_literal_delimiters_marks_and_blanks_are_read(tmp_path: Path) -> None:
    """'|' is an alternative in a regular expression and a character here; empty is missing; a BOM is no data."""
    path = tmp_path / "one.csv"
    path.write_bytes("\ufeff1| 2 |\r\n3||nan\r\n\r\n".encode())
    values = read_csv(path, delimiter="|")
    np.testing.assert_array_equal(values, [[1, 2, np.nan], [3, np.nan, np.nan]])
    path.write_text("1::2\n3::4\n")
    np.testing.assert_array_equal(read_csv(path, delimiter="::"), [[1, 2], [3, 4]])
    path.write_bytes(b"\xff\xfe1")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_csv(path)


@pytest.mark.parametrize(
    ("x", "y", "keys", "message"),
    [
        (
            [[1]],
            [[-1]],
            {"task": "classification", "classes": 2},
            r"y_2\.csv, line 2: class -1, wanted an index in 0..1",
        ),
        ([[1]], [[2]], {"task": "classification", "classes": 2}, r"y_2\.csv, line 2: class 2, wanted"),
        ([[1]], [[0.5]], {"task": "classification", "classes": 2}, r"y_2\.csv, line 2: class 0.5, wanted"),
        ([[1]], [[0, 1]], {"task": "classification", "classes": 2}, r"y_2\.csv: 2 label columns"),
        ([[1, 2]], [[0]], {}, r"x_2\.csv: 2 columns, .*x_0\.csv has 1"),
        ([[1]], [[0, 3]], {}, r"y_2\.csv: 2 columns, .*y_0\.csv has 1"),
        ([[1], [2]], [[0], [0]], {}, r"x_2\.csv: 2 steps, .*x_0\.csv has 1\. Set data.alignment"),
        ([[1]], [[0], [0]], {}, r"y_2\.csv: 2 steps, .*x_0\.csv has 1\. Set data.alignment"),
        ([["nan"]], [[0]], {}, r"x_2\.csv, line 2, column 1: a missing value\. Set data.missing"),
        ([[1]], [[0]], {"feature_names": ("a", "b")}, r"data.feature_names has 2 names, the files have 1 columns"),
        ([[1]], [[0]], {"output_names": ("a", "b")}, r"data.output_names has 2 names, the files have 1 columns"),
    ],
)
def test_contradiction_is_refused_when_the_source_opens(
    tmp_path: Path, write: Write, x: Rows, y: Rows, keys: dict[str, Any], message: str
) -> None:
    """The third of three sequences is wrong; training never starts."""
    for number in range(2):
        write(f"x_{number}.csv", [[1]])
        write(f"y_{number}.csv", [[0]])
    write("x_2.csv", x)
    write("y_2.csv", y)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, **keys)


@pytest.mark.parametrize(
    ("columns", "message"),
    [((3,), r"3 columns, data.label_columns is \[3\]"), ((0, -3), "names a column twice"), ((0, 1, 2), "leaves no")],
)
def test_label_columns_have_to_be_there(tmp_path: Path, write: Write, columns: tuple[int, ...], message: str) -> None:
    """Out of range, named twice, or all of them."""
    write("x_0.csv", [[1, 2, 3]])
    files = {"features": "x_%d.csv", "numbers": (0, 0)}
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, train=files, test=None, label_columns=columns)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task": "classification"}, "'classes' belongs to tasks 'classification' and 'multi_label'"),
        ({"classes": 3}, "'classes' belongs to tasks 'classification' and 'multi_label'"),
        (
            {"task": "classification", "classes": 2, "output_names": ["a"]},
            "'output_names' belongs to task 'regression'",
        ),
        ({"label_columns": [0]}, "train: give either 'labels' or 'label_columns'"),
        ({"train": {"features": "x_%d.csv", "numbers": [0, 1]}}, "train: give either 'labels' or 'label_columns'"),
        ({"train": {"features": "x_%d", "labels": "y_%d", "numbers": [2, 1]}}, "run backwards"),
        ({"delimiter": ""}, "delimiter"),
        ({"alignement": "start"}, "Extra inputs are not permitted"),
    ],
)
def test_configuration_that_contradicts_itself_is_refused(keys: dict[str, Any], message: str) -> None:
    """Found when the YAML is read, before any file is."""
    files = {"features": "x_%d.csv", "labels": "y_%d.csv", "numbers": [0, 1]}
    with pytest.raises(ValidationError, match=message):
        CsvSequencesConfig.model_validate({"kind": "csv_sequences", "task": "regression", "train": files, **keys})


def test_align_and_one_hot_refuse_what_they_cannot_represent() -> None:
    """For those who call them from a Python source."""
    step = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="2 feature sequences, but 1 label"):
        align([step, step], [step], "start")
    with pytest.raises(ValueError, match="example 1 has no steps"):
        align([step, step], [step, step[:0]], "end")
    with pytest.raises(ValueError, match="example 0 has 1 feature and 2 label steps"):
        align([step], [np.ones((2, 1), np.float32)], "equal_length")
    with pytest.raises(ValueError, match=r"class index -1 at step 1 is not in 0\.\.2"):
        one_hot(np.array([0, -1]), 3)
    with pytest.raises(ValueError, match=r"class index 3 at step 0"):
        one_hot(np.array([3]), 3)


class Doubling(InMemory):
    """A Python source as a user would write it: x, and twice x."""

    def __init__(self, *, batch: int, seed: int, root: Path, steps: int = 3) -> None:
        x = np.arange(steps, dtype=np.float32)[:, None]
        super().__init__(
            splits={"train": Examples([x], [2 * x])},
            features=(Feature(name="x"),),
            outputs=(Output(name="twice"),),
            task="regression",
            batch=batch,
            seed=seed,
        )


class Lacking:
    """Not a source: it has no batches."""

    def __init__(self, *, batch: int, seed: int, root: Path) -> None:
        self.features = ()


def test_python_class_is_opened_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any importable class that gives what `Source` says."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = PythonConfig.model_validate(
        {"kind": "python", "class": "test_csv_sequences:Doubling", "options": {"steps": 2}}
    )
    source = config.open(batch=1, seed=0, root=Path())
    (batch,) = source.batches("train")
    assert batch.y.tolist() == [[[0], [2]]]
    assert list(source.batches("test")) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_csv_sequences:Nothing", {}, "'test_csv_sequences:Nothing' cannot be imported"),
        ("no_such_module:Nothing", {}, "No module named 'no_such_module'"),
        ("test_csv_sequences:Doubling", {"stepps": 2}, "does not take them .*stepps"),
        ("test_csv_sequences:Doubling", {"seed": 2}, "data.options.seed: is given by the trainer"),
        ("test_csv_sequences:Lacking", {}, "is no data source, it lacks .*batches.*outputs"),
    ],
)
def test_python_class_that_is_no_source_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], message: str
) -> None:
    """The message says which key, and what is missing."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = PythonConfig.model_validate({"kind": "python", "class": name, "options": options})
    with pytest.raises(ConfigError, match=message):
        config.open(batch=1, seed=0, root=Path())
