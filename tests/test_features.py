"""Names to positions and back, by value; every mistake in names is told at once."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from stepcast.errors import InvalidRequest, ShapeMismatch
from stepcast.features import FeatureNames, as_floats
from stepcast.inputs import form, rows
from stepcast.manifest import Feature, Manifest, Output

pytestmark = pytest.mark.service

NAN = float("nan")


def names(classes: tuple[str, ...] | None = None) -> FeatureNames:
    """Features `a` (needed), `b` (may be missing) and `frame` of width 2 (may be missing); outputs `p`, `q`."""
    features = (Feature(name="a"), Feature(name="b", missing="mean"), Feature(name="frame", width=2, missing="zero"))
    outputs = tuple(Output(name=name) for name in ("p", "q"))
    task = "regression" if classes is None else "classification"
    manifest = Manifest.model_validate(
        {"name": "m", "version": 1, "features": features, "outputs": outputs, "task": task, "classes": classes,
         "sha256": "0" * 64}
    )  # fmt: skip
    return FeatureNames(manifest)


@pytest.mark.parametrize(
    ("named", "array"),
    [
        ({"a": 1, "b": 2.5}, [1, 2.5, NAN, NAN]),
        ({"b": None, "a": 1}, [1, NAN, NAN, NAN]),
        ({"a": None}, [NAN] * 4),
        ({"a": np.float32(1), "frame": [3, None]}, [1, NAN, 3, NAN]),
        ({"a": 1, "frame": None}, [1, NAN, NAN, NAN]),
        ({"a": [1, 2], "b": [None, 4]}, [[1, NAN, NAN, NAN], [2, 4, NAN, NAN]]),
        ({"a": np.array([1, 2]), "frame": [[3, 4], [5, 6]]}, [[1, NAN, 3, 4], [2, NAN, 5, 6]]),
        ({"a": [[1, 2]], "b": [[3, 4]]}, [[[1, 3, NAN, NAN], [2, 4, NAN, NAN]]]),
        ([{"a": 1}, {"b": 3, "a": 2}], [[1, NAN, NAN, NAN], [2, 3, NAN, NAN]]),
        ([{"a": [1, 2]}], [[[1, NAN, NAN, NAN], [2, NAN, NAN, NAN]]]),
    ],
)
def test_names_become_positions(named: Any, array: Any) -> None:
    """Numbers, columns of examples, columns of steps, records, wide features; what is left out is missing."""
    x = names().array(named)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, np.array(array, np.float32))


def test_what_is_known_of_a_future_may_leave_out_anything() -> None:
    """`future` asks for no feature."""
    np.testing.assert_array_equal(names().array({"b": [1, 2]}, future=2)[:, :2], [[NAN, 1], [NAN, 2]])


def test_missing_names_are_all_told() -> None:
    """Those that the model needs, in the manifest's order, and in which record."""
    manifest = Manifest(
        name="m", version=1, task="regression", outputs=(Output(name="p"),), sha256="0" * 64,
        features=(Feature(name="a"), Feature(name="b"), Feature(name="c", missing="hold")),
    )  # fmt: skip
    with pytest.raises(InvalidRequest, match=r"inputs leaves out 'a', 'b'; model 'm' needs them") as caught:
        FeatureNames(manifest).array({})
    assert caught.value.facts["missing"] == ["a", "b"]
    with pytest.raises(InvalidRequest, match=r"\$\.inputs\[1\] leaves out 'b'"):
        FeatureNames(manifest).array([{"a": 1, "b": 2}, {"a": 1}])


def test_unknown_names_are_told_with_the_nearest() -> None:
    """All of them, and before the names that are missing because of them."""
    with pytest.raises(InvalidRequest) as caught:
        names().array({"A": 1, "fram": [1, 2], "zzz": 3})
    assert str(caught.value) == (
        "$.inputs names 'A' (nearest: 'a'), 'fram' (nearest: 'frame'), 'zzz'; model 'm' has 'a', 'b', 'frame'"
    )
    assert caught.value.facts["unknown"] == ["A", "fram", "zzz"]
    assert caught.value.facts["nearest"] == {"A": "a", "fram": "frame"}


