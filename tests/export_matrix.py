"""What torch's exporters make of recurrent networks under usual names, imported unaided, beside torch's own answers.

`python tests/export_matrix.py` exports and imports all of it and writes the table into docs/import.md: some minutes.
"""

import contextlib
import io
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
import torch
from torch import nn

ROOT: Final = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from service.engine.imports.onnx_graphs import import_onnx  # noqa: E402
from service.engine.model import Runtime  # noqa: E402
from stepcast.errors import ManifestError  # noqa: E402

PAGE: Final = ROOT / "docs" / "import.md"
HEAD: Final = (
    "| exporter | axes | network | graphs | imported | sessions | a step takes |\n|---|---|---|---|---|---|---|\n"
)
F, H, OUTPUTS = 4, 3, 2
ROWS, STEPS = 3, 10
EXPORTERS: Final = {"TorchScript": False, "dynamo": True}
AXES: Final = ("dynamic", "fixed")
KINDS: Final = ("LSTM", "GRU", "RNN", "LSTMCell")
SAID_BY_NOBODY: Final = "exporter's own"

Names = Sequence[tuple[str, str]]


class Network(NamedTuple):
    """One of the networks: a kind of torch's, stacked, its batch first or second."""

    kind: str
    layers: int
    batch_first: bool

    @property
    def states(self) -> list[str]:
        """Its states, a letter and, for cells, a layer."""
        letters = "h" if self.kind in ("GRU", "RNN") else "hc"
        cells = range(self.layers) if self.kind == "LSTMCell" else [""]
        return [f"{letter}{layer}" for layer in cells for letter in letters]

    @property
    def label(self) -> str:
        """It in words."""
        return f"{self.kind}, {self.layers} layers, batch {'first' if self.batch_first else 'second'}"


NETWORKS: Final = {
    kind: [
        Network(kind, layers, first)
        for layers in (1, 2)
        for first in ((True,) if kind == "LSTMCell" else (True, False))
    ]
    for kind in KINDS
}

STYLES: Final = {  # {s}: h or c; {n}: the layer of a cell; {w}: a word for s
    "h_in, h_out": ("{s}{n}_in", "{s}{n}_out"),
    "h0, h0_out": ("{s}{n:0}", "{s}{n:0}_out"),
    "h0, hn": ("{s}0{n:.}", "{s}n{n:.}"),
    "hx, hy": ("{s}x{n:_}", "{s}y{n:_}"),
    "h, h_updated": ("{s}{n}", "{s}{n}_updated"),
    "h, h_new": ("{s}{n}", "{s}{n}_new"),
    "prev_h, next_h": ("prev_{s}{n}", "next_{s}{n}"),
    "state_h, state_hN": ("state_{s}{n}", "state_{s}{n}N"),
    "hidden_in, hidden_out": ("{w}_in{n:_}", "{w}_out{n:_}"),
    "past_key_values.0.key, present.0.key": ("past_key_values.{n:0}.{k}", "present.{n:0}.{k}"),
    "h_i, h_o": ("{s}{n}_i", "{s}{n}_o"),
}
_WORDS: Final = {"h": ("hidden", "key"), "c": ("cell", "value")}


class _Layer(str):
    """A layer's number in a name: `{n:_}` puts the sign before it, `{n:0}` stands for 0 where there is none."""

    def __format__(self, sign: str) -> str:
        if sign.isdigit():
            return self or sign
        return sign + self if self else ""


def names(style: str, network: Network) -> list[tuple[str, str]]:
    """Names of the states' inputs and outputs."""
    found = []
    for state in network.states:
        word, key = _WORDS[state[0]]
        values = {"s": state[0], "n": _Layer(state[1:]), "w": word, "k": key}
        before, after = (pattern.format(**values) for pattern in STYLES[style])
        found.append((before, after))
    return found


