"""Models from other frameworks, as model directories. What needs torch is loaded when it is first asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ManifestError
from .rooms import load, module_of


def export(
    module: Any,
    example: Any,
    *,
    name: str | None = None,
    states: Any = None,
    features: Sequence[Any] | None = None,
    outputs: Sequence[Any] | None = None,
    classes: Sequence[str] | None = None,
    models: str | Path = "models",
    version: int | None = None,
    path: str | Path | None = None,
    description: str = "",
) -> Path:
    """Write a torch module with a state as a model directory: model.onnx, manifest.json, golden.npz.

    golden.npz holds torch's own answers: rows of several lengths, from fresh and from used states. onnxruntime must
    reproduce them in one call, in blocks and step by step, else nothing is written. The module is not changed.

    Args:
        module: nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell, or any module whose forward takes
            `(x, state)` and gives `(y, next state)`.
        example: x as the module takes it, with a batch: readings such as the model will be given.
        name: The model's name.
        states: The state of a session that begins, as the module takes it: a tensor, or tensors in tuples, lists and
            dicts. torch's own layers and cells need none.
        features: Names of the inputs, or features of the manifest; by default x0, x1, ...
        outputs: Names of the outputs, or outputs of the manifest; by default y0, y1, ...
        classes: Names of the classes, where the outputs are their probabilities.
        models: The model repository.
        version: By default the next free one.
        path: The model directory, REPOSITORY/NAME/VERSION, in place of `models`, `name` and `version`.
        description: One line for the manifest.

    Returns:
        The model directory.

    Raises:
        ManifestError: the module cannot be exported, or the graph does not answer as torch does.
        ConfigError: torch is not installed.
    """
    if path is not None:
        whole = Path(path)
        if name is not None or version is not None or not whole.name.isdecimal():
            raise ManifestError(f"path is {str(path)!r}, want REPOSITORY/NAME/VERSION, and neither name nor version")
        models, name, version = whole.parent.parent, whole.parent.name, int(whole.name)
    if name is None:
        raise ManifestError("the model has no name. Give name, or path.")
    room = load(f"{module_of('training')}.torch_export", "training")
    made: Path = room.export(
        module,
        example,
        name=name,
        states=states,
        features=features,
        outputs=outputs,
        classes=classes,
        models=Path(models),
        version=version,
        description=description,
    )
    return made
