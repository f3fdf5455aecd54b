"""The open end: any Python class that is a `Source`."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stepcast.errors import ConfigError

from .source import Source


class PythonConfig(BaseModel):
    """`data: {kind: python, class: "package.module:Name", options: {...}}`.

    The class is called with `batch`, `seed` and `root` (see `SourceConfig.open`) and with the options. Its module has
    to be importable: installed, on PYTHONPATH, or below the directory the command is started in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    kind: Literal["python"]
    class_: str = Field(alias="class", pattern=r"^[\w.]+:\w+$", description="module:Name")
    options: dict[str, Any] = {}

    def open(self, *, batch: int, seed: int, root: Path) -> Source:
        """Import the class, make one, and see that it is a `Source`; see `SourceConfig.open`."""
        reserved = sorted({"batch", "seed", "root"} & self.options.keys())
        if reserved:
            raise ConfigError(f"data.options.{reserved[0]}: is given by the trainer, it cannot be an option")
        maker = self._import()
        arguments = {"batch": batch, "seed": seed, "root": root, **self.options}
        try:
            inspect.signature(maker).bind(**arguments)
        except TypeError as error:
            raise ConfigError(f"data.options: {self.class_} does not take them ({error})") from error
        source = maker(**arguments)
        if not isinstance(source, Source):
            lacking = [name for name in dir(Source) if not name.startswith("_") and not hasattr(source, name)]
            raise ConfigError(f"data.class: {self.class_} is no data source, it lacks {', '.join(lacking)}")
        return source

    def _import(self) -> Any:
        module, _, name = self.class_.partition(":")
        if re.match(r"(stepcast\.)?training\.", module):  # ours: below stepcast in an installed wheel
            module = __package__.partition("training")[0] + module.removeprefix("stepcast.")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"data.class: {self.class_!r} cannot be imported ({error})") from error
