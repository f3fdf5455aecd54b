"""Training's ratios, printed by the same command: the training package's own harness, where it has one."""

import importlib
import importlib.util
from typing import Any

HARNESS = "training.speed"
"""A module with `compare(quick: bool) -> dict[str, float]`: ratio by what it compares."""


def ratios(quick: bool) -> dict[str, Any]:
    """What the harness measured, or why it could not."""
    if importlib.util.find_spec("torch") is None:
        return {"absent": "package 'torch' is not installed (extra `training`)"}
    if importlib.util.find_spec(HARNESS) is None:
        return {"absent": f"there is no {HARNESS} yet"}
    return dict(importlib.import_module(HARNESS).compare(quick))
