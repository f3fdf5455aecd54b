"""Takes a recurrent ONNX graph made by others into the model repository.

What the graph does not say (which output is the next value of which input, which axis is the batch, what a constant is)
is read from its nodes, its names and its shapes where only one reading is possible; otherwise the import is refused
and asks. What was read is proved before anything is written; golden.npz holds the graph's own answers.

The way: graphs.py (what there is), rewrites.py (a better graph), roles.py (which tensor is what), axes.py (how it
lies), proof.py (whether that is true).
"""

import hashlib
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from stepcast.errors import ManifestError
from stepcast.manifest import MODEL_FILE, Manifest, write_manifest

from ..onnx_session import RUNTIME_VERSION
from .axes import layout_of
from .graphs import Graph
from .proof import record
from .questions import OpenQuestions, Question, joined, read_partial
from .rewrites import Reading, rewritten
from .roles import pairing_question


class Imported(NamedTuple):
    """A model that was taken in."""

    directory: Path
    manifest: Manifest


def import_onnx(
    file: Path,
    models: Path,
    name: str,
    version: int | None = None,
    partial: Path | None = None,
    answers: Mapping[str, Any] | None = None,
) -> Imported:
    """Write models/<name>/<version>/ (None: the next free one) for a graph, and prove it; else nothing is left behind.

    Args:
        partial: JSON of manifest fields that are known; they win over guesses.
        answers: More such fields; they win over the file's.

    Raises:
        OpenQuestions: the graph does not say what some of its tensors are; all questions at once.
        ManifestError: the graph cannot be served.
    """
    reading, done = rewritten(Reading(Graph.load(file), joined(read_partial(partial), answers or {})))
    target = models / name / str(version or _next_version(models / name))
    if target.exists():
        raise ManifestError(f"{target} exists. Take another --version.")
    made = {"name": name, "version": int(target.name), "provenance": _provenance(file, done)}
    with tempfile.TemporaryDirectory(prefix="stepcast-import-") as outside:
        staged, manifest = _proved(Path(outside), reading, made)
        _publish(staged, target)
    return Imported(target, manifest)


def _proved(folder: Path, reading: Reading, made: Mapping[str, Any]) -> tuple[Path, Manifest]:
    """The model's files in a folder below this one, and its manifest, by the one reading that proves itself."""
    roles = reading.roles
    questions = list(roles.questions)
    try:
        layouts = [layout_of(roles._replace(states=states), reading.known) for states in (roles.states, *roles.others)]
    except ManifestError as error:
        if not questions:
            raise
        questions.append(Question(str(error), [], {}))
        layouts = []
    if roles.others and layouts and layouts[0]["input"].get("time_axis") is None:  # single steps prove no pairing
        questions.append(pairing_question([(state.input, state.output) for state in roles.states]))
    if questions:
        raise OpenQuestions(reading.graph.file, questions, _draft(reading, questions))
    proved, refused = [], []
    for number, layout in enumerate(layouts):
        try:
            proved.append(_tried(folder / str(number), reading, {**made, **layout}))
        except ManifestError as error:
            refused.append(error)
    if not proved:
        raise refused[0]
    if len(proved) > 1:
        questions = [pairing_question([(state.input, state.output) for state in roles.states])]
        raise OpenQuestions(reading.graph.file, questions, _draft(reading, questions))
    return proved[0]


def _tried(folder: Path, reading: Reading, made: Mapping[str, Any]) -> tuple[Path, Manifest]:
    """The model's files in this folder, proved; raises ManifestError where this reading is wrong."""
    graph, known, roles = reading.graph, reading.known, reading.roles
    fields = {"task": "regression", "lengths": roles.lengths, **known, **made}
    fields["provenance"] = known.get("provenance", made["provenance"])
    fields["constants"] = _completed(known.get("constants", ()), graph)
    fields["sha256"] = hashlib.sha256(graph.content).hexdigest()
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        lines = "; ".join(f"$.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ManifestError(f"{graph.file}: the manifest would be wrong: {lines}") from error
    folder.mkdir()
    (folder / MODEL_FILE).write_bytes(graph.content)
    write_manifest(folder, manifest)
    record(folder)
    return folder, manifest


def _completed(constants: Sequence[Mapping[str, Any]], graph: Graph) -> list[dict[str, Any]]:
    """Constants with the type and shape that the graph says; one value stands for all."""
    ports = {port.name: port for port in graph.ports[0]}
    made = []
    for constant in constants:
        port = ports[constant["name"]]
        shape = constant.get("shape", [size if isinstance(size, int) else 1 for size in port.shape])
        values = constant.get("values") or ()
        if len(values) == 1:
            values = values * math.prod(shape)
        made.append({"dtype": port.dtype, "shape": shape, **constant, "values": values})
    return made


def _draft(reading: Reading, questions: Sequence[Question]) -> dict[str, Any]:
    """A partial manifest with what is known, what was read, and the likeliest answers."""
    roles = reading.roles
    read: dict[str, Any] = {"input": {"name": roles.input.name}, "output": {"name": roles.output.name}}
    states = [{**state.known, "input": state.input.name, "output": state.output.name} for state in roles.states]
    draft = joined(read, reading.known) | {"states": states}
    for question in questions:
        draft = joined(draft, {name: value for name, value in question.fields.items() if name != "states"})
    return draft


def _next_version(versions: Path) -> int:
    return 1 + max((int(path.name) for path in versions.glob("*") if path.name.isdigit()), default=0)


def _provenance(file: Path, done: Sequence[str]) -> dict[str, Any]:
    own = "golden.npz was recorded from this graph by onnxruntime, so it proves that "
    own += "the graph answers as it did on import, not that it answers as its training framework does"
    return {
        "data": "; ".join([f"imported from {file.name}", *done, own]),
        "libraries": {"onnxruntime": RUNTIME_VERSION},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _publish(staged: Path, target: Path) -> None:
    """Put a proved folder into the repository, in one piece."""
    parents = [folder for folder in (target.parent, target.parent.parent) if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".import-") as inside:
            shutil.copytree(staged, Path(inside) / "model")
            (Path(inside) / "model").rename(target)
    except BaseException as error:
        for folder in parents:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise ManifestError(f"{target}: cannot be written ({error.strerror or error})") from error
        raise
