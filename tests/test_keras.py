"""import of .keras files: Keras 3 makes them and the truth; hostile ones end in one line."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"  # read when keras is imported

import h5py
import keras
import numpy as np
import pytest
from pages import reading
from serving import ROOT

from service.engine.model import Runtime
from stepcast import imports
from stepcast.errors import ManifestError
from stepcast.manifest import Manifest, read_manifest

# Keras' own: its variables on torch have an __array__ of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

L = keras.layers
F, STEPS = 3, 6
Model = Any


def functional() -> Model:
    """A chain that was built by calling layers."""
    x = keras.Input((None, F))
    return keras.Model(x, L.Dense(2)(L.Dropout(0.5)(L.LSTM(4, return_sequences=True)(x))))


def stack(*layers: Any, features: int | None = F, steps: int | None = None) -> Model:
    """A Sequential; features None: of tokens."""
    return keras.Sequential([L.Input((steps,) if features is None else (steps, features)), *layers])


CASES: dict[str, Callable[[], Model]] = {
    "lstm": lambda: stack(L.LSTM(4, return_sequences=True), L.Dense(2)),
    "lstm-two-without-bias": lambda: stack(
        L.LSTM(4, return_sequences=True, use_bias=False), L.LSTM(3, return_sequences=True), L.Dense(2, use_bias=False)
    ),
    "lstm-last": lambda: stack(L.LSTM(4), L.Dense(3, activation="relu"), L.Dense(2, activation="softmax")),
    "lstm-alone": lambda: stack(L.LSTM(4)),
    "lstm-activations": lambda: stack(
        L.LSTM(4, activation="softsign", recurrent_activation="hard_sigmoid", return_sequences=True), L.Dense(2, "silu")
    ),
    "gru": lambda: stack(L.GRU(4, return_sequences=True), L.Dense(2, activation="gelu")),
    "gru-before": lambda: stack(
        L.GRU(4, reset_after=False, return_sequences=True), L.GRU(3, reset_after=False), L.Dense(1)
    ),
    "gru-before-hard": lambda: stack(
        L.GRU(4, reset_after=False, recurrent_activation="hard_sigmoid", return_sequences=True), L.Dense(2)
    ),
    "gru-without-bias": lambda: stack(L.GRU(4, use_bias=False, return_sequences=True), L.Dense(2)),
    "simple": lambda: stack(L.SimpleRNN(4, activation="relu", return_sequences=True), L.Activation("tanh")),
    "between": lambda: stack(
        L.Dense(5, activation=keras.activations.tanh),
        L.LayerNormalization(),
        L.GRU(4, return_sequences=True),
        L.LayerNormalization(center=False, epsilon=0.1),
        L.TimeDistributed(L.Dense(3, activation="elu")),
        L.SpatialDropout1D(0.2),
        L.ReLU(),
        L.Dense(2),
    ),
    "tokens": lambda: stack(L.Embedding(7, 5), L.LSTM(4, return_sequences=True), L.Dense(7, "softmax"), features=None),
    "fixed steps": lambda: stack(L.LSTM(4, return_sequences=True), L.Dense(2), steps=STEPS),
    "pooled": lambda: stack(L.LSTM(4, return_sequences=True), L.GlobalMaxPooling1D(), L.Dense(2)),
    "averaged": lambda: stack(L.SimpleRNN(4, return_sequences=True), L.GlobalAveragePooling1D(), L.Dense(2)),
    "functional": functional,
    **{
        f"both-{mode}": lambda mode=mode: stack(
            L.Bidirectional(L.LSTM(3, return_sequences=True), merge_mode=mode), L.Dense(2)
        )
        for mode in ("concat", "sum", "mul", "ave")
    },
    "both-last": lambda: stack(L.Bidirectional(L.GRU(3)), L.Dense(2, activation="sigmoid")),
}


def saved(model: Model, file: Path) -> Path:
    """Save a model whose every weight, biases included, is random."""
    random = np.random.default_rng(4)
    model.set_weights([random.normal(scale=0.5, size=weight.shape) for weight in model.get_weights()])
    model.save(file)
    return file


def taken(file: Path, models: Path) -> tuple[Runtime, Manifest]:
    """Import a file by its content, as the command does."""
    assert imports.run([str(file), "--name", "m", "--models", str(models)], "stepcast") == 0
    runtime = Runtime(models / "m" / "1", device="cpu")
    runtime.prove()
    runtime.quicken()
    return runtime, runtime.manifest


def answers(model: Model, x: Any) -> Any:
    """Keras' own answers (B, T, O), or (B, O)."""
    tokens = len(model.input_shape) == 2
    return keras.ops.convert_to_numpy(model(x[..., 0] if tokens else x, training=False))


