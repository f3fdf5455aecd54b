"""`stepcast.export`: a torch module with a state becomes a model directory, with torch's own answers as its proof."""

import datetime
import importlib.metadata
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stepcast.errors import ManifestError
from stepcast.manifest import (
    GOLDEN_FILE,
    MODEL_FILE,
    Feature,
    InputTensor,
    Manifest,
    Output,
    OutputTensor,
    Provenance,
    StateTensor,
    Tolerance,
    sha256_of,
)

from .export import LIBRARIES, fresh, next_version, prove, publish
from .stepper import Floats, Stepper
from .torch_modules import Stepped, jittered, stepped

ROWS, STEPS = 6, 8
OPSET = 17


def export(
    module: nn.Module,
    example: Any,
    *,
    name: str,
    states: Any = None,
    features: Sequence[Any] | None = None,
    outputs: Sequence[Any] | None = None,
    classes: Sequence[str] | None = None,
    models: Path = Path("models"),
    version: int | None = None,
    description: str = "",
) -> Path:
    """See `stepcast.export`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made, x = stepped(module, example, states)
        x = x[torch.arange(ROWS) % len(x)]
        x = x[:, torch.arange(2 * STEPS) % x.shape[1]] if made.has_time else x[:, None].repeat(1, 2 * STEPS, 1)
        golden = _golden(made, jittered(x))
    y = golden["y"]
    with fresh(models) as directory:
        (directory / MODEL_FILE).write_bytes(_graph(made, torch.from_numpy(golden["x"])))
        np.savez_compressed(directory / GOLDEN_FILE, **golden)  # type: ignore[arg-type]
        number = version or next_version(models, name)
        layout = {"batch_axis": 0, "time_axis": 1 if made.has_time else None}
        try:
            manifest = Manifest(
                name=name,
                version=number,
                description=description,
                features=_described(Feature, features, "x", x.shape[-1]),
                outputs=_described(Output, classes or outputs, "y", y.shape[-1]),
                task="classification" if classes else "regression",
                classes=None if classes is None else tuple(classes),
                input=InputTensor(**layout, dtype=str(golden["x"].dtype)),  # type: ignore[arg-type]
                output=OutputTensor(**layout),  # type: ignore[arg-type]
                lengths=None,
                states=_tensors(made),
                provenance=_provenance(module),
                sha256=sha256_of(directory / MODEL_FILE),
            )
        except ValidationError as error:
            lines = "; ".join(f"{'.'.join(map(str, e['loc'])) or '$'}: {e['msg']}" for e in error.errors())
            raise ManifestError(f"the manifest would be wrong: {lines}") from error
        for what, have, want in (
            ("features", manifest.n_features, x.shape[-1]),
            ("outputs", manifest.n_outputs, y.shape[-1]),
        ):
            if have != want:
                raise ManifestError(
                    f"{what} are {have} in all, the module has {want}. Name each, or give blocks a width."
                )
        prove(Stepper.of(directory, manifest), golden, True, Tolerance())
    return publish(directory, manifest, models)


@torch.no_grad()
def _golden(made: Stepped, x: Tensor) -> dict[str, Floats]:
    """Torch's own answers: rows of different lengths, one empty; half of them go on from states of earlier steps.

    Args:
        made: The module.
        x: (ROWS, 2 * STEPS, F); the first half of the steps is what came earlier.
    """
    lengths, before = [STEPS, STEPS - 1, 0, STEPS, STEPS // 2, 1], made.initial(ROWS)
    _, used = _run(made, x[:3, :STEPS], made.initial(3))
    for tensor, after in zip(before, used, strict=True):
        tensor[:3] = after
    x, parts, ends = x[:, STEPS:].clone(), [], [tensor.clone() for tensor in before]
    for row, length in enumerate(lengths):
        x[row, length:] = 0
        if length:
            y, last = _run(made, x[row : row + 1, :length], [tensor[row : row + 1] for tensor in before])
            parts.append((row, y))
            for end, tensor in zip(ends, last, strict=True):
                end[row] = tensor[0]
    answers = torch.zeros(ROWS, STEPS, parts[0][1].shape[-1])
    for row, y in parts:
        answers[row, : y.shape[1]] = y[0]
    arrays = {"x": x.numpy(), "lengths": np.array(lengths, np.int32), "y": answers.numpy()}
    for side, tensors in (("state_in", before), ("state_out", ends)):
        arrays |= {f"{side}.{slot.name}": t.numpy() for slot, t in zip(made.slots, tensors, strict=True)}
    return arrays


def _run(made: Stepped, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Answers (B, T, O) for x (B, T, F): in one call where there is time, else step by step."""
    if made.has_time:
        y, *after = made(x, *states)
        if y.ndim != x.ndim or y.shape[:2] != x.shape[:2]:
            raise ManifestError(
                f"the module's outputs are {list(y.shape)} for x {list(x.shape)}, want one row for each step"
            )
        return y, after
    parts: list[Tensor] = []
    for now in x.unbind(1):
        y, *states = made(now, *states)
        if y.ndim != 2:
            raise ManifestError(f"the module's outputs are {list(y.shape)} for x {list(now.shape)}, want rank 2")
        parts.append(y)
    return torch.stack(parts, dim=1), list(states)


def _graph(made: Stepped, x: Tensor) -> bytes:
    """The module as a graph with inputs x and its states, and outputs y and its next states."""
    names = [slot.name for slot in made.slots]
    inputs, outputs = ["x", *names], ["y", *(f"{name}.out" for name in names)]
    steps = {1: "T"} if made.has_time else {}
    axes = {name: {0: "B", **(steps if name in "xy" else {})} for name in (*inputs, *outputs)}
    example = x[:2, :3] if made.has_time else x[:2, 0]
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells of its other exporter, which writes nn.RNN step by step
            torch.onnx.export(
                made,
                (example, *made.initial(2)),
                file,  # type: ignore[arg-type]  # this exporter writes to files that are open, too
                dynamo=False,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                dynamic_axes=axes,
            )
    except ManifestError:
        raise
    except Exception as error:  # torch's exporters raise what they like
        why = (str(error).strip().splitlines() or [""])[0]
        raise ManifestError(f"torch.onnx cannot export the module: {type(error).__name__}: {why}") from error
    return file.getvalue()


def _described(kind: Any, given: Sequence[Any] | None, letter: str, count: int) -> tuple[Any, ...]:
    """Features or outputs: names, or fields of the manifest, or the objects; named by number where nothing is given."""
    if given is None:
        return tuple(kind(name=f"{letter}{number}") for number in range(count))
    fields = [{"name": one} if isinstance(one, str) else one for one in given]
    return tuple(one if isinstance(one, kind) else kind.model_validate(one) for one in fields)


def _tensors(made: Stepped) -> tuple[StateTensor, ...]:
    return tuple(
        StateTensor(
            layer=slot.layer,
            key=slot.key,
            input=slot.name,
            output=f"{slot.name}.out",
            shape=slot.shape,
            initial=slot.initial,
        )
        for slot in made.slots
    )


def _provenance(module: nn.Module) -> Provenance:
    return Provenance(
        data=f"exported from torch module {type(module).__qualname__}; golden.npz holds torch's own answers",
        libraries={library: importlib.metadata.version(library) for library in LIBRARIES},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
