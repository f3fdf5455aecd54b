"""Opens graphs in onnxruntime and says what their inputs and outputs are."""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import onnxruntime as ort

from stepcast.errors import ManifestError, StepcastError
from stepcast.manifest import ITEM_BYTES, Manifest

Session: TypeAlias = ort.InferenceSession
RUNTIME_VERSION: Final = str(ort.__version__)
_ORT_NAMES: Final = {"float32": "float", "float64": "double"}  # the others are named as in numpy
_LIMIT_S: Final = 20.0
_DTYPES: Final = {f"tensor({_ORT_NAMES.get(dtype, dtype)})": dtype for dtype in ITEM_BYTES}


class Port(NamedTuple):
    """An input or output of a graph; axes of no fixed size have a name, or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype} [{', '.join(map(str, self.shape))}]"

    @property
    def dynamic(self) -> list[int]:
        """The axes of no fixed size: one at most for a state, two for sequences."""
        return [at for at, size in enumerate(self.shape) if not isinstance(size, int)]


def open_session(
    model: Path | bytes,
    device: str,
    threads: int = 1,
    profile: Path | None = None,
    name: str = "a graph made of it",
    quiet: bool = False,
) -> Session:
    """An onnxruntime session of a graph; the arguments are Runtime's, and so are the errors.

    `name` is of bytes. A quiet session does not log what it raises: it is there for trying.
    """
    name, providers = name if isinstance(model, bytes) else str(model), _providers(device)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4 if quiet else 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise ManifestError(f"{name}: onnxruntime cannot load it: {one_line(error)}") from error
    if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise ManifestError(f"{name}: device is 'cuda', but onnxruntime fell back to {session.get_providers()}")
    return session


def one_line(error: Exception) -> str:
    """An exception's text in one line; of onnxruntime's without its code and the place in its source."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    return re.sub(r"/\S+:\d+ .*?\) (?=[A-Z])", "", text)


def _providers(device: str) -> list[Any]:
    """What onnxruntime may run a graph on, the best first."""
    available = ort.get_available_providers()
    if device == "cuda" and "CUDAExecutionProvider" not in available:
        raise ManifestError(f"device is 'cuda', onnxruntime has {available}. Install service-gpu.")
    if device == "cpu" or "CUDAExecutionProvider" not in available:
        return ["CPUExecutionProvider"]
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries from their own packages, where they are not on the system's path
    # TF32 has 10 bits of mantissa: golden.npz would not be reproduced within float32's tolerance
    return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]


def signature(content: bytes, name: str) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of a graph; raises ManifestError with its name where onnxruntime cannot load it."""
    session = open_session(content, "cpu", name=name)
    return _ports(session.get_inputs()), _ports(session.get_outputs())


def _ports(given: Sequence[Any]) -> list[Port]:
    return [Port(port.name, _DTYPES.get(port.type, port.type), tuple(port.shape)) for port in given]


def check_signature(manifest: Manifest, session: Session) -> None:
    """Raises ManifestError where a graph has not what its manifest speaks of, or takes anything else."""
    takes = {manifest.input.name: manifest.input.dtype, **{t.name: t.dtype for t in manifest.constants}}
    takes |= {s.input: s.dtype for s in manifest.states}
    if manifest.lengths is not None:
        takes[manifest.lengths] = "int32"
    gives = {manifest.output.name: manifest.output.dtype, **{s.output: s.dtype for s in manifest.states}}
    inputs, outputs = session.get_inputs(), session.get_outputs()
    for side, ports, wanted in (("input", inputs, takes), ("output", outputs, gives)):
        found = {port.name: port.dtype for port in _ports(ports)}
        for name, dtype in wanted.items():
            if found.get(name) != dtype:
                raise ManifestError(f"{side} {name!r} is {found.get(name)} in model.onnx, {dtype} in manifest.json")
    extra = sorted({port.name for port in inputs} - set(takes))
    if extra:
        raise ManifestError(f"model.onnx has inputs that manifest.json does not speak of: {extra}")


def run_within(
    session: Session, outputs: Sequence[str], feeds: Mapping[str, Any], limit_s: float = _LIMIT_S
) -> list[Any]:
    """Run a graph that nobody knows yet; raises ManifestError if it takes longer than the limit: it may have no end."""
    options = ort.RunOptions()
    timer = threading.Timer(limit_s, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        return list(session.run(outputs, feeds, options))
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        if options.terminate:
            raise ManifestError(f"the graph did not end within {limit_s:g} s, for a few rows of a few steps") from error
        raise
    finally:
        timer.cancel()


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Run a graph that may not be what its manifest says: whatever is raised inside is a ManifestError of `what`."""
    try:
        yield
    except ManifestError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        why = "" if isinstance(error, StepcastError) else "the graph does not run as the manifest reads it: "
        raise ManifestError(f"{what}: {why}{one_line(error)}") from error
