"""stepcast import: takes a recurrent ONNX graph made by others into the model repository.

What the graph does not say (which output is the next value of which input, which axis is the batch, what a constant is)
is guessed from names and shapes where only one reading is possible; otherwise the import is refused and says what to
put into a partial manifest. Guesses are proved before anything is written; golden.npz holds the graph's own answers.
"""

import itertools
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from pydantic import ValidationError

from stepcast.errors import ManifestError
from stepcast.manifest import GOLDEN_FILE, MODEL_FILE, Manifest, sha256_of, write_manifest

from ..arrays import Array
from ..model import Runtime
from ..onnx_session import RUNTIME_VERSION, Port, reading, signature

_OURS: Final = frozenset({"schema_version", "name", "version", "sha256"})
_AFFIXES: Final = re.compile("(in|out)(put)?|prev(ious)?|past|present|next|new|old|cur(rent)?|init(ial)?|final|last")
_ROWS, _STEPS = 6, 8


class Imported(NamedTuple):
    """A model that was taken in."""

    directory: Path
    manifest: Manifest


def import_onnx(
    file: Path, models: Path, name: str, version: int | None = None, partial: Path | None = None
) -> Imported:
    """Write models/<name>/<version>/ (None: the next free one) for a graph, and prove it; else nothing is left behind.

    `partial` is JSON of manifest fields that are known; they win over guesses. Raises ManifestError where the graph
    cannot be served or can be read in more than one way; the message says which fields would help.
    """
    fields = _Guess(*signature(file), _read_partial(partial)).fields()
    parent = models / name
    number = version or 1 + max((int(p.name) for p in parent.glob("*") if p.name.isdigit()), default=0)
    target = parent / str(number)
    if target.exists():
        raise ManifestError(f"{target} exists. Take another --version.")
    provenance = {
        "data": f"imported from {file.name}; golden.npz was recorded from this graph by onnxruntime, so it proves that "
        "the graph answers as it did on import, not that it answers as its training framework does",
        "libraries": {"onnxruntime": RUNTIME_VERSION},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    fields = {"provenance": provenance, **fields, "name": name, "version": number, "sha256": sha256_of(file)}
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        lines = "; ".join(f"$.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ManifestError(f"{file}: the manifest would be wrong: {lines}") from error
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

    Raises ManifestError where rows depend on each other, or stepping is not what whole sequences are.
    """
    runtime = Runtime(directory, device="cpu")
    tolerance = runtime.manifest.tolerance
    x = np.random.default_rng(0).normal(size=(_ROWS, _STEPS, runtime.manifest.n_features)).astype(np.float32)
    lengths = np.array([_STEPS, _STEPS, 5, 3, 1, 0], np.int32)
    blank = np.frombuffer(runtime.initial(_ROWS), np.uint8).reshape(_ROWS, -1)
    with reading(directory / MODEL_FILE):
        _, start = runtime.run(x[::-1].copy(), None, blank)  # a state that the graph itself has made
        start = np.where(np.arange(_ROWS)[:, None] % 2, start, blank)
        y, end = runtime.run(x, lengths, start)
        for row, length in enumerate(lengths[:-1]):
            alone, _ = runtime.run(x[[row]], lengths[[row]], start[[row]])
            if not np.allclose(alone[0, :length], y[row, :length], tolerance.rtol, tolerance.atol):
                why = "an axis is read wrongly, or the graph mixes its batch"
                advice = "Give $.input, $.output and $.states with their batch_axis and time_axis."
                raise ManifestError(f"a row's answer depends on the rows beside it: {why}. {advice}")
    arrays: dict[str, Array] = {"x": x, "lengths": lengths, "y": y}
    for side, states in (("state_in", start), ("state_out", end)):
        for layer, keys in runtime.unpack(states.tobytes(), _ROWS).items():
            arrays |= {f"{side}.{layer}.{key}": value for key, value in keys.items()}
    np.savez_compressed(directory / GOLDEN_FILE, allow_pickle=False, **arrays)
    runtime.prove()


def _read_partial(path: Path | None) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read ({error})") from error
    if not isinstance(known, dict):
        raise ManifestError(f"{path}: is not an object")
    if given := sorted(_OURS & set(known)):
        raise ManifestError(f"{path}: {given} are set by the import. Leave them out.")
    if unknown := sorted(set(known) - set(Manifest.model_fields)):
        raise ManifestError(f"{path}: unknown fields {unknown}")
    return known


class _Guess:
    """Reads a graph's signature as a manifest; what is known wins."""

    def __init__(self, inputs: list[Port], outputs: list[Port], known: dict[str, Any]) -> None:
        self.known = known
        self.free = {"input": {port.name: port for port in inputs}, "output": {port.name: port for port in outputs}}

    def fields(self) -> dict[str, Any]:
        """Fields of the manifest."""
        known, inputs = self.known, dict(self.free["input"])
        for constant in known.get("constants", ()):
            self._take("input", constant.get("name"), "$.constants")
        named = [side for side in self.free if "name" in known.get(side, {})]
        main = {side: self._take(side, known[side]["name"], f"$.{side}") for side in named}
        lengths, states = self._lengths(), self._states()
        x, y = (main.get(side) or self._main(side) for side in self.free)
        if self.free["input"]:
            raise ManifestError(
                f"inputs {', '.join(map(str, self.free['input'].values()))} are neither data nor state. Give "
                "$.constants with name, dtype, shape and values of each, or $.lengths (int32), or $.states."
            )
        batch = {inputs[state["input"]].shape[state["batch_axis"]] for state in states}
        entry = self._axes("input", x, batch)
        leave = self._axes("output", y, {*batch, x.shape[entry["batch_axis"]]})
        if leave["time_axis"] is not None and entry["time_axis"] is None:
            raise ManifestError(f"output {y} has a time axis, input {x} has none. Give $.input and $.output.")
        features, outputs = self._names("features", "x", x, entry), self._names("outputs", "y", y, leave)
        made = {"features": features, "outputs": outputs, "task": "regression", "lengths": lengths}
        return {**made, **known, "input": entry, "output": leave, "states": states}

    def _take(self, side: str, name: Any, where: str) -> Port:
        free = self.free[side]
        if name not in free:
            raise ManifestError(f"{where}: the graph has no free tensor {name!r}, it has {sorted(free)}")
        return free.pop(name)

    def _lengths(self) -> str | None:
        name = self.known.get("lengths")
        if "lengths" not in self.known:
            ports = [port for port in self.free["input"].values() if port.dtype == "int32" and len(port.shape) == 1]
            found = [port.name for port in ports if "len" in port.name.lower()]
            name = found[0] if len(found) == 1 else None
        return None if name is None else self._take("input", name, "$.lengths").name

    def _states(self) -> list[dict[str, Any]]:
        """State inputs with their outputs: of the same type and shape, and of the same stem or the only ones."""
        if "states" in self.known:
            return [
                self._state(given, *(self._take(side, given.get(side), f"$.states[{n}].{side}") for side in self.free))
                for n, given in enumerate(self.known["states"])
            ]
        pairs = self._continued(lambda port, result: stem(port.name) == stem(result.name) != "")
        if all(len(ports) > 1 for ports in self.free.values()):
            pairs += self._continued(lambda port, result: max(len(port.dynamic), len(result.dynamic)) <= 1)
        return [self._state({}, port, result) for port, result in pairs]

    def _state(self, given: dict[str, Any], port: Port, result: Port) -> dict[str, Any]:
        if "batch_axis" not in given and len(port.dynamic) != 1:
            many = f"{len(port.dynamic)} dynamic axes. Give $.states with batch_axis and shape."
            none = "no dynamic axis, so sessions cannot be batched. Export the graph with a dynamic batch axis."
            raise ManifestError(f"state input {port} has {many if port.dynamic else none}")
        axis = int(given["batch_axis"] if "batch_axis" in given else port.dynamic[0])
        shape = [size for at, size in enumerate(port.shape) if at != axis]
        made = {"layer": "state", "key": port.name, "input": port.name, "output": result.name, "dtype": port.dtype}
        return {**made, "shape": shape, "batch_axis": axis, **given}

    def _continued(self, alike: Callable[[Port, Port], bool]) -> list[tuple[Port, Port]]:
        """Free inputs with the one output that continues each; these are free no more."""
        every = itertools.product(self.free["input"].values(), self.free["output"].values())
        pairs = [(port, result) for port, result in every if _fits(port, result) and alike(port, result)]
        for port, result in pairs:
            results = ", ".join(str(o) for i, o in pairs if i is port)
            if sum(i is port for i, _ in pairs) > 1 or sum(o is result for _, o in pairs) > 1:
                text = f"input {port} may be continued by any of the outputs {results}. Give $.states with layer, key, "
                raise ManifestError(f"{text}input and output of each.")
        for port, result in pairs:
            del self.free["input"][port.name], self.free["output"][result.name]
        return pairs

    def _main(self, side: str) -> Port:
        """The one free tensor that can carry the data."""
        floats = [port for port in self.free[side].values() if port.dtype == "float32" and port.shape]
        if len(floats) != 1:
            said = f"which {side} carries the data? {', '.join(map(str, floats)) or 'none is float32'}. "
            raise ManifestError(f"{said}Give $.{side}.name, and $.states for tensors that come back.")
        return self.free[side].pop(floats[0].name)

    def _axes(self, side: str, port: Port, batch: set[Any]) -> dict[str, Any]:
        """Where the batch and the time axis are."""
        given = self.known.get(side, {})
        made = {"name": port.name, **given}
        if "batch_axis" in given and "time_axis" in given:
            return made
        sized = [axis for axis in port.dynamic if port.shape[axis] in batch - {None}]
        found = [int(given["batch_axis"])] if "batch_axis" in given else sized
        if len(found) != 1:
            found = port.dynamic
        advice = f"Give $.{side}.batch_axis and time_axis."
        if len(found) != 1:
            raise ManifestError(f"which axis of {side} {port} is the batch? {advice}")
        times = [axis for axis in port.dynamic if axis != found[0]] if len(port.shape) == 3 else [None]
        if len(times) > 1:
            raise ManifestError(f"which axis of {side} {port} is time? {advice}")
        if not times:
            fixed = f"{side} {port} has one dynamic axis of three: time is fixed."
            step = f"Give $.{side}.time_axis of a graph that takes one step (axis of size 1)"
            raise ManifestError(f"{fixed} {step}, or export with a dynamic time axis.")
        return {"batch_axis": found[0], "time_axis": times[0], **made}

    def _names(self, field: str, letter: str, port: Port, axes: dict[str, Any]) -> list[dict[str, Any]]:
        """Features or outputs, named by number."""
        if field in self.known:
            return list(self.known[field])
        rest = [size for at, size in enumerate(port.shape) if at not in (axes["batch_axis"], axes["time_axis"])]
        sizes = [size for size in rest if isinstance(size, int)]
        if len(sizes) < len(rest):
            raise ManifestError(f"{port}: how many {field} there are is not fixed in the graph. Give $.{field}.")
        return [{"name": f"{letter}{number}"} for number in range(math.prod(sizes))]


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
    fixed = (pair for pair in zip(port.shape, result.shape, strict=True) if all(isinstance(size, int) for size in pair))
    return all(a == b for a, b in fixed)
