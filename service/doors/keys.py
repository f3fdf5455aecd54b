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

    def require(self, role: str) -> "Principal":
        """The caller itself; Forbidden where its role is less than `role`."""
        if ROLES.index(self.role) < ROLES.index(role):
            raise Forbidden(f"this key has the role {self.role!r}, {role!r} is needed", role=self.role, needed=role)
        return self


ANYBODY: Final = Principal("default", "admin")


class Keys:
    """The configured API keys: ROLE:NAMESPACE:KEY, separated by commas (else ConfigError); empty: none is needed."""

    def __init__(self, text: str) -> None:
        self._keys: list[tuple[bytes, Principal]] = []
        for number, entry in enumerate(filter(None, map(str.strip, text.split(",")))):
            role, namespace, key = (*entry.split(":", 2), "", "")[:3]
            good = namespace.replace("-", "").replace("_", "").isalnum() and namespace.isascii()
            if role not in ROLES or not good or len(key) < 8:
                raise ConfigError(
                    f"STEPCAST_API_KEYS[{number}] is not ROLE:NAMESPACE:KEY with a role of {ROLES}, a namespace of "
                    "letters, digits, - and _, and a key of at least 8 characters"
                )
            self._keys.append((key.encode(), Principal(namespace, role)))

    def authenticate(self, headers: Mapping[bytes, bytes]) -> Principal:
        """The caller whose key the headers (names in lower case) carry; Unauthorized where they carry no known one."""
        if not self._keys:
            return ANYBODY
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = headers.get(b"x-api-key") or (token.strip() if scheme.lower() == b"bearer" else b"")
        # every key is compared, in constant time: how long it takes tells nothing
        found = [principal for key, principal in self._keys if hmac.compare_digest(key, given)]
        if not found:
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")
        return found[-1]


def origins(text: str) -> frozenset[str]:
    """Origins of pages that may call: STEPCAST_CORS_ORIGINS; `*`: all."""
    return frozenset(part.strip() for part in text.split(",")) - {""}
