"""stepcast.export: torch modules as model directories, whose steps are torch's own; or one line says why not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import reading
from serving import ROOT, running
from torch import Tensor, nn

import stepcast
from service.engine.model import Runtime
from stepcast.errors import ManifestError
from stepcast.manifest import read_manifest

F, H = 3, 4
zeros = torch.zeros


class Both(nn.Module):
    """Two layers of LSTM and a cell of its own, states in a dict, one of which is a tuple."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.lower, self.upper = nn.LSTM(F, H, 2, batch_first=batch_first), nn.Linear(H + 1, 2)
        self.axis = int(batch_first)

    def forward(self, x: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        hidden, lower = self.lower(x, state["lower"])
        level = state["level"].unsqueeze(self.axis) + x.sum(dim=-1, keepdim=True).cumsum(dim=self.axis)
        y = self.upper(torch.cat([hidden, level], dim=-1))
        return y, {"lower": lower, "level": level.select(self.axis, -1)}


class Tuple(nn.Module):
    """One step at a time; the state is a nested tuple that begins with ones."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(F, H)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, (count,) = state
        h = self.cell(x, h)
        return h * count, (h, (count + 1,))


def begun(batch: int, **sizes: int) -> dict[str, Any]:
    """The state of `Both` for a batch."""
    return {"lower": (zeros(2, batch, H), zeros(2, batch, H)), "level": zeros(batch, 1)}


def seeded(module: type[nn.Module], *arguments: Any, **options: Any) -> nn.Module:
    """A module with weights that are always the same."""
    torch.manual_seed(3)
    return module(*arguments, **options)


CASES: dict[str, tuple[nn.Module, Any, Any, list[str]]] = {
    "lstm": (
        seeded(nn.LSTM, F, H, 2, batch_first=True),
        (2, 5, F),
        None,
        ["lstm_0.h", "lstm_0.c", "lstm_1.h", "lstm_1.c"],
    ),
    "lstm time first": (seeded(nn.LSTM, F, H), (5, 2, F), None, ["lstm_0.h", "lstm_0.c"]),
    "gru": (seeded(nn.GRU, F, H, 2, batch_first=True, dropout=0.5), (1, 5, F), None, ["gru_0.h", "gru_1.h"]),
    "rnn": (seeded(nn.RNN, F, H, nonlinearity="relu"), (5, 1, F), None, ["rnn_0.h"]),
    "lstm cell": (seeded(nn.LSTMCell, F, H), (2, F), None, ["lstm_0.h", "lstm_0.c"]),
    "gru cell": (seeded(nn.GRUCell, F, H), (2, F), None, ["gru_0.h"]),
    "dict": (seeded(Both), (2, 5, F), begun(2), ["lower.0", "lower.1", "state.level"]),
    "dict time first": (seeded(Both, batch_first=False), (5, 1, F), begun(1), ["lower.0", "lower.1", "state.level"]),
    "tuple": (seeded(Tuple), (2, F), (zeros(2, H), (torch.ones(2, 1),)), ["state.0", "1.0"]),
}


@torch.no_grad()
def answers(name: str, x: Tensor) -> Any:
    """Torch's own answers (1, T, O) for one sequence x (1, T, F), from the initial state."""
    module, shape, states, _ = CASES[name]
    module = module.eval()
    if len(shape) == 2:
        state, parts = states, []
        state = None if states is None else (zeros(1, H), (torch.ones(1, 1),))
        for now in x.unbind(1):
            if states is None:
                state = module(now, state)
                parts.append(state[0] if isinstance(state, tuple) else state)
            else:
                y, state = module(now, state)
                parts.append(y)
        return torch.stack(parts, dim=1).numpy()
    first = "time first" in name or name == "rnn"
    given = x.transpose(0, 1) if first else x
    y = module(given, begun(1))[0] if states is not None else module(given)[0]
    return (y.transpose(0, 1) if first else y).numpy()


@pytest.mark.parametrize("name", CASES)
def test_steps_of_what_was_exported_are_torchs(tmp_path: Path, name: str) -> None:
    """States by name, and nine single steps of two sessions at once by onnxruntime."""
    module, shape, states, want = CASES[name]
    module.train()
    directory = stepcast.export(module, torch.randn(shape), states=states, name="m", models=tmp_path)
    assert directory == tmp_path / "m" / "1"
    assert module.training  # a copy was exported
    runtime = Runtime(directory, device="cpu")
    runtime.prove()
    runtime.quicken()
    assert [f"{s.layer}.{s.key}" for s in runtime.manifest.states] == want
    x = torch.randn(2, 9, F)
    before, parts = np.frombuffer(runtime.initial(2), np.uint8).reshape(2, -1), []
    for now in x.unbind(1):
        after = np.empty_like(before)
        parts.append(runtime.step(now.contiguous().numpy(), [before], [after]))
        before = after
    expected = np.concatenate([answers(name, row[None]) for row in x])
    np.testing.assert_allclose(np.stack(parts, axis=1), expected, 1e-5, 1e-5)


def test_names_are_served(tmp_path: Path) -> None:
    """Features and outputs by name, another version, a path in place of a name; from a module to a session's step."""
    module = seeded(nn.GRU, F, 1, batch_first=True)
    names = {"features": [{"name": "flow", "unit": "l/s"}, {"name": "both", "width": 2}], "outputs": ["next"]}
    for number in (1, 2):
        stepcast.export(module, torch.randn(1, 4, F), path=tmp_path / "pump" / str(number), **names)
    assert read_manifest(tmp_path / "pump" / "2").features[0].unit == "l/s"
    with running(store="memory://", models=tmp_path) as server, stepcast.Client(server.url) as client:
        session = client.session("pump", "north")
        got = [session.step({"flow": 1.0, "both": [2.0, step]}).outputs["next"] for step in (3.0, 4.0)]
    with torch.no_grad():
        want = module(torch.tensor([[[1.0, 2.0, 3.0], [1.0, 2.0, 4.0]]]))[0]
    np.testing.assert_allclose(got, want[0, :, 0].numpy(), 1e-5, 1e-6)


class Broken(nn.Module):
    """A module of (x, state) that does as it is told."""

    def __init__(self, does: Any) -> None:
        super().__init__()
        self.does = does

    def forward(self, x: Tensor, state: Any) -> Any:
        return self.does(x, state)


X, ONE = torch.randn(2, 5, F), zeros(2, F)
REFUSED: dict[str, tuple[nn.Module, Any, dict[str, Any], str]] = {
    "bidirectional": (nn.LSTM(F, H, bidirectional=True), X, {}, "is bidirectional"),
    "projected": (nn.LSTM(F, H, proj_size=2), X, {}, "has proj_size 2, which ONNX does not know"),
    "double": (nn.GRU(F, H).double(), X, {}, "weights are torch.float64, want torch.float32"),
    "rank": (nn.GRU(F, H), torch.randn(5, F), {}, r"example is \[5, 3\], want rank 3"),
    "no state": (nn.Linear(F, H), X, {}, "states of Linear are not known. Give the state"),
    "known states": (nn.GRU(F, H), X, {"states": ONE}, "states of GRU are known. Leave them out"),
    "one value": (Broken(lambda x, s: (x, s)), X, {"states": torch.arange(6.0).view(2, 3)}, "has different values"),
    "no pair": (Broken(lambda x, s: x), X, {"states": ONE}, "the module gives a Tensor, want a pair"),
    "another state": (Broken(lambda x, s: (x, (s, s))), X, {"states": ONE}, "takes the state tensors"),
    "another shape": (
        Broken(lambda x, s: (x, s.repeat(1, 2))),
        X,
        {"states": ONE},
        r"goes in as \[3\], comes out as \[6\]",
    ),
    "mixed rows": (Broken(lambda x, s: (x + x.mean(dim=0), s)), X, {"states": ONE}, "depends on the rows beside it"),
    "raises": (Broken(lambda x, s: (x @ x, s)), X, {"states": ONE}, "cannot be run by rows.*RuntimeError"),
    "future": (Broken(lambda x, s: (x.flip(1), s)), X, {"states": ONE}, "onnxruntime and torch differ"),
    "one answer": (Broken(lambda x, s: (x[:, -1], s)), X, {"states": ONE}, "want one row for each step"),
    "names": (nn.GRU(F, H), X, {"features": ["a", "b"]}, "features are 2 in all, the module has 3"),
    "model name": (nn.GRU(F, H), X, {"name": "a/b"}, "name: String should match"),
    "path": (nn.GRU(F, H), X, {"path": "models/pump", "name": None}, "want REPOSITORY/NAME/VERSION"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_exported_is_told_in_one_line(tmp_path: Path, why: str) -> None:
    """And nothing is left behind."""
    module, x, options, said = REFUSED[why]
    with pytest.raises(ManifestError, match=said) as error:
        stepcast.export(module, x, **{"name": "m", "models": tmp_path / "models", **options})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("models/*"))


def test_the_page_works_from_an_empty_directory(tmp_path: Path) -> None:
    """docs/export.md: its programs and commands, in order."""
    with reading(ROOT / "docs" / "export.md", tmp_path) as reader:
        assert reader.read() >= 4
