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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from stepcast.errors import ManifestError
from stepcast.manifest import MODEL_FILE, Manifest, write_manifest

from ..onnx_session import RUNTIME_VERSION
from .graphs import Graph
from .plain import plain
from .proof import record
from .questions import read_partial
from .rewrites import Reading, Rewrite, rewritten

REWRITES: Final[tuple[Rewrite, ...]] = (plain,)
"""In this order."""


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
    reading, done = rewritten(Reading(Graph.load(file), read_partial(partial)), REWRITES)
    graph, known = reading.graph, reading.known
    number = version or _next_version(models / name)
    made = {"task": "regression", "lengths": reading.roles.lengths, "provenance": _provenance(file, done)}
    fields = {**made, **known, **reading.layout, "name": name, "version": number}
    fields["sha256"] = hashlib.sha256(graph.content).hexdigest()
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        lines = "; ".join(f"$.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ManifestError(f"{file}: the manifest would be wrong: {lines}") from error
    with _published(models / name / str(number)) as staged:
        (staged / MODEL_FILE).write_bytes(graph.content)
        write_manifest(staged, manifest)
        record(staged)
    return Imported(models / name / str(number), manifest)


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


@contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when all that is done inside has succeeded; else the repository is as before.

    It lies outside the repository until then, so that not even a crash leaves anything there.

    Raises:
        ManifestError: the target exists.
    """
    if target.exists():
        raise ManifestError(f"{target} exists. Take another --version.")
    with tempfile.TemporaryDirectory(prefix="stepcast-import-") as outside:
        staged = Path(outside) / "model"
        staged.mkdir()
        yield staged
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".import-") as inside:
            shutil.copytree(staged, Path(inside) / "model")
            (Path(inside) / "model").rename(target)
