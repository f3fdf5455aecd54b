"""Which store a URL and a durability level mean."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from stepcast.errors import ConfigError

from . import Store
from .memory import MemoryStore
from .redis.connection import Server, Timeouts, connect
from .redis.store import LOAD_SCRIPT, RedisStore
from .redis.topology import Cluster, Node, Nodes, Replication, Single, ask_sentinels
from .sqlite import SqliteStore
from .write_behind import BehindStore

DURABILITIES: Final = ("commit", "replicated", "interval")
_REDIS: Final = frozenset({"redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"})
_REDIS_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What a URL does not say.

    Args:
        durability: When a commit is acknowledged: `commit` (the store has it), `replicated` (and so have
            `replicas` replicas; Redis only), `interval` (at once; the store has it within `interval_s`).
        interval_s: The loss window of `interval`.
        replicas: How many replicas `replicated` waits for.
        replica_timeout_s: And for how long.
        connect_timeout_s: Until a server counts as gone (Redis).
        reply_timeout_s: Until a reply counts as lost (Redis), or another process's lock as stuck (SQLite).
    """

    durability: str = "commit"
    interval_s: float = 1.0
    replicas: int = 1
    replica_timeout_s: float = 0.5
    connect_timeout_s: float = 1.0
    reply_timeout_s: float = 1.0


def open_store(url: str, *, durability: str = "commit", options: StoreOptions | None = None) -> Store:
    """The store that `url` names, not connected yet: the caller awaits its open().

    Raises:
        ConfigError: an unknown scheme or option, or a durability that the store does not have.
    """
    options = replace(options or StoreOptions(), durability=durability)
    if durability not in DURABILITIES:
        raise ConfigError(f"durability is {durability!r}. Take one of {', '.join(DURABILITIES)}.")
    parts = urlsplit(url)
    if durability == "replicated" and parts.scheme not in _REDIS:
        raise ConfigError(f"durability 'replicated' needs Redis, got store {parts.scheme!r}.")
    base = _base(parts, options)
    return BehindStore(base, options.interval_s) if durability == "interval" else base


def _base(parts: SplitResult, options: StoreOptions) -> Store:
    if parts.scheme == "memory":
        return MemoryStore()
    if parts.scheme == "sqlite":
        return _sqlite(parts, options)
    if parts.scheme in _REDIS:
        return RedisStore(_redis(parts, options))
    raise ConfigError(f"store scheme is {parts.scheme!r}. Take memory, sqlite or {', '.join(sorted(_REDIS))}.")


def _sqlite(parts: SplitResult, options: StoreOptions) -> SqliteStore:
    """sqlite:///relative.db, sqlite:////absolute.db, ?synchronous=full."""
    path = unquote(parts.path)[1:]
    if parts.netloc or not path or path == ":memory:":
        raise ConfigError(f"{parts.geturl()!r} names no file. Write sqlite:///relative.db or sqlite:////absolute.db.")
    query = _query(parts, {"synchronous"})
    synchronous = query.get("synchronous", "normal").lower()
    if synchronous not in ("normal", "full"):
        raise ConfigError(f"option synchronous of the store URL is {synchronous!r}. Take normal or full.")
    return SqliteStore(path, full_sync=synchronous == "full", busy_timeout_s=options.reply_timeout_s)


def _redis(parts: SplitResult, options: StoreOptions) -> Nodes:
    """redis://[[user]:password@]host[:port][/db], and the same with several hosts for Sentinel and Cluster."""
    scheme, _, kind = parts.scheme.partition("+")
    timeouts = Timeouts(options.connect_timeout_s, options.reply_timeout_s)
    level = Replication(options.replicas if options.durability == "replicated" else 0, options.replica_timeout_s)
    known = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"} if scheme == "rediss" else set()
    query = _query(parts, known | ({"sentinel_username", "sentinel_password"} if kind == "sentinel" else set()))
    tls = _tls(query) if scheme == "rediss" else None
    entry = _entry(parts, tls)
    if kind == "sentinel":
        return _sentinel(parts, entry, query, timeouts, level)
    servers = [replace(entry, host=host, port=port) for host, port in _hosts(parts, _REDIS_PORT)]
    if kind == "cluster":
        if parts.path.strip("/") not in ("", "0"):
            raise ConfigError(f"store URL asks for database {parts.path!r}. A cluster has only one; leave it out.")
        return Cluster(servers, lambda server: Node(lambda: connect(server, timeouts), LOAD_SCRIPT, level))
    if len(servers) > 1:
        raise ConfigError(f"store URL names {len(servers)} hosts. Write redis+cluster:// or redis+sentinel://.")
    server = replace(servers[0], db=_db(parts.path.strip("/")))
    return Single(Node(lambda: connect(server, timeouts), LOAD_SCRIPT, level))


def _sentinel(
    parts: SplitResult, entry: Server, query: Mapping[str, str], timeouts: Timeouts, level: Replication
) -> Nodes:
    """redis+sentinel://host:port,host:port/service_name[/db]."""
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ConfigError("store URL names no service. Write redis+sentinel://host:port,host:port/service_name/db.")
    primary = replace(entry, db=_db(db))
    sentinels = [
        Server(host, port, 0, query.get("sentinel_username"), query.get("sentinel_password"), entry.tls)
        for host, port in _hosts(parts, _SENTINEL_PORT)
    ]
    return Single(Node(lambda: ask_sentinels(sentinels, unquote(service), primary, timeouts), LOAD_SCRIPT, level))


def _query(parts: SplitResult, known: set[str]) -> dict[str, str]:
    """The options after the question mark."""
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in query.keys() - known:
        has = f"Known here: {', '.join(sorted(known))}" if known else "It takes none"
        raise ConfigError(f"store URL has the unknown option {name!r}. {has}.")
    return query


def _entry(parts: SplitResult, tls: ssl.SSLContext | None) -> Server:
    """User and password, which all servers of a URL share."""
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    return Server(username=unquote(user) or None, password=unquote(password) or None, tls=tls)


def _hosts(parts: SplitResult, port: int) -> list[tuple[str, int]]:
    """host:port,host:port; IPv6 addresses stand in brackets."""
    found = []
    for each in parts.netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{each}")
        try:
            found.append((one.hostname or "localhost", one.port or port))
        except ValueError as error:
            raise ConfigError(f"store URL has the host {each!r}: {error}.") from error
    return found


def _db(text: str) -> int:
    if text and not text.isdecimal():
        raise ConfigError(f"store URL asks for database {text!r}. Give its number.")
    return int(text or 0)


def _tls(query: Mapping[str, str]) -> ssl.SSLContext:
    """Certificates are always checked; ssl_check_hostname=false leaves out whether the name fits."""
    try:
        context = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
        context.check_hostname = query.get("ssl_check_hostname", "true").lower() not in ("false", "no", "0")
        if "ssl_certfile" in query:
            context.load_cert_chain(Path(query["ssl_certfile"]), query.get("ssl_keyfile"))
    except OSError as error:
        raise ConfigError(f"store URL has certificates that can not be read: {error}.") from error
    return context
