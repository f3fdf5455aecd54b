"""Examples of the documents: each succeeds as it stands on a server of the committed weather model."""

from typing import Any, Final

from ..bodies import READINGS

SESSION: Final = "kennedy"
_NEXT_HOURS: Final = {"time": "2013-11-02T03:00:00Z"}
_OBSERVED: Final = {"last": [[0.0] * 9], "before": [[[0.0] * 5] * 24], "seen": [[0.0]]}
_LAYER: Final = {"h": [[0.0] * 128], "c": [[0.0] * 128]}

PARAMETERS: Final[dict[str, Any]] = {
    "model": "weather",
    "session": SESSION,
    "layer": "observed",
    "version": 1,
    "prefix": "ken",
    "limit": 10,
    "force": True,
}

BODIES: Final[dict[str, Any]] = {
    "step": {"inputs": READINGS},
    "batch": {"sessions": [SESSION, "newark"], "inputs": [READINGS, READINGS]},
    "predict": {"inputs": [READINGS, READINGS]},
    "create": {"examples": 1},
    "state.set": {"state": {"observed": _OBSERVED, "lstm_0": _LAYER}},
    "layer": {"state": _OBSERVED},
    "fork": {},
    "checkpoint": {"name": "evening"},
    "rewind": {"to": "evening"},
    "rollout": {"steps": 3, "inputs": _NEXT_HOURS},
}
"""By verb; `layer`: of the state of one layer."""
