"""Several processes train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import fit, ragged_source, weights

PROCESS = """
import json, sys
import torch
sys.path[:0] = [{root!r}, {tests!r}]
from networks import training
from test_train import echo_network, ragged_source
from test_train_processes import AVERAGES, TOGETHER
from training.parallel import join, leave
from training.train import Trainer
world, found = join("cpu"), []
for average in AVERAGES:
    net = echo_network()
    history = Trainer(net, ragged_source(), training(**TOGETHER, average=average), world=world, seed=3).fit()
    found.append([history.losses, history.updates, [p.flatten().tolist() for p in net.parameters()]])
if world.leads:
    print("FOUND" + json.dumps([world.size, found]))
leave()
"""
AVERAGES = ("unmasked", "examples")
TOGETHER: dict[str, Any] = {
    "epochs": 3,
    "backprop": "truncated",
    "tbptt_forward": 4,
    "tbptt_backward": 3,
    "gradient": "clip_global_norm",
    "l2": 0.001,
}


@pytest.mark.slow
def test_torchrun_of_two_processes_equals_one_with_the_double_batch(tmp_path: Path) -> None:
    """gloo on one machine: each process takes half the rows of every batch; losses and weights are those of one."""
    root = Path(__file__).parents[1]
    (tmp_path / "run.py").write_text(PROCESS.format(root=str(root), tests=str(root / "tests")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ran = subprocess.run(
        [*torchrun, str(tmp_path / "run.py")], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stderr
    (line,) = [one for one in ran.stdout.splitlines() if one.startswith("FOUND")]
    size, found = json.loads(line.removeprefix("FOUND"))
    assert size == 2
    for average, (losses, updates, numbers) in zip(AVERAGES, found, strict=True):
        net, alone = fit(ragged_source(), **TOGETHER, average=average)
        assert updates == alone.updates
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone.losses), rtol=1e-5, atol=1e-5)
        for got, wanted in zip(numbers, weights(net), strict=True):
            torch.testing.assert_close(torch.tensor(got), wanted.flatten(), rtol=1e-4, atol=1e-5)
