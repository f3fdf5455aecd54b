"""The speed harness that `python -m benchmarks` prints."""

import networks
import torch

from training.speed import compare

assert networks.CELLS


def test_speed_is_measured_and_threads_are_given_back() -> None:
    """Quickly: four positive ratios; how large they are is the benchmark's affair."""
    threads = torch.get_num_threads()
    ratios = compare(quick=True)
    assert len(ratios) == 4
    assert all(ratio > 0 for ratio in ratios.values())
    assert torch.get_num_threads() == threads
