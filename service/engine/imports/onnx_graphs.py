"""python -m service import-onnx: takes a recurrent ONNX graph made by others into the model repository.

What the graph does not say (which output is the next value of which input, which axis is the batch, what a constant is)
is guessed from names and shapes where only one reading is possible; otherwise the import is refused and says what to
put into a partial manifest. Guesses are proved before anything is written: rows must not depend on each other, and
stepping must equal whole sequences. golden.npz holds the graph's own answers, and the manifest says so.
"""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from stepcast.errors import ManifestError
from stepcast.manifest import GOLDEN_FILE, MODEL_FILE, Manifest, Tolerance, sha256_of, write_manifest

from ..model import Runtime
from ..onnx_session import Port, reading, runtime_version, signature

_OURS: Final = ("schema_version", "name", "version", "sha256")
_AFFIXES: Final = re.compile(
    "in|out|input|output|prev|previous|past|present|next|new|old|cur|current|init|initial|final|last"
)
_ROWS, _STEPS = 6, 8


@dataclass(frozen=True, slots=True)
class Imported:
    """A model that was taken in."""

    directory: Path
    manifest: Manifest


def import_onnx(
    file: Path, models: Path, name: str, version: int | None = None, partial: Path | None = None
) -> Imported:
    """Write models/<name>/<version>/ for a graph, and prove it; nothing is left behind where that fails.

    Args:
        version: None takes the next free one.
        partial: JSON of manifest fields that are known; they win over guesses.

    Raises:
        ManifestError: the graph cannot be served, or can be read in more than one way; the message says which
            fields of a partial manifest would help.
    """
    known = _read_partial(partial)
    inputs, outputs = signature(file)
    fields = _Guess(inputs, outputs, known).fields()
    parent = models / name
    number = version or 1 + max((int(p.name) for p in parent.glob("*") if p.name.isdigit()), default=0)
    target = parent / str(number)
    if target.exists():
        raise ManifestError(f"{target} exists. Take another --version.")
    provenance = {
        "data": f"imported from {file.name}; golden.npz was recorded from this graph by onnxruntime, so it proves that "
        "the graph answers as it did on import, not that it answers as its training framework does",
        "libraries": {"onnxruntime": runtime_version()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    fields = {"provenance": provenance, **fields, "name": name, "version": number, "sha256": sha256_of(file)}
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        lines = [f"$.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ManifestError(f"{file}: the manifest would be wrong: " + "; ".join(lines)) from error
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".import-") as folder:
        staged = Path(folder) / "model"
        staged.mkdir()
        shutil.copyfile(file, staged / MODEL_FILE)
        write_manifest(staged, manifest)
        record(staged)
        staged.rename(target)
    return Imported(target, manifest)


def record(directory: Path) -> None:
    """Record golden.npz from the graph's own answers, and prove that the manifest reads the graph rightly.

    Raises:
        ManifestError: rows depend on each other, stepping is not what whole sequences are, or it does not run.
    """
    runtime = Runtime(directory, device="cpu")
    random = np.random.default_rng(0)
    x = random.normal(size=(_ROWS, _STEPS, runtime.manifest.n_features)).astype(np.float32)
    lengths = np.array([_STEPS, _STEPS, 5, 3, 1, 0], np.int32)
    blank = np.frombuffer(runtime.initial(_ROWS), np.uint8).reshape(_ROWS, -1)
    with reading(directory / MODEL_FILE):
        _, start = runtime.run(x[::-1].copy(), None, blank)  # a state that the graph itself has made
        start = np.where(np.arange(_ROWS)[:, None] % 2, start, blank)
        y, end = runtime.run(x, lengths, start)
        for row, length in enumerate(lengths[:-1]):
            cut = slice(row, row + 1)
            alone, _ = runtime.run(x[cut], lengths[cut], start[cut])
            _check_alone(runtime.manifest.tolerance, alone[0, :length], y[row, :length])
    arrays: dict[str, npt.NDArray[Any]] = {"x": x, "lengths": lengths, "y": y}
    for side, states in (("state_in", start), ("state_out", end)):
        for layer, keys in runtime.unpack(states.tobytes(), _ROWS).items():
            arrays |= {f"{side}.{layer}.{key}": value for key, value in keys.items()}
    np.savez_compressed(directory / GOLDEN_FILE, allow_pickle=False, **arrays)
    runtime.prove()


def _check_alone(tolerance: Tolerance, alone: npt.NDArray[np.float32], in_company: npt.NDArray[np.float32]) -> None:
    if not np.allclose(alone, in_company, tolerance.rtol, tolerance.atol):
        raise ManifestError(
            "a row's answer depends on the rows beside it: an axis is read wrongly, or the graph mixes its batch. "
            "Give $.input, $.output and $.states with their batch_axis and time_axis."
        )


def _read_partial(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read ({error})") from error
    if not isinstance(known, dict):
        raise ManifestError(f"{path}: is not an object")
    given = sorted(set(known) & set(_OURS))
    if given:
        raise ManifestError(f"{path}: {given} are set by the import. Leave them out.")
    unknown = sorted(set(known) - set(Manifest.model_fields))
    if unknown:
        raise ManifestError(f"{path}: unknown fields {unknown}")
    return known


class _Guess:
    """Reads a graph's signature as a manifest; what is known wins."""

    def __init__(self, inputs: list[Port], outputs: list[Port], known: dict[str, Any]) -> None:
        self.known = known
        self.inputs = {port.name: port for port in inputs}
        self.outputs = {port.name: port for port in outputs}
        self.free_in, self.free_out = dict(self.inputs), dict(self.outputs)

    def fields(self) -> dict[str, Any]:
        """Fields of the manifest."""
        for constant in self.known.get("constants", ()):
            self._take(self.free_in, constant.get("name"), "$.constants")
        for side, free in (("input", self.free_in), ("output", self.free_out)):
            if "name" in self.known.get(side, {}):
                self._take(free, self.known[side]["name"], f"$.{side}")
        lengths = self._lengths()
        states = self._states()
        main_in = self._main("input", self.inputs, self.free_in)
        main_out = self._main("output", self.outputs, self.free_out)
        batch = {self.inputs[s["input"]].shape[s["batch_axis"]] for s in states}
        entry = self._axes("input", main_in, {*batch} - {None})
        leave = self._axes("output", main_out, {*batch, main_in.shape[entry["batch_axis"]]} - {None})
        if leave["time_axis"] is not None and entry["time_axis"] is None:
            raise ManifestError(
                f"output {main_out} has a time axis, input {main_in} has none. Give $.input and $.output."
            )
        fields = {
            "features": self._names("features", "x", main_in, entry),
            "outputs": self._names("outputs", "y", main_out, leave),
            "task": "regression",
            "lengths": lengths,
        }
        return {**fields, **self.known, "input": entry, "output": leave, "states": states}

    def _take(self, free: dict[str, Port], name: Any, where: str) -> Port:
        if name not in free:
            raise ManifestError(f"{where}: the graph has no free tensor {name!r}, it has {sorted(free)}")
        return free.pop(name)

    def _lengths(self) -> str | None:
        if "lengths" in self.known:
            name: str | None = self.known["lengths"]
            if name is not None:
                self._take(self.free_in, name, "$.lengths")
            return name
        found = [
            p for p in self.free_in.values() if p.dtype == "int32" and len(p.shape) == 1 and "len" in p.name.lower()
        ]
        if len(found) != 1:
            return None
        return self.free_in.pop(found[0].name).name

    def _states(self) -> list[dict[str, Any]]:
        if "states" not in self.known:
            return [self._state(i, o, {}) for i, o in self._pairs()]
        states = []
        for number, given in enumerate(self.known["states"]):
            port = self._take(self.free_in, given.get("input"), f"$.states[{number}].input")
            result = self._take(self.free_out, given.get("output"), f"$.states[{number}].output")
            states.append(self._state(port, result, given))
        return states

    def _state(self, port: Port, result: Port, given: dict[str, Any]) -> dict[str, Any]:
        dynamic = port.dynamic
        if "batch_axis" not in given and not dynamic:
            raise ManifestError(
                f"state input {port} has no dynamic axis, so sessions cannot be batched. Export the graph with a "
                "dynamic batch axis."
            )
        if "batch_axis" not in given and len(dynamic) > 1:
            raise ManifestError(
                f"state input {port} has {len(dynamic)} dynamic axes. Give $.states with batch_axis and shape."
            )
        axis = int(given["batch_axis"] if "batch_axis" in given else dynamic[0])
        shape = [size for at, size in enumerate(port.shape) if at != axis]
        made = {"layer": "state", "key": port.name, "input": port.name, "output": result.name, "dtype": port.dtype}
        return {**made, "shape": shape, "batch_axis": axis, **given}

    def _pairs(self) -> list[tuple[Port, Port]]:
        """State inputs with their outputs: of the same type and shape, and of the same stem or the only ones."""
        pairs = []
        by_name = [
            (i, o)
            for i in self.free_in.values()
            for o in self.free_out.values()
            if _fits(i, o) and stem(i.name) == stem(o.name) != ""
        ]
        for port, result in by_name:
            if sum(i is port for i, _ in by_name) > 1 or sum(o is result for _, o in by_name) > 1:
                raise self._ambiguous(port, [o for i, o in by_name if i is port] or [result])
            pairs.append((port, result))
        for port, result in pairs:
            del self.free_in[port.name], self.free_out[result.name]
        return pairs + self._pairs_by_shape()

    def _pairs_by_shape(self) -> list[tuple[Port, Port]]:
        """What is left: an input with a fixed row that exactly one output continues."""
        if len(self.free_in) < 2 or len(self.free_out) < 2:
            return []
        pairs = []
        for port in [p for p in self.free_in.values() if p.has_fixed_rows]:
            fitting = [o for o in self.free_out.values() if _fits(port, o) and o.has_fixed_rows]
            if not fitting:
                continue
            rivals = [i for i in self.free_in.values() if i.has_fixed_rows and _fits(i, fitting[0])]
            if len(fitting) > 1 or len(rivals) > 1:
                raise self._ambiguous(port, fitting)
            pairs.append((port, fitting[0]))
        for port, result in pairs:
            del self.free_in[port.name], self.free_out[result.name]
        return pairs

    def _ambiguous(self, port: Port, results: list[Port]) -> ManifestError:
        return ManifestError(
            f"input {port} may be continued by any of the outputs {', '.join(map(str, results))}. Give $.states with "
            "layer, key, input and output of each."
        )

    def _main(self, side: str, ports: dict[str, Port], free: dict[str, Port]) -> Port:
        """The one tensor that carries the data."""
        given = self.known.get(side, {}).get("name")
        if given is not None:
            port = ports[given]
        else:
            floats = [p for p in free.values() if p.dtype == "float32" and p.shape]
            if len(floats) != 1:
                raise ManifestError(
                    f"which {side} carries the data? {', '.join(map(str, floats)) or 'none is float32'}. "
                    f"Give $.{side}.name, and $.states for tensors that come back."
                )
            port = free.pop(floats[0].name)
        if side == "input" and free:
            raise ManifestError(
                f"inputs {', '.join(map(str, free.values()))} are neither data nor state. Give $.constants with name, "
                "dtype, shape and values of each, or $.lengths (int32), or $.states."
            )
        return port

    def _axes(self, side: str, port: Port, batch: set[Any]) -> dict[str, Any]:
        """Where the batch and the time axis are."""
        given = dict(self.known.get(side, {}))
        made = {"name": port.name, **given}
        if "batch_axis" in given and "time_axis" in given:
            return made
        dynamic = port.dynamic
        named = [at for at in dynamic if port.shape[at] in batch]
        if "batch_axis" in given:
            axis = int(given["batch_axis"])
        elif len(named) == 1:
            (axis,) = named
        elif len(dynamic) == 1:
            (axis,) = dynamic
        else:
            raise ManifestError(f"which axis of {side} {port} is the batch? Give $.{side}.batch_axis and time_axis.")
        rest = [at for at in dynamic if at != axis]
        if len(port.shape) == 3 and len(rest) > 1:
            raise ManifestError(f"which axis of {side} {port} is time? Give $.{side}.batch_axis and time_axis.")
        time = rest[0] if len(port.shape) == 3 and rest else None
        if len(port.shape) == 3 and time is None:
            raise ManifestError(
                f"{side} {port} has one dynamic axis of three: time is fixed. Give $.{side}.time_axis of a graph that "
                "takes one step (axis of size 1), or export with a dynamic time axis."
            )
        return {**made, "batch_axis": axis, "time_axis": given.get("time_axis", time)}

    def _names(self, field: str, letter: str, port: Port, axes: dict[str, Any]) -> list[dict[str, Any]]:
        """Features or outputs, named by number."""
        if field in self.known:
            return list(self.known[field])
        rest = [size for at, size in enumerate(port.shape) if at not in (axes["batch_axis"], axes["time_axis"])]
        if not all(isinstance(size, int) for size in rest):
            raise ManifestError(f"{port}: how many {field} there are is not fixed in the graph. Give $.{field}.")
        count = int(np.prod([size for size in rest if isinstance(size, int)], dtype=np.int64))
        return [{"name": f"{letter}{number}"} for number in range(count)]


def stem(name: str) -> str:
    """What two names of one state have in common: `h_in` and `h_out`, `h0` and `hn`, `state` and `stateN` are alike."""
    words = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])N\b", "", name).replace("::", "_").lower())
    kept = [word for word in words if not _AFFIXES.fullmatch(word)]
    if len(kept) == len(words) > 1 and kept[-1] in ("0", "n", "1"):  # behind `in` or `out` a number is a layer's
        kept.pop()
    if kept and len(kept[-1]) == 2 and kept[-1][1] == "n":
        kept[-1] = kept[-1][0]
    return "_".join(kept)


def _fits(port: Port, result: Port) -> bool:
    """Whether an output can be the next value of an input: exporters often forget an output's fixed sizes."""
    if port.dtype != result.dtype or len(port.shape) != len(result.shape) or not port.shape:
        return False
    return all(
        not (isinstance(a, int) and isinstance(b, int)) or a == b for a, b in zip(port.shape, result.shape, strict=True)
    )