@pytest.mark.parametrize(
    ("named", "error", "told"),
    [
        ({"a": [1, 2], "b": [3]}, ShapeMismatch, "'a' [2], 'b' [1]"),
        ({"a": 1, "frame": [1, 2, 3]}, ShapeMismatch, "$.inputs.frame has shape [3], want 2 values"),
        ({"a": [[[1]]]}, ShapeMismatch, "want numbers, [N] or [N,T]"),
        ([], ShapeMismatch, "at least one record"),
        ([{"a": 1}, {"a": [1, 2]}], ShapeMismatch, "records of shapes (), (2,)"),
        ({"a": "hot"}, InvalidRequest, "$.inputs.a: want numbers"),
        ({"a": [1, "2"]}, InvalidRequest, "$.inputs.a: want numbers"),
        ({"a": [None, "2"]}, InvalidRequest, "$.inputs.a: want numbers"),
        ({"a": [[1], [2, 3]]}, InvalidRequest, "$.inputs.a: want numbers"),
        ({"a": 10**400}, InvalidRequest, "$.inputs.a: want numbers"),
        ([{"a": 1}, 7], InvalidRequest, "$.inputs[1] is int"),
    ],
)
def test_what_is_no_reading_is_refused_with_its_place(named: Any, error: type[Exception], told: str) -> None:
    """A path, what came, what was wanted."""
    with pytest.raises(error) as caught:
        names().array(named)
    assert told in str(caught.value)


def test_what_float32_cannot_hold_becomes_infinite() -> None:
    """Quietly here: the server refuses it."""
    np.testing.assert_array_equal(as_floats([1e39, -1e39]), [np.inf, -np.inf])


def test_outputs_get_their_names() -> None:
    """Numbers of one example, columns of more; a classifier's with the likeliest class, "" where masked."""
    y = np.array([[0.25, 0.75], [0.5, NAN]], np.float32)
    assert names().named(y[0]) == {"p": 0.25, "q": 0.75}
    np.testing.assert_array_equal(names().named(y)["q"], np.float32([0.75, NAN]))
    classifier = names(classes=("calm", "storm"))
    assert classifier.named(y[0]) == {"class": "storm", "probabilities": {"calm": 0.25, "storm": 0.75}}
    assert classifier.named(y)["class"].tolist() == ["storm", ""]
    assert classifier.named(y[None])["probabilities"]["calm"].tolist() == [[0.25, 0.5]]


def test_outputs_come_in_the_form_of_the_inputs() -> None:
    """An array for an array, a list for records, a DataFrame for a DataFrame."""
    y = np.array([[1, 2], [3, 4]], np.float32)
    assert form(np.zeros((2, 4))).outputs(y, None) is y
    assert form([[0.0] * 4]).named is False
    assert form([{"a": 1}, {"a": 2}]).outputs(y, names()) == [{"p": 1.0, "q": 2.0}, {"p": 3.0, "q": 4.0}]
    frame = pd.DataFrame({"b": [1.0, None], "a": [3, 4], "frame": [[5, 6], [7, 8]]}, index=["x", "y"])
    np.testing.assert_array_equal(form(frame).array(names()), np.float32([[3, 1, 5, 6], [4, NAN, 7, 8]]))
    made = form(frame).outputs(y, names())
    pd.testing.assert_frame_equal(made, pd.DataFrame(y, index=["x", "y"], columns=["p", "q"]))
    classified = form(frame).outputs(y, names(classes=("calm", "storm")))
    assert list(classified.columns) == ["class", "calm", "storm"]
    assert classified["class"].tolist() == ["storm", "storm"]
    assert list(rows(frame[["a", "frame"]])) == [{"a": 3, "frame": [5, 6]}, {"a": 4, "frame": [7, 8]}]
    nullable = pd.DataFrame({"a": pd.array([1, None], "Int64"), "b": [None, 2.5]})
    np.testing.assert_array_equal(form(nullable).array(names())[:, :2], np.float32([[1, NAN], [NAN, 2.5]]))
    with pytest.raises(InvalidRequest, match=r"inputs\.a: want numbers"):
        form(pd.DataFrame({"a": ["1", "2"]})).array(names())
