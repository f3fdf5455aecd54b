"""Recurrent networks of other libraries on the same rows: rivals in a backtest, by the extra `peers`.

Both are trained on the training rows, choose their epoch by the validation rows, and then forecast from every step that
the model is measured at, from the readings up to it. What they forecast is changes, whose sums are added to the last
reading: neither knows a residual, and levels of air pressure leave both behind persistence (docs/forecasts.md).

Letters: S series, L steps, R origins, O targets, F features.
"""

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from stepcast.errors import ConfigError

from .baselines import carried
from .data.table import TableSource

Floats = NDArray[np.float64]
EPOCHS = 20  # at most; fewer where validation rows no longer gain
PATIENCE = 4


class Peer(Protocol):
    """A network of another library, fitted to a source's training and validation rows."""

    def __init__(self, source: TableSource, distances: Sequence[int]) -> None: ...

    def forecasts(self, origin: NDArray[np.int64]) -> dict[int, Floats]:
        """Forecasts (S, R, O) by distance.

        Args:
            origin: (R,) consecutive steps; each forecast has seen readings up to its own. What lies behind the
                table's end may be NaN.
        """
        ...


class DartsLstm:
    """darts' `BlockRNNModel`: an LSTM over a window of readings that says the changes of all steps ahead at once.

    It is darts' recurrent model that takes past covariates: the changes of the targets are one multivariate series for
    each of the table's, all features covariates, everything standardised by the training rows.
    """

    WINDOW_DAYS = 2

    def __init__(self, source: TableSource, distances: Sequence[int]) -> None:
        from darts.models import BlockRNNModel
        from pytorch_lightning.callbacks import EarlyStopping

        self.distances, longest = distances, max(distances)
        (start, validation), (_, test), _ = (source.bounds[s] for s in ("train", "validation", "test"))
        values = carried(source.x.astype(np.float64))
        self.readings, changes = _targets(source, values)
        self.mean, self.scale, scaled = _standardised(changes, start, validation)
        self.targets = [_series(one) for one in scaled]
        self.covariates = [_series(one) for one in _standardised(values, start, validation)[2]]
        window = min(self.WINDOW_DAYS * _steps_of_a_day(source), (validation - start) // 2)
        stopped = EarlyStopping("val_loss", patience=PATIENCE)
        with _quiet(), tempfile.TemporaryDirectory(prefix="stepcast-darts-") as scratch:
            self.model = BlockRNNModel(
                input_chunk_length=window,
                output_chunk_length=longest,
                model="LSTM",
                hidden_dim=64,
                n_rnn_layers=2,
                dropout=0.3,
                batch_size=128,
                n_epochs=EPOCHS,
                optimizer_kwargs={"lr": 1e-3},
                random_state=source.seed,
                work_dir=scratch,
                save_checkpoints=True,
                force_reset=True,
                pl_trainer_kwargs={**_trainer(), "callbacks": [stopped]},
            )
            before = max(start, validation - window)  # the first validation labels have their window in training rows
            self.model.fit(
                [one[start:validation] for one in self.targets],
                past_covariates=self.covariates,
                val_series=[one[before:test] for one in self.targets],
                val_past_covariates=self.covariates,
                load_best=True,
            )

    def forecasts(self, origin: NDArray[np.int64]) -> dict[int, Floats]:
        """See `Peer`."""
        said = {ahead: np.full((len(self.targets), len(origin), len(self.mean)), np.nan) for ahead in self.distances}
        with _quiet():
            runs = self.model.historical_forecasts(
                self.targets,
                past_covariates=self.covariates,
                start=int(origin[0]) + 1,  # the first step that is forecast
                start_format="value",
                forecast_horizon=max(self.distances),
                retrain=False,
                overlap_end=True,
                last_points_only=False,
            )
        for series, run in enumerate(runs):
            for one in run:
                step = int(one.time_index[0]) - 1
                if origin[0] <= step <= origin[-1]:
                    path = self.readings[series, step] + np.cumsum(one.values() * self.scale + self.mean, axis=0)
                    for ahead in self.distances:
                        said[ahead][series, step - origin[0]] = path[ahead - 1]
        return said


class GluontsDeepar:
    """GluonTS' `DeepAREstimator` (Salinas et al., 2020): an LSTM that draws sample paths, one value at a time.

    It forecasts single series, so the changes of every target of every series are one, told apart by two static
    categories. It reads its own lags and time features, and the table's calendar; it has no place for readings that are
    not known in advance. A forecast is the mean of its sample paths.
    """

    PATHS = 50

    def __init__(self, source: TableSource, distances: Sequence[int]) -> None:
        from gluonts.torch.model.deepar import DeepAREstimator
        from lightning.pytorch import seed_everything
        from lightning.pytorch.callbacks import EarlyStopping

        self.distances = distances
        (start, validation), (_, test), _ = (source.bounds[s] for s in ("train", "validation", "test"))
        self.readings, self.changes = _targets(source, carried(source.x.astype(np.float64)))
        calendar = [k for k, channel in enumerate(source.channels) if channel.calendar is not None]
        self.known = source.x[0][:, calendar].T  # (C, L), of all series
        self.start = pd.Period(source.times[0].tz_localize(None), freq=source.config.every)
        self.seed = source.seed
        seed_everything(self.seed, verbose=False)  # windows and paths come from the global generators
        with _quiet(), tempfile.TemporaryDirectory(prefix="stepcast-gluonts-") as scratch:
            estimator = DeepAREstimator(
                freq=source.config.every,
                prediction_length=max(distances),
                context_length=2 * max(distances),
                num_feat_dynamic_real=len(calendar),
                num_feat_static_cat=2,
                cardinality=[len(self.readings), len(source.targets)],
                num_batches_per_epoch=150,
                num_parallel_samples=self.PATHS,
                trainer_kwargs={
                    **_trainer(),
                    "max_epochs": EPOCHS,
                    "default_root_dir": scratch,
                    "callbacks": [EarlyStopping("val_loss", patience=PATIENCE)],
                },
            )
            training = [self._item(s, o, start, validation) for s, o in self._places()]
            check = [self._item(s, o, start, test) for s, o in self._places()]
            self.predictor = estimator.train(training, validation_data=check)

    def _places(self) -> Iterator[tuple[int, int]]:
        return np.ndindex(self.readings.shape[0], self.readings.shape[2])

    def _item(self, series: int, target: int, start: int, stop: int, beyond: int = 0) -> dict[str, Any]:
        """Changes [start, stop) as GluonTS wants them, the calendar `beyond` steps further."""
        item: dict[str, Any] = {
            "start": self.start + start,
            "target": self.changes[series, start:stop, target],
            "feat_static_cat": np.array([series, target]),
        }
        if len(self.known):
            last = self.known.shape[1] - 1  # what is said of steps behind the table's end is not looked at
            item["feat_dynamic_real"] = self.known[:, np.minimum(np.arange(start, stop + beyond), last)]
        return item

    def forecasts(self, origin: NDArray[np.int64]) -> dict[int, Floats]:
        """See `Peer`."""
        longest = max(self.distances)
        said = {ahead: np.full(self.readings[:, origin].shape, np.nan) for ahead in self.distances}
        asked = [(s, o, r) for r in range(len(origin)) for s, o in self._places()]
        items = (self._item(s, o, 0, int(origin[r]) + 1, longest) for s, o, r in asked)
        torch.manual_seed(self.seed)
        with _quiet():
            for (s, o, r), forecast in zip(asked, self.predictor.predict(items), strict=True):
                path = self.readings[s, origin[r], o] + np.cumsum(forecast.mean)
                for ahead in self.distances:
                    said[ahead][s, r, o] = path[ahead - 1]
        return said


PEERS: dict[str, tuple[str, type[Peer]]] = {
    "darts": ("darts_lstm", DartsLstm),
    "gluonts": ("gluonts_deepar", GluontsDeepar),
}


def made_with(name: str) -> dict[str, str]:
    """Which version of a library this is, and which day."""
    return {"with": f"{name} {version(name)}", "on": datetime.now(UTC).date().isoformat()}


def chosen(text: str) -> tuple[str, ...]:
    """Names of libraries, separated by commas.

    Raises:
        ConfigError: one is none of `PEERS`, or not installed.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"--peers: {name!r} is none of {', '.join(PEERS)}")
        if find_spec(name) is None:
            raise ConfigError(f"--peers: {name!r} is not installed. pip install 'stepcast[peers]'")
    return names


def _targets(source: TableSource, values: Floats) -> tuple[Floats, Floats]:
    """Readings of the targets (S, L, O) among all features (S, L, F), and their changes from step to step."""
    names = [f.name for f in source.features]
    readings = values[..., [names.index(target) for target in source.targets]]
    return readings, np.diff(readings, axis=1, prepend=readings[:, :1])


def _standardised(values: Floats, start: int, stop: int) -> tuple[Floats, Floats, NDArray[np.float32]]:
    """Mean and deviation (F,) of the steps [start, stop), and all values (S, L, F) by them; 0 where unknown."""
    rows = values[:, start:stop]
    mean, scale = np.nan_to_num(np.nanmean(rows, axis=(0, 1))), np.nan_to_num(np.nanstd(rows, axis=(0, 1)), nan=1.0)
    scale[scale == 0] = 1.0
    return mean, scale, np.nan_to_num((values - mean) / scale).astype(np.float32)


def _series(values: NDArray[np.float32]) -> Any:
    """darts' series of (L, C), counted in steps."""
    from darts import TimeSeries

    return TimeSeries.from_times_and_values(pd.RangeIndex(len(values)), values)


def _steps_of_a_day(source: TableSource) -> int:
    return max(1, round(86_400 / source.every_s))


def _trainer() -> dict[str, Any]:
    """What both libraries hand to Lightning."""
    return {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hints that these libraries give to those who develop with them."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "gluonts", "darts")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
