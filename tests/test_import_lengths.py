"""import: torch's packed sequences, whose lengths are int64 and whose empty rows have no state."""

import warnings
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from service.engine.imports.onnx_graphs import import_onnx
from service.engine.model import Runtime

F, H, ROWS, STEPS = 4, 3, 4, 6
LENGTHS = np.array([6, 4, 1, 0], np.int32)


class Packed(nn.Module):
    """An LSTM over a batch of sequences of different lengths; its caller gives the states, or it has none."""

    def __init__(self, ordered: bool) -> None:
        super().__init__()
        self.lstm, self.ordered = nn.LSTM(F, H, batch_first=True), ordered

    def forward(self, x: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.ordered)
        y, after = self.lstm(packed, states or None)
        y = pad_packed_sequence(y, batch_first=True)[0]
        return (y, *after) if states else (y,)


def exported(path: Path, network: Packed, given: bool) -> Path:
    """The network by torch's TorchScript exporter, which alone knows packed sequences."""
    states = {f"{letter}0": torch.zeros(1, 2, H) for letter in "hc"} if given else {}
    example = torch.zeros(2, 5, F), torch.tensor([5, 3]), *states.values()
    names = ["x", "lengths", *states]
    axes = {"x": {0: "rows", 1: "steps"}, "lengths": {0: "rows"}, **{name: {1: "rows"} for name in states}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, example, str(path), dynamo=False, verbose=False, input_names=names, dynamic_axes=axes
        )
    return path


@pytest.mark.parametrize("given", [True, False], ids=["states given", "states hidden"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "in any order"])
def test_packed_sequences_are_taken_in_with_their_lengths(tmp_path: Path, ordered: bool, given: bool) -> None:
    """Rows of different lengths in one call and single steps answer what torch does; an empty row keeps its state."""
    torch.manual_seed(3)
    network = Packed(ordered).eval()
    made = import_onnx(exported(tmp_path / "g.onnx", network, given), tmp_path, "m")
    runtime = Runtime(made.directory, device="cpu")
    assert runtime.manifest.lengths == "lengths"
    assert runtime.quicken() == ordered  # else the rows go through a sort first, which stays
    x = np.random.default_rng(4).normal(size=(ROWS, STEPS, F)).astype(np.float32)
    with torch.no_grad():
        want = nn.LSTM.forward(network.lstm, torch.from_numpy(x))[0].numpy()
    np.testing.assert_allclose(foreign.stepped(runtime, x), want, rtol=1e-5, atol=1e-6)
    before = np.random.default_rng(5).normal(size=(ROWS, 2 * H)).astype(np.float32)
    y, after = runtime.run(x, LENGTHS, before.view(np.uint8))
    states = [torch.from_numpy(before[None, :, at : at + H].copy()) for at in (0, H)]
    for row, length in enumerate(LENGTHS[:3]):
        with torch.no_grad():
            mine = (states[0][:, row : row + 1], states[1][:, row : row + 1])
            answers, ends = network.lstm(torch.from_numpy(x[row : row + 1, :length]), mine)
        np.testing.assert_allclose(y[row, :length], answers[0].numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after[row].view(np.float32), torch.cat(ends, 2)[0, 0].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after[3].view(np.float32), before[3])
