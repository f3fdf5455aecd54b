"""A session's state as a file: safetensors or npz, tensors named <layer>.<key>, no pickle.

Step number, model, version and fingerprint travel as JSON: in the metadata, or in npz as bytes named `__stepcast__`.
"""

import io
import json
import struct
import zipfile
from typing import Any, Final

import numpy as np
import safetensors
import safetensors.numpy

from stepcast.errors import Malformed, TooLarge

SAFETENSORS: Final = "application/x-safetensors"
NPZ: Final = "application/x-npz"
_FIELDS: Final = ("session", "model", "version", "fingerprint", "step", "examples")
_META: Final = "__stepcast__"


def export(answer: dict[str, Any], content_type: str) -> bytes:
    """What GET state answers, as a file of the given type."""
    arrays: dict[str, Any] = {}
    for layer, keys in answer["state"].items():
        arrays |= {f"{layer}.{key}": np.ascontiguousarray(value) for key, value in keys.items()}
    meta = json.dumps({name: answer[name] for name in _FIELDS})
    if content_type == SAFETENSORS:
        return safetensors.numpy.save(arrays, {"stepcast": meta})
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays, **{_META: np.frombuffer(meta.encode(), np.uint8)})
    return file.getvalue()


def read(body: bytes, content_type: str, limit: int) -> dict[str, Any]:
    """The inverse of export: the fields of a state put, tensors as arrays.

    Raises:
        Malformed: not a file of that type. TooLarge: a compressed file unfolds to more than `limit` bytes.
    """
    try:
        said, arrays = _read_safetensors(body) if content_type == SAFETENSORS else _read_npz(body, limit)
        meta = json.loads(said)
        if not isinstance(meta, dict):
            raise ValueError("its metadata is not an object")
    except TooLarge:
        raise
    except Exception as error:  # zipfile, zlib, numpy and safetensors raise a dozen kinds at bytes that are not theirs
        raise Malformed(f"the body is not {content_type.removeprefix('application/x-')}: {error}") from error
    state: dict[str, dict[str, Any]] = {}
    for name, value in arrays.items():
        layer, _, key = name.rpartition(".")
        state.setdefault(layer, {})[key] = value
    return {**{name: meta[name] for name in _FIELDS if meta.get(name) is not None}, "state": state}


def _read_safetensors(body: bytes) -> tuple[str, dict[str, Any]]:
    """Our metadata ("{}": none), and the arrays."""
    arrays = safetensors.numpy.load(body)
    (length,) = struct.unpack_from("<Q", body)
    header = json.loads(body[8 : 8 + length])
    return header.get("__metadata__", {}).get("stepcast", "{}"), arrays


def _read_npz(body: bytes, limit: int) -> tuple[str, dict[str, Any]]:
    with zipfile.ZipFile(io.BytesIO(body)) as folder:
        size = sum(member.file_size for member in folder.infolist())
    if size > limit:
        raise TooLarge(f"the npz unfolds to {size} bytes (limit {limit})", limit=limit)
    with np.load(io.BytesIO(body), allow_pickle=False) as file:
        arrays = {name: np.asarray(file[name]) for name in file.files}
    return arrays.pop(_META, np.frombuffer(b"{}", np.uint8)).tobytes().decode(), arrays