class Sequences(nn.Module):
    """A torch layer: x and states in, y and states out."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.layer = getattr(nn, network.kind)(F, H, network.layers, batch_first=network.batch_first)

    def forward(self, x: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, after = self.layer(x, states if len(states) > 1 else states[0])
        return (y, *after) if isinstance(after, tuple) else (y, after)


class Cells(nn.Module):
    """Cells in a row, one step: as people write them who want to stream."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.LSTMCell(F if layer == 0 else H, H) for layer in range(network.layers))
        self.head = nn.Linear(H, OUTPUTS)

    def forward(self, x: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        after = []
        for layer, cell in enumerate(self.cells):
            x, c = cell(x, (states[2 * layer], states[2 * layer + 1]))
            after += [x, c]
        return (self.head(x), *after)


def module_of(network: Network) -> nn.Module:
    """The network with weights of its own, always the same ones."""
    torch.manual_seed(sum(map(ord, network.label)))
    return (Cells if network.kind == "LSTMCell" else Sequences)(network).eval()


def example(network: Network, rows: int, steps: int) -> tuple[torch.Tensor, ...]:
    """x and zero states."""
    if network.kind == "LSTMCell":
        return torch.zeros(rows, F), *(torch.zeros(rows, H) for _ in network.states)
    shape = (rows, steps, F) if network.batch_first else (steps, rows, F)
    return torch.zeros(shape), *(torch.zeros(network.layers, rows, H) for _ in network.states)


def export(network: Network, path: Path, *, dynamo: bool, dynamic: bool) -> onnx.ModelProto:
    """The network by one of torch's exporters, under the names that this one gives; fixed: a row, a step."""
    options: dict[str, Any] = {}
    cell = network.kind == "LSTMCell"
    if dynamic:
        axes = {0: "batch"} if cell else {0: "batch", 1: "seq"} if network.batch_first else {0: "seq", 1: "batch"}
        state = {0 if cell else 1: "batch"}
        if dynamo:
            dims = {name: torch.export.Dim(name) for name in ("batch", "seq")}
            every = [
                {axis: dims[name] for axis, name in each.items()} for each in (axes, *([state] * len(network.states)))
            ]
            options["dynamic_shapes"] = (every[0], tuple(every[1:]))
        else:
            inputs = ["x", *(f"s{number}" for number in range(len(network.states)))]
            options["input_names"] = inputs
            options["dynamic_axes"] = {"x": axes, **dict.fromkeys(inputs[1:], state)}
    sizes = (2, 5) if dynamic else (1, 1)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            torch.onnx.export(
                module_of(network), example(network, *sizes), path, dynamo=dynamo, verbose=False, **options
            )
        finally:
            logging.disable(logging.NOTSET)
    return onnx.load(path)


def renamed(model: onnx.ModelProto, states: Names) -> onnx.ModelProto:
    """The same graph with x, y and these names of states."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    to = dict(zip([port.name for port in graph.input], ["x", *(before for before, _ in states)], strict=True))
    to |= dict(zip([port.name for port in graph.output], ["y", *(after for _, after in states)], strict=True))
    kept = {name for node in graph.node for name in (*node.input, *node.output)} - set(to)
    to |= {name: f"{name}_inside" for name in kept & set(to.values())}
    for port in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        port.name = to.get(port.name, port.name)
    for node in graph.node:
        for field in (node.input, node.output):
            every = [to.get(name, name) for name in field]
            del field[:]
            field.extend(every)
    return made


def truth(network: Network) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """x (B, T, F), and torch's own y (B, T, O) from zero states."""
    module = module_of(network)
    x = torch.from_numpy(np.random.default_rng(5).normal(size=(ROWS, STEPS, F)).astype(np.float32))
    _, *states = example(network, ROWS, STEPS)
    with torch.no_grad():
        if network.kind != "LSTMCell":
            y = module(x if network.batch_first else x.transpose(0, 1), *states)[0]
            return x.numpy(), (y if network.batch_first else y.transpose(0, 1)).numpy()
        parts = []
        for step in range(STEPS):
            part, *states = module(x[:, step], *states)
            parts.append(part)
    return x.numpy(), torch.stack(parts, 1).numpy()


class Result(NamedTuple):
    """What became of one graph: why it was refused, or how it is served and how far it is from torch."""

    refused: str
    rows: str = ""
    steps: int = 0
    error: float = 0.0


def take(model: onnx.ModelProto, network: Network, folder: Path) -> Result:
    """Import a graph unaided, and step it beside torch."""
    file = folder / "graph.onnx"
    onnx.save(model, file)
    try:
        made = import_onnx(file, folder / "models", "m")
    except ManifestError as error:
        return Result(str(error).replace(f"{file}: ", ""))
    runtime = Runtime(made.directory, device="cpu")
    runtime.quicken()
    steps, over = divmod(runtime.manifest.n_features, F)
    if over:
        return Result(f"{runtime.manifest.n_features} features were read, not a multiple of {F}")
    x, want = truth(network)
    states = np.frombuffer(runtime.initial(ROWS), np.uint8).reshape(ROWS, -1)
    parts = []
    for part in np.split(x, STEPS // steps, axis=1):
        y, states = runtime.run(np.ascontiguousarray(part.reshape(ROWS, 1, -1)), None, states)
        states = states.copy()
        parts.append(y.reshape(ROWS, steps, -1))
    return Result("", runtime.manifest.rows, steps, float(np.abs(np.concatenate(parts, 1) - want).max()))


def results(exporter: str, axes: str, network: Network, styles: Sequence[str] = ()) -> Iterator[tuple[str, Result]]:
    """Each style of names (default: all), the exporter's own first, and what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model = export(network, path / "export.onnx", dynamo=EXPORTERS[exporter], dynamic=axes == "dynamic")
        for number, style in enumerate(styles or [SAID_BY_NOBODY, *STYLES]):
            (path / str(number)).mkdir()
            called = model if style == SAID_BY_NOBODY else renamed(model, names(style, network))
            yield style, take(called, network, path / str(number))


def row(exporter: str, axes: str, kind: str) -> tuple[str, list[str]]:
    """A line of the table, and what was refused."""
    every = [(network, *found) for network in NETWORKS[kind] for found in results(exporter, axes, network)]
    served = [result for _, _, result in every if not result.refused and result.error < 1e-5]
    rows = {"many": "batched", "one": "row by row"}
    how = " or ".join(sorted({rows[result.rows] for result in served}))
    steps = " or ".join(f"{steps} steps" if steps > 1 else "a step" for steps in sorted({r.steps for r in served}))
    line = f"| {exporter} | {axes} | {kind} | {len(every)} | {len(served)} | {how} | {steps} |"
    wrong = [
        f"{exporter}, {axes}, {network.label}, {style}: {result.refused or f'off by {result.error:.1e}'}"
        for network, style, result in every
        if result not in served
    ]
    return line, wrong


def main() -> None:
    """Write the table into the page; refusals are printed."""
    lines = []
    for exporter, axes, kind in itertools.product(EXPORTERS, AXES, KINDS):
        line, wrong = row(exporter, axes, kind)
        print("\n  ".join([line, *wrong]), flush=True)
        lines.append(line)
    text = PAGE.read_text()
    before, found, after = text.partition(HEAD)
    if not found:
        raise SystemExit(f"{PAGE}: the head of the table is not there")
    _, end, after = after.partition("\n\n")
    PAGE.write_text(before + HEAD + "\n".join(lines) + end + after)


if __name__ == "__main__":
    main()
