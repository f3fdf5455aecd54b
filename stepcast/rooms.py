"""Where the service and the trainer are: below stepcast in an installed wheel, beside it in a checkout.

They are imported by name and only when asked for, since stepcast depends on neither.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Final, Literal

from .errors import ConfigError

Room = Literal["service", "training"]

_HERE: Final = Path(__file__).parent


def room(name: Room) -> Path:
    """The room's folder."""
    installed = _HERE / name
    return installed if installed.is_dir() else _HERE.parent / name


def module_of(name: Room) -> str:
    """The room's name for `import` and `python -m`.

    In a checkout its folder is put on the path where it is not yet.
    """
    if room(name).parent == _HERE:
        return f"{__package__}.{name}"
    checkout = str(_HERE.parent)
    if checkout not in sys.path:
        sys.path.append(checkout)
    return name


def load(module: str, extra: str) -> ModuleType:
    """Import a module that needs an extra.

    Raises:
        ConfigError: a library of the extra is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in (__package__, "service", "training"):
            raise
        raise ConfigError(missing(error.name, extra)) from error


def missing(library: str, extra: str) -> str:
    """What to say of a library that is not installed."""
    return f'{library.partition(".")[0]!r} is not installed. pip install "stepcast[{extra}]"'


def example_models() -> Path:
    """The model repository that comes with Stepcast: one small model in a wheel, the committed ones in a checkout."""
    carried = _HERE / "example_models"
    return carried if carried.is_dir() else _HERE.parent / "models"
