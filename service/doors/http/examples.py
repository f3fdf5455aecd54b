"""Examples of the documents: each succeeds as it stands on a server of the committed weather model."""

from typing import Any, Final

SESSION: Final = "kennedy"
READINGS: Final = [39.02, 26.06, 59.37, 10.36, 1012.0, -1.0, 0.0, None, 0.0, 10.0, 0.5, 0.87, 0.98]
"""One hour at New York's airports, in the order of the manifest's features; nobody measured a gust."""
_KNOWN: Final = [*[None] * 10, 0.71, 0.71, 0.98]  # of the next hour: its time of day and year
_OBSERVED: Final = {"last": [[0.0] * 9]}
_LAYER: Final = {"h": [[0.0] * 64], "c": [[0.0] * 64]}

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
    "state.set": {"state": {"observed": _OBSERVED, "lstm_0": _LAYER, "lstm_1": _LAYER}},
    "layer": {"state": _OBSERVED},
    "fork": {},
    "checkpoint": {"name": "evening"},
    "rewind": {"to": "evening"},
    "rollout": {"steps": 1, "inputs": [_KNOWN]},
}
"""By verb; `layer`: of the state of one layer."""
