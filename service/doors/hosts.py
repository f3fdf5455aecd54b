"""Which names this server goes by: a page can rebind a name of its own to our address, but never one of these.

An API key guards against such pages, too: no browser adds it to a request by itself. So with keys every name holds
unless names are listed; without keys only names that nobody else can own do.
"""

import ipaddress
import socket
from collections.abc import Mapping
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from stepcast.errors import UnknownHost

_RESERVED: Final = (".localhost", ".local", ".internal", ".svc", ".home.arpa", ".test")
"""Endings that no registrar sells; names without a dot are nobody's either."""
_OWN_PAGE: Final = (b"same-origin", b"none")  # of Sec-Fetch-Site; none: the user's own doing, no page's


class Hosts:
    """The accepted names.

    Args:
        text: STEPCAST_HOSTS: names separated by commas; `.example.org` is all names below that one, `*` every name.
        guarded: Whether callers need a key.
    """

    def __init__(self, text: str, guarded: bool) -> None:
        self._names = frozenset(part.strip().lower().rstrip(".") for part in text.split(",")) - {""}
        self._every = "*" in self._names or (guarded and not self._names)
        self.accepts = lru_cache(1024)(self._accepts)

    def check(self, host: bytes) -> None:
        """Raises UnknownHost where a Host field has a name that is none of ours. An empty one comes from no browser."""
        if host and not self.accepts(host):
            said = host.decode("latin-1")[:256]
            raise UnknownHost(f"the name {said!r} is not this server's. Name it in STEPCAST_HOSTS.", host=said)

    def _accepts(self, host: bytes) -> bool:
        if self._every:
            return True
        try:
            parts = urlsplit(f"//{host.decode('ascii')}")
            name = "" if "@" in parts.netloc else (parts.hostname or "").rstrip(".")
        except ValueError:  # not ASCII, or brackets around no address
            return False
        if _is_address(name) or name == "localhost":
            return True
        if self._names:
            return name in self._names or any(name.endswith(end) for end in self._names if end.startswith("."))
        return bool(name) and ("." not in name or name.endswith(_RESERVED) or name == socket.gethostname().lower())


def _is_address(name: str) -> bool:
    """Whether it is an IP address: what has no name cannot be rebound."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def other_page(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a browser sent this for a page of another origin than ours; `headers` are by name in lower case."""
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site not in _OWN_PAGE
    origin = headers.get(b"origin")
    return origin is not None and not is_own(origin, headers)


def is_own(origin: bytes, headers: Mapping[bytes, bytes]) -> bool:
    """Whether an Origin is that of our own pages, by the name that the request was sent to."""
    try:
        netloc = urlsplit(origin.decode("latin-1")).netloc
        return netloc != "" and netloc == headers.get(b"host", b"").decode("latin-1")
    except ValueError:  # brackets that are no IPv6 address
        return False
