"""The open end: any Python class that is a `Source`."""

import importlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stepcast.errors import ConfigError

from .source import Source


class PythonConfig(BaseModel):
    """`data: {kind: python, target: "package.module:Class", kwargs: {...}}`.

    The class is called with `batch`, `seed` and `root` (see `SourceConfig.open`) and with `kwargs`. Its module has
    to be importable: installed, on PYTHONPATH, or below the directory the command is started in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["python"]
    target: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:Class")
    kwargs: dict[str, Any] = {}

    def open(self, *, batch: int, seed: int, root: Path) -> Source:
        """Import the class, make one, and see that it is a `Source`; see `SourceConfig.open`."""
        reserved = sorted({"batch", "seed", "root"} & self.kwargs.keys())
        if reserved:
            raise ConfigError(f"data.kwargs.{reserved[0]}: is given by the trainer, not by data.kwargs")
        factory = self._import()
        try:
            source = factory(batch=batch, seed=seed, root=root, **self.kwargs)
        except TypeError as error:
            raise ConfigError(f"data.kwargs: {self.target} does not take them ({error})") from error
        if not isinstance(source, Source):
            wanted = [name for name in dir(Source) if not name.startswith("_") and not hasattr(source, name)]
            raise ConfigError(f"data.target: {self.target} is no data source, it lacks {', '.join(wanted)}")
        return source

    def _import(self) -> Any:
        module, _, name = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"data.target: {self.target!r} can not be imported ({error})") from error
