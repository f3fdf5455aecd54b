"""Which store a URL and a durability level mean."""

from pathlib import Path
from typing import Final, Literal, get_args
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from service.store import Store
from service.store.memory import MemoryStore
from service.store.sqlite import SqliteStore
from stepcast.errors import ConfigError

Durability = Literal["commit", "replicated", "interval"]
DURABILITIES: Final[tuple[str, ...]] = get_args(Durability)


def open_store(url: str, *, durability: str = "commit") -> Store:
    """The store that `url` names, not yet connected: the caller awaits its open().

    Raises:
        ConfigError: an unknown scheme or option, or a durability that the store does not have.
    """
    if durability not in DURABILITIES:
        raise ConfigError(f"durability is {durability!r}. Take one of {', '.join(DURABILITIES)}.")
    parts = urlsplit(url)
    if parts.scheme == "memory":
        return MemoryStore()
    if parts.scheme == "sqlite":
        return _sqlite(parts)
    raise ConfigError(f"store URL {url!r} is of no known kind.")


def _sqlite(parts: SplitResult) -> SqliteStore:
    """sqlite:///relative.db, sqlite:////absolute.db, ?synchronous=full."""
    path = unquote(parts.path)[1:]
    if parts.netloc or not path or path == ":memory:":
        raise ConfigError(f"{parts.geturl()!r} names no file. Write sqlite:///relative.db or sqlite:////absolute.db.")
    options = parse_qs(parts.query, strict_parsing=bool(parts.query))
    synchronous = options.pop("synchronous", ["normal"])[-1].lower()
    if options or synchronous not in ("normal", "full"):
        raise ConfigError(f"{parts.geturl()!r}: the only option is synchronous=normal or synchronous=full.")
    return SqliteStore(Path(path), full_sync=synchronous == "full")
