"""Small films of moving shapes: which shape is it, frame by frame?

After DL4J's video example: every film shows one shape after another, each for a stretch of frames, and each frame's
label is the shape of that moment. Frames are noisy and now and then the shape is hidden, so that one frame alone does
not tell: the network has to remember.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepcast.errors import ConfigError
from stepcast.manifest import Feature

from ..data.align import Array, one_hot
from ..data.in_memory import Classified, Examples, in_splits

SHAPES = ("ring", "square", "cross", "line")
RADIUS = 3.0


class MovingShapes(Classified):
    """A `Source`: frames flattened row by row into one feature of width size * size, a class per frame.

    Args:
        batch: Films per batch.
        seed: Of the films and of their order.
        root: Not used; there are no files.
        train: Films to train on.
        validation: Films to validate with.
        test: Films to test with.
        size: Pixels per side.
        frames: Fewest and most frames of a film.
        hidden: Share of the frames in which the shape cannot be seen.
        noise: Standard deviation of every pixel; the shape itself has brightness 1.
    """

    def __init__(
        self,
        *,
        batch: int,
        seed: int,
        root: Path,
        train: int = 300,
        validation: int = 60,
        test: int = 100,
        size: int = 16,
        frames: tuple[int, int] = (20, 30),
        hidden: float = 0.2,
        noise: float = 0.3,
    ) -> None:
        if size < 4 * RADIUS or not 1 <= frames[0] <= frames[1]:
            raise ConfigError(f"data.options: size {size} (at least {4 * RADIUS:.0f}), frames {list(frames)}")
        rng = np.random.default_rng([seed, 130])
        camera = Camera(rng, size, hidden, noise)
        super().__init__(
            in_splits(lambda count: _films(camera, count, frames), train=train, validation=validation, test=test),
            Feature(name="frame", width=size * size),
            SHAPES,
            batch=batch,
            seed=seed,
            readout="each",
            description=f"films of moving shapes, {size} x {size} pixels, {train} to train on",
        )


class Camera:
    """Draws films of `size` x `size` pixels."""

    def __init__(self, rng: np.random.Generator, size: int, hidden: float, noise: float) -> None:
        self.rng, self.size, self.hidden, self.noise = rng, size, hidden, noise
        self.rows, self.columns = np.mgrid[:size, :size].astype(np.float32)

    def film(self, frames: int) -> tuple[Array, NDArray[np.int64]]:
        """One film: pixels [frames, size * size] and the shape of each frame [frames]."""
        shapes = self._shapes(frames)
        paths = np.stack([self._path(frames) for _ in range(2)], axis=1)  # (T, 2)
        picture = np.stack([self._draw(shape, *place) for shape, place in zip(shapes, paths, strict=True)])
        picture[self.rng.random(frames) < self.hidden] = 0
        picture += self.rng.normal(0, self.noise, picture.shape)
        return picture.reshape(frames, -1).astype(np.float32), shapes

    def _shapes(self, frames: int) -> NDArray[np.int64]:
        """One to three stretches of at least four frames."""
        stretches = min(int(self.rng.integers(1, 4)), max(1, frames // 4))
        kinds = self.rng.permutation(len(SHAPES))[:stretches]
        return np.repeat(kinds, np.diff(np.linspace(0, frames, stretches + 1).astype(int)))

    def _path(self, frames: int) -> NDArray[np.float64]:
        """Steady motion along one axis, thrown back at the walls."""
        room = self.size - 1 - 2 * RADIUS
        way = self.rng.uniform(0, room) + self.rng.uniform(-1.5, 1.5) * np.arange(frames)
        return np.asarray(RADIUS + np.abs((way + room) % (2 * room) - room))

    def _draw(self, shape: int, row: float, column: float) -> NDArray[np.float32]:
        down, right = np.abs(self.rows - row), np.abs(self.columns - column)
        inside = (
            np.abs(np.hypot(down, right) - RADIUS + 0.7) <= 0.7,
            np.maximum(down, right) <= RADIUS - 0.5,
            (np.minimum(down, right) <= 0.7) & (np.maximum(down, right) <= RADIUS),
            (down <= 0.7) & (right <= RADIUS),
        )[shape]
        return np.asarray(inside, np.float32)


def _films(camera: Camera, count: int, frames: tuple[int, int]) -> Examples:
    films = [camera.film(int(camera.rng.integers(frames[0], frames[1] + 1))) for _ in range(count)]
    return Examples([pixels for pixels, _ in films], [one_hot(shapes, len(SHAPES)) for _, shapes in films])