@pytest.mark.parametrize("case", CASES)
def test_answers_are_keras_own(tmp_path: Path, case: str) -> None:
    """Whole sequences, and where there is a state also step by step: the answers of each beginning of a sequence."""
    model = CASES[case]()
    runtime, manifest = taken(saved(model, tmp_path / "net.keras"), tmp_path / "models")
    random = np.random.default_rng(5)
    x = random.normal(size=(4, STEPS, manifest.n_features)).astype(np.float32)
    if case == "tokens":
        x = random.integers(0, 7, size=(4, STEPS, 1)).astype(np.float32)
    blank = np.frombuffer(runtime.initial(4), np.uint8).reshape(4, -1)
    y, _ = runtime.run(x, np.full(4, STEPS, np.int32), blank)
    want = answers(model, x)
    np.testing.assert_allclose(y if want.ndim == 3 else y[:, -1], want, 1e-5, 1e-5)
    assert manifest.streaming == (not case.startswith("both"))
    states, steps = blank, STEPS if manifest.streaming else 0
    for step in range(steps):
        after = np.empty_like(states)
        got = runtime.step(np.ascontiguousarray(x[:, step]), [states], [after])
        states = after
        whole = "fixed" in case and want.ndim == 3
        expected = want[:, step] if whole else answers(model, x[:, : step + 1])
        np.testing.assert_allclose(got, expected[:, -1] if expected.ndim == 3 else expected, 1e-5, 1e-5)


def test_what_the_manifest_says(tmp_path: Path) -> None:
    """A classifier's outputs are its classes; layers keep their kinds; the zip is named with its digest."""
    saved(CASES["lstm-last"](), tmp_path / "net.keras")
    arguments = ["--features", "flow,both:2", "--outputs", "calm,storm", "--models", str(tmp_path / "models")]
    assert imports.run(["keras", str(tmp_path / "net.keras"), *arguments], "stepcast") == 0
    manifest = read_manifest(tmp_path / "models" / "net" / "1")
    assert manifest.classes == ("calm", "storm")
    assert [(feature.name, feature.width) for feature in manifest.features] == [("flow", 1), ("both", 2)]
    assert [f"{state.layer}.{state.key}" for state in manifest.states] == ["lstm_0.h", "lstm_0.c"]
    assert "imported from net.keras (Keras), sha256 " in manifest.provenance.data


def test_masked_steps_are_the_callers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keras skips steps whose readings are all 9; here they are left out, and the import says so."""
    model = stack(L.Masking(9.0), L.LSTM(4, return_sequences=True), L.GRU(3, return_sequences=True), L.Dense(2))
    runtime, manifest = taken(saved(model, tmp_path / "net.keras"), tmp_path / "models")
    assert "layers[1] (Masking) skips the steps whose readings are all 9 in Keras" in capsys.readouterr().out
    x = np.random.default_rng(5).normal(size=(1, STEPS, F)).astype(np.float32)
    x[0, [1, 4]] = 9.0
    there = [0, 2, 3, 5]
    blank = np.frombuffer(runtime.initial(1), np.uint8).reshape(1, -1)
    y, _ = runtime.run(np.ascontiguousarray(x[:, there]), None, blank)
    np.testing.assert_allclose(y, answers(model, x)[:, there], 1e-5, 1e-5)
    assert manifest.streaming


# --- what is refused --------------------------------------------------------------------------------------------------


def parts(file: Path) -> dict[str, bytes]:
    """The entries of a zip."""
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(file: Path, entries: dict[str, bytes]) -> Path:
    """A zip of entries."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file


