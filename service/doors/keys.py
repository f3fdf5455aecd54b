"""Who may do what: API keys with a role and a namespace each.

A namespace is a tenant: it stands in front of every store key, so that no key reads another namespace's sessions.
Without configured keys everybody is admin of the namespace "default".
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from stepcast.errors import ConfigError, Forbidden, Unauthorized

ROLES: Final = ("read", "step", "admin")


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller: its namespace, and its role (each role may do what the ones before it may)."""

    namespace: str
    role: str

    def require(self, role: str) -> None:
        """Raises Forbidden where the principal's role is less than `role`."""
        if ROLES.index(self.role) < ROLES.index(role):
            raise Forbidden(f"this key has the role {self.role!r}, {role!r} is needed", role=self.role, needed=role)


ANYBODY: Final = Principal("default", "admin")


class Keys:
    """The configured API keys.

    Args:
        text: ROLE:NAMESPACE:KEY, separated by commas; empty: no keys are needed.

    Raises:
        ConfigError: an entry is not of that form.
    """

    def __init__(self, text: str) -> None:
        self._keys: list[tuple[bytes, Principal]] = []
        for number, entry in enumerate(filter(None, (part.strip() for part in text.split(",")))):
            role, _, rest = entry.partition(":")
            namespace, _, key = rest.partition(":")
            good = namespace.replace("-", "").replace("_", "").isalnum() and namespace.isascii()
            if role not in ROLES or not good or len(key) < 8:
                raise ConfigError(
                    f"STEPCAST_API_KEYS[{number}] is not ROLE:NAMESPACE:KEY with a role of {ROLES}, a namespace of "
                    "letters, digits, - and _, and a key of at least 8 characters"
                )
            self._keys.append((key.encode(), Principal(namespace, role)))
        self.needed = bool(self._keys)

    def authenticate(self, headers: Mapping[bytes, bytes]) -> Principal:
        """The caller that a request's headers (lower-case names) speak for: Authorization: Bearer, or X-API-Key.

        Every configured key is compared, in constant time.

        Raises:
            Unauthorized: no key, or an unknown one.
        """
        if not self.needed:
            return ANYBODY
        given = headers.get(b"x-api-key") or _bearer(headers.get(b"authorization", b""))
        found = None
        for key, principal in self._keys:
            if hmac.compare_digest(key, given):
                found = principal
        if found is None:
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")
        return found


def origins(text: str) -> frozenset[str]:
    """Origins of pages that may call: STEPCAST_CORS_ORIGINS; `*`: all."""
    return frozenset(part.strip() for part in text.split(",")) - {""}


def _bearer(header: bytes) -> bytes:
    scheme, _, key = header.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""
