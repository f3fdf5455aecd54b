"""Takes a recurrent ONNX graph made by others into the model repository.

What the graph does not say (which output is the next value of which input, which axis is the batch, what a constant is)
is read from its nodes, its names and its shapes where only one reading is possible; otherwise the import is refused
and asks. What was read is proved before anything is written; golden.npz holds the graph's own answers.

The way: graphs.py (what there is), rewrites.py (a better graph), roles.py (which tensor is what), axes.py (how it
lies), proof.py (whether that is true).
"""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from pydantic import ValidationError

from stepcast.errors import ManifestError
from stepcast.manifest import GOLDEN_FILE, MODEL_FILE, Manifest, write_manifest

from ..onnx_session import RUNTIME_VERSION
from .batch import rebatched
from .context import framed
from .freed import any_size, many_rows, many_steps
from .graphs import Graph
from .joining import joined_data
from .lengths import empty_rows_kept, int32_lengths
from .lifting import lift
from .newer import older
from .plain import declared, plain
from .proof import record
from .questions import OpenQuestions, joined, read_partial
from .reading import Reading
from .rewrites import Rewrite, rewritten

REWRITES: Final[tuple[Rewrite, ...]] = (
    framed,
    plain,
    any_size,
    many_rows,
    many_steps,
    declared,
    rebatched,
    lift,
    empty_rows_kept,
)
"""In this order; `older`, `joined_data` and `int32_lengths` stand before them, since they change what tensors are."""


class Imported(NamedTuple):
    """A model that was taken in.

    Attributes:
        done: What was done to its graph.
        unanswered: Outputs of the graph that are neither the answer nor a state.
    """

    directory: Path
    manifest: Manifest
    done: Sequence[str]
    unanswered: Sequence[str]


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
    return import_graph(Graph.load(file), models, name, version, joined(read_partial(partial), answers or {}))


def import_graph(graph: Graph, models: Path, name: str, version: int | None, known: Mapping[str, Any]) -> Imported:
    """The same for a graph that is in memory; `known` are fields of a manifest."""
    reading, first = rewritten(Reading(graph, known), (older, joined_data, int32_lengths))
    target = models / name / str(version or _next_version(models / name))
    if target.exists():
        raise ManifestError(f"{target} exists. Take another --version.")
    with tempfile.TemporaryDirectory(prefix="stepcast-import-") as outside:
        pairings = reading.pairings()
        proved, refused = [], []
        for number, paired in enumerate(pairings):
            try:
                proved.append(_proved(Path(outside) / str(number), paired, target, first))
            except OpenQuestions:
                raise
            except ManifestError as error:
                refused.append(error)
        if not proved:
            raise refused[0]
        best = proved[0]
        single = len(pairings) > 1 and best.manifest.input.time_axis is None  # single steps prove no pairing
        if (len(proved) > 1 or single) and not _same([one.directory for one in proved], len(pairings)):
            raise reading.asking([reading.roles.pairing])
        _publish(best.directory, target)
    return best._replace(directory=target)


def _proved(folder: Path, reading: Reading, target: Path, first: Sequence[str]) -> Imported:
    """Write the model's files into this folder; raises ManifestError if the graph does not answer as it is read."""
    file, outputs = reading.graph.file, reading.graph.ports[1]
    reading, then = rewritten(reading, REWRITES)
    done = [*first, *then]
    made = {"task": "regression", "lengths": reading.roles.lengths, "provenance": _provenance(file, done)}
    fields = {**made, "single_steps": "exact", **reading.known, **reading.layout}
    fields |= {"name": target.parent.name, "version": int(target.name)}
    fields["sha256"] = hashlib.sha256(reading.graph.content).hexdigest()
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        lines = "; ".join(f"$.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ManifestError(f"{file}: the manifest would be wrong: {lines}") from error
    folder.mkdir()
    (folder / MODEL_FILE).write_bytes(reading.graph.content)
    write_manifest(folder, manifest)
    try:
        record(folder)
    except ManifestError as error:  # the folder means nothing to the user, and is soon gone
        text = str(error).replace(str(folder / MODEL_FILE), str(file)).replace(str(folder), str(file))
        raise ManifestError(text) from error
    served = {manifest.output.name, *(state.output for state in manifest.states)}
    return Imported(folder, manifest, done, [port.name for port in outputs if port.name not in served])


def _same(folders: Sequence[Path], many: int) -> bool:
    """Whether all of so many readings were proved and answer the same: their outputs are copies of each other."""
    recorded = [dict(np.load(folder / GOLDEN_FILE)) for folder in folders]
    first, *others = ({name: array.ravel() for name, array in arrays.items()} for arrays in recorded)
    return len(folders) == many and all(
        np.array_equal(arrays[name], value) for arrays in others for name, value in first.items()
    )


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