def with_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Change config.json of a good file."""

    def changed(entries: dict[str, bytes]) -> dict[str, bytes]:
        document = json.loads(entries["config.json"])
        change(document)
        return {**entries, "config.json": json.dumps(document).encode()}

    return changed


def with_layer(number: int, **fields: Any) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Change a layer's configuration of a good file."""
    return with_config(lambda document: document["config"]["layers"][number]["config"].update(fields))


def with_weights(change: Callable[[h5py.File], Any]) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Change model.weights.h5 of a good file."""

    def changed(entries: dict[str, bytes]) -> dict[str, bytes]:
        content = io.BytesIO(entries["model.weights.h5"])
        with h5py.File(content, "r+") as file:
            change(file)
        return {**entries, "model.weights.h5": content.getvalue()}

    return changed


def replaced(name: str, content: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Another content of an entry."""
    return lambda entries: {**entries, name: content}


def without(name: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """One entry less."""
    return lambda entries: {other: content for other, content in entries.items() if other != name}


def linked(link: Any) -> Callable[[h5py.File], None]:
    """A kernel that is a link."""

    def change(file: h5py.File) -> None:
        del file["layers/lstm/cell/vars/0"]
        file["layers/lstm/cell/vars/0"] = link

    return change


def outside(file: h5py.File) -> None:
    """A kernel whose numbers lie in another file."""
    del file["layers/lstm/cell/vars/0"]
    file["layers/lstm/cell/vars"].create_dataset("0", (F, 16), "f4", external=[("/etc/hostname", 0, F * 64)])


def huge(file: h5py.File) -> None:
    """A kernel that declares a tebibyte, all of it the fill value."""
    del file["layers/lstm/cell/vars/0"]
    file["layers/lstm/cell/vars"].create_dataset("0", (1 << 19, 1 << 19), "f4", chunks=(1, 1 << 10), fillvalue=1.0)


def other_class(document: dict[str, Any]) -> None:
    document["config"]["layers"][1] |= {"module": "mine.layers", "class_name": "LSTM", "registered_name": "mine>LSTM"}


def other_layer(kind: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """The recurrent layer is of another class."""
    return with_config(lambda document: document["config"]["layers"][1].update(class_name=kind))


REFUSED: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "traversal": (replaced("../../etc/passwd", b"x"), "leads out of the archive. Do not trust it"),
    "keras 2": (replaced("metadata.json", b'{"keras_version": "2.15.0"}'), "was saved by Keras 2.15.0, want 3"),
    "metadata": (replaced("metadata.json", b"[]"), "metadata.json is no JSON object"),
    "no json": (replaced("config.json", b"\xff{"), "config.json: is no JSON"),
    "deep json": (replaced("config.json", b"[" * 100_000), "config.json: is no JSON"),
    "no model": (replaced("config.json", b'{"class_name": "Sequential"}'), "config.json: is no layer of Keras"),
    "no weights": (replaced("model.weights.h5", b"weights"), "is no HDF5 file, or a damaged one"),
    "cut weights": (
        lambda entries: {**entries, "model.weights.h5": entries["model.weights.h5"][:900]},
        "model.weights.h5",
    ),
    "missing weights": (with_weights(lambda file: file.pop("layers/dense/vars/1")), "has no layers/dense/vars/1"),
    "other shape": (with_layer(1, units=5), r"layers/lstm/cell/vars/0 is \[3, 16\], the layer wants \[3, 20\]"),
    "huge units": (with_layer(1, units=10**9), "the layer wants"),
    "no units": (with_layer(1, units="4"), "units is '4', want a whole number"),
    "huge array": (with_weights(huge), r"is \[524288, 524288\], the layer wants"),
    "not finite": (
        with_weights(lambda file: file["layers/dense/vars/1"].write_direct(np.float32([np.nan, 0]))),
        "layers/dense/vars/1 has numbers that are not finite",
    ),
    "soft link": (with_weights(linked(h5py.SoftLink("/layers/lstm/cell/vars/1"))), "has no layers/lstm/cell/vars/0"),
    "external link": (with_weights(linked(h5py.ExternalLink("/etc/passwd", "/"))), "has no layers/lstm/cell/vars/0"),
    "external data": (with_weights(outside), "lies in another file. Do not trust it"),
    "lambda": (other_layer("Lambda"), r"layers\[1\] \(Lambda\): Stepcast has no layer for it"),
    "own class": (with_config(other_class), "is 'LSTM' of 'mine.layers', which is code of somebody's own"),
    "convolution": (other_layer("Conv1D"), r"\(Conv1D\): Stepcast has no layer for it. It has Activation"),
    "backwards": (with_layer(1, go_backwards=True), "go_backwards is True, Stepcast has only False"),
    "return state": (with_layer(1, return_state=True), "return_state is True, Stepcast has only False"),
    "leaky": (with_layer(1, activation="leaky_relu"), "activation is 'leaky_relu', Stepcast has elu"),
    "half": (with_layer(1, dtype="mixed_float16"), "computes in 'mixed_float16', want 'float32'"),
    "no shape": (
        with_layer(0, batch_shape=[None, None, None]),
        r"want \[batch, steps, features\]. Give the model an Input",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is good."""
    return saved(CASES["lstm"](), tmp_path_factory.mktemp("keras") / "net.keras")


def refused(file: Path, models: Path, said: str) -> None:
    """One line, and nothing is left behind."""
    with pytest.raises(ManifestError, match=said) as error:
        imports.run(["keras", str(file), "--models", str(models)], "stepcast")
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)
    assert not models.exists()


@pytest.mark.parametrize("why", REFUSED)
def test_a_file_that_is_hostile_or_cannot_be_said_ends_in_one_line(tmp_path: Path, good: Path, why: str) -> None:
    """Nothing of it is executed, nor anything that it points to read."""
    change, said = REFUSED[why]
    refused(packed(tmp_path / "bad.keras", change(parts(good))), tmp_path / "models", said)


def test_cut_and_foreign_files_end_in_one_line(tmp_path: Path, good: Path) -> None:
    """Half a file; a zip of something else; one that declares more than it may."""
    half = tmp_path / "half.keras"
    half.write_bytes(good.read_bytes()[:2000])
    refused(half, tmp_path / "models", "is no zip, or a damaged one")
    refused(
        packed(tmp_path / "other.keras", without("config.json")(parts(good))), tmp_path / "models", "has no config.json"
    )
    bomb = tmp_path / "bomb.keras"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", b'{"keras_version": "3.0.0"}')
        archive.writestr("config.json", b" " * (17 << 20))
    refused(bomb, tmp_path / "models", "config.json declares 17825792 bytes, at most 16777216 are read")


def branched() -> Model:
    """Two layers read the input."""
    x = keras.Input((None, F))
    return keras.Model(x, L.Dense(1)(L.Add()([L.LSTM(2)(x), L.GRU(2)(x)])))


def uneven() -> Model:
    """Both directions are different layers."""
    back = L.LSTM(4, return_sequences=True, activation="relu", go_backwards=True)
    return stack(L.Bidirectional(L.LSTM(4, return_sequences=True), backward_layer=back), L.Dense(1))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (branched, "does not read the layer before it alone. Only chains are read"),
        (uneven, "its directions are different layers"),
        (lambda: stack(L.LSTM(3), L.RepeatVector(4), L.LSTM(2)), r"\(RepeatVector\): Stepcast has no layer for it"),
        (lambda: stack(L.Dense(4, activation="leaky_relu"), L.LSTM(2)), "activation is .*leaky"),
    ],
    ids=["branches", "uneven", "repeat", "leaky"],
)
def test_what_keras_can_and_we_cannot_is_told_in_one_line(
    tmp_path: Path, build: Callable[[], Model], said: str
) -> None:
    """By files that Keras itself has saved."""
    refused(saved(build(), tmp_path / "net.keras"), tmp_path / "models", said)


def test_the_page_works_from_an_empty_directory(tmp_path: Path) -> None:
    """docs/keras.md: its programs and commands, in order."""
    with reading(ROOT / "docs" / "keras.md", tmp_path) as reader:
        assert reader.read() >= 3
