"""Which store a URL and a durability level mean."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from stepcast.errors import ConfigError

from . import Store
from . import StoreOptions as StoreOptions
from .memory import MemoryStore
from .sqlite import SqliteStore
from .streams import Sink, Source, StreamPlace
from .write_behind import BehindStore

if TYPE_CHECKING:
    from .redis.topology import Nodes

DURABILITIES: Final = ("commit", "replicated", "interval")
_REDIS: Final = frozenset({"redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"})
_TLS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
_SENTINEL: Final = ("sentinel_username", "sentinel_password")


def open_store(url: str, *, durability: str = "commit", options: StoreOptions | None = None) -> Store:
    """The store that `url` names, not connected yet: the caller awaits its open().

    Raises ConfigError: an unknown scheme or option, or a durability that the store does not have.
    """
    options = replace(options or StoreOptions(), durability=durability)
    if durability not in DURABILITIES:
        raise ConfigError(f"durability is {durability!r}. Take one of {', '.join(DURABILITIES)}.")
    parts = urlsplit(url)
    base: Store
    if durability == "replicated" and parts.scheme not in _REDIS:
        raise ConfigError(f"durability 'replicated' needs Redis, got store {parts.scheme!r}.")
    if parts.scheme == "memory":
        base = MemoryStore()
    elif parts.scheme == "sqlite":
        base = _sqlite(parts, options)
    elif parts.scheme in _REDIS:
        base = _redis(parts, options)
    else:
        raise ConfigError(f"store scheme is {parts.scheme!r}. Take memory, sqlite or {', '.join(sorted(_REDIS))}.")
    return BehindStore(base, options.interval_s) if durability == "interval" else base


def _sqlite(parts: SplitResult, options: StoreOptions) -> SqliteStore:
    """sqlite:///relative.db, sqlite:////absolute.db, ?synchronous=full."""
    path = unquote(parts.path)[1:]
    if parts.netloc or not path or path == ":memory:":
        raise ConfigError(f"{parts.geturl()!r} names no file. Write sqlite:///relative.db or sqlite:////absolute.db.")
    query = _query(parts, ("synchronous",))
    synchronous = query.get("synchronous", "normal").lower()
    if synchronous not in ("normal", "full"):
        raise ConfigError(f"option synchronous of the store URL is {synchronous!r}. Take normal or full.")
    return SqliteStore(path, full_sync=synchronous == "full", busy_timeout_s=options.reply_timeout_s)


def _redis(parts: SplitResult, options: StoreOptions) -> Store:
    from .redis.store import RedisStore  # here, so that other stores need no client of Redis in memory

    return RedisStore(_nodes(parts, options))


def open_source(url: str, place: StreamPlace, options: StoreOptions) -> Source:
    """Streams to be stepped, not connected yet. Raises ConfigError: the URL names no Redis, or a cluster."""
    from .redis.streams import RedisSource

    return RedisSource(_one_redis(url, options), _one_redis(url, replace(options, durability="commit")), place)


def open_sink(url: str, place: StreamPlace, options: StoreOptions) -> Sink:
    """The stream for what was stepped; otherwise the same."""
    from .redis.streams import RedisSink

    return RedisSink(_one_redis(url, options), place.sink, place.keep)


def _one_redis(url: str, options: StoreOptions) -> "Nodes":
    parts = urlsplit(url)
    if parts.scheme not in _REDIS or parts.scheme.endswith("+cluster"):
        raise ConfigError(f"streams lie in one Redis, got {parts.scheme!r}. Give redis:// or redis+sentinel://.")
    return _nodes(parts, options)


def _nodes(parts: SplitResult, options: StoreOptions) -> "Nodes":
    """redis://[[user]:password@]host[:port][/db], and the same with several hosts for Sentinel and Cluster."""
    from .redis.connection import connect
    from .redis.topology import Cluster, Node, Nodes, connect_primary, servers_of

    scheme, _, kind = parts.scheme.partition("+")
    query = _query(parts, (*(_TLS if scheme == "rediss" else ()), *(_SENTINEL if kind == "sentinel" else ())))
    path = parts.path.strip("/")
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if not service:
            raise ConfigError("store URL names no service. Write redis+sentinel://host:port,host:port/service_name/db.")
        entry = {name: query.pop(f"sentinel_{name}", None) for name in ("username", "password")}
        servers = servers_of(parts, scheme, path, query, 26379)
        sentinels = [replace(server, options={**server.options, "db": 0, **entry}) for server in servers]
        primary = Node(servers[0], lambda: connect_primary(sentinels, unquote(service), servers[0], options), options)
        return Nodes(primary, options)
    servers = servers_of(parts, scheme, path, query, 6379)
    if kind == "cluster":
        if path not in ("", "0"):
            raise ConfigError(f"store URL asks for database {path!r}. A cluster has only one; leave it out.")
        return Cluster(servers, options)
    if len(servers) > 1:
        raise ConfigError(f"store URL names {len(servers)} hosts. Write redis+cluster:// or redis+sentinel://.")
    return Nodes(Node(servers[0], lambda: connect(servers[0], options), options), options)


def _query(parts: SplitResult, known: Sequence[str]) -> dict[str, str]:
    """The options after the question mark."""
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in query.keys() - set(known):
        has = f"Known here: {', '.join(sorted(known))}" if known else "It takes none"
        raise ConfigError(f"store URL has the unknown option {name!r}. {has}.")
    return query
