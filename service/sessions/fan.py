"""Sample paths of a rollout: each example runs once on its point forecasts, and beside it many times on draws.

An example's row is followed by the rows of its paths. All of them are rows of one batch.
"""

from typing import Any, Final

import numpy as np

from stepcast.errors import InvalidRequest
from stepcast.manifest import Manifest
from stepcast.predictive import Predictive

from ..engine.arrays import Floats

LEVELS: Final = (0.1, 0.5, 0.9)
"""What quantiles of the paths are answered by default, if the model has no levels of its own."""


class Fan:
    """The paths of one rollout.

    Args:
        manifest: Of the model.
        paths: How many for each example.
        levels: Of the quantiles; (): the model's, or `LEVELS`.
    """

    def __init__(self, manifest: Manifest, paths: int, levels: tuple[float, ...]) -> None:
        if manifest.distribution is None:
            text = f"model {manifest.name!r} forecasts no distribution from which paths could be drawn"
            raise InvalidRequest(f"{text}. Leave out $.paths.")
        self.predictive = Predictive(manifest.outputs, manifest.distribution)
        self.levels = levels or manifest.distribution.levels or LEVELS
        self.copies = 1 + paths
        self._values: list[Floats] = []

    def rows(self, values: Floats) -> Floats:
        """Each example's row, and its copies behind it."""
        return np.repeat(values, self.copies, axis=0)

    def states(self, state: bytes, rows: int) -> bytes:
        """The same of a state of so many rows."""
        each = np.frombuffer(state, np.uint8).reshape(rows, len(state) // rows)
        return np.repeat(each, self.copies, axis=0).tobytes()

    def values(self, outputs: Floats, random: np.random.Generator) -> Floats:
        """What outputs (R, O) say of the targets (R, K): an example's own row its point forecasts, the others draws.

        The generator is asked for the rows of the paths only.
        """
        values = outputs[:, self.predictive.points].reshape(-1, self.copies, len(self.predictive.targets))
        paths = outputs.reshape(len(values), self.copies, -1)[:, 1:]
        drawn = self.predictive.draw(paths.reshape(-1, outputs.shape[1]), random)
        values[:, 1:] = drawn.reshape(values[:, 1:].shape)
        return values.reshape(len(outputs), -1)

    def keep(self, values: Floats) -> None:
        """Take a step's values in."""
        self._values.append(values.reshape(-1, self.copies, values.shape[1])[:, 1:])

    def answer(self, whole: bool) -> dict[str, Any]:
        """Quantiles of the paths by target, [N,H,L]; `whole`: the paths themselves too, [N,P,H]."""
        paths = np.stack(self._values, axis=2)  # (N, P, H, K)
        quantiles = np.quantile(paths, self.levels, axis=1).astype(np.float32)  # (L, N, H, K)
        by_target = {name: quantiles[..., k].transpose(1, 2, 0) for k, name in enumerate(self.predictive.targets)}
        told: dict[str, Any] = {"levels": list(self.levels), "quantiles": by_target}
        if whole:
            told["paths"] = {name: paths[..., k] for k, name in enumerate(self.predictive.targets)}
        return told
