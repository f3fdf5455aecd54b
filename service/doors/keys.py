"""Who may do what: API keys with a role and a namespace each.

A namespace is a tenant: it stands in front of every store key, so that no key reads another namespace's sessions.
Without configured keys everybody is admin of the namespace "default". A key is held as its SHA-256 alone: keys are
random, so that nothing slower is needed, and no log line, error or file of ours has one.
"""

import asyncio
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from stepcast.errors import ConfigError, Forbidden, Unauthorized

from ..telemetry import log
from .tries import Tries

ROLES: Final = ("read", "step", "admin")
POLL_S: Final = 1.0
"""How often a key file is looked at."""

_NAME: Final = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_-]+")
_NO_KEY: Final = hashlib.sha256(b"").digest()
_HASH: Final = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller: its namespace, its role (each role may do what the ones before it may), and its key's name for logs."""

    namespace: str
    role: str
    name: str = field(default="", compare=False)

    def require(self, role: str) -> "Principal":
        """The caller itself; Forbidden where its role is less than `role`."""
        if ROLES.index(self.role) < ROLES.index(role):
            raise Forbidden(f"this key has the role {self.role!r}, {role!r} is needed", role=self.role, needed=role)
        return self


ANYBODY: Final = Principal("default", "admin", "anybody")
Entry = tuple[bytes, Principal]  # SHA-256 of a key, and whose it is


class Keys:
    """The configured API keys; none at all: no key is needed.

    Args:
        text: ROLE:NAMESPACE:KEY, separated by commas.
        file: A key per line: NAME ROLE NAMESPACE sha256:HEX; empty lines and lines that begin with # say nothing.
            With a file a key is needed, even while it holds none.
        tries_limit: How many wrong keys an address may send before it has to wait; 0: any number.

    Raises:
        ConfigError: one of them is not so.
    """

    def __init__(self, text: str, file: str = "", tries_limit: int = 0) -> None:
        self.tries = Tries(tries_limit)
        self._configured = _from_text(text)
        self._path = Path(file) if file else None
        self._keys, self._stamp = self._configured, None if self._path is None else _stamp(self._path)
        self._listeners: list[Callable[[], None]] = []
        if self._path is not None:
            self._keys = [*self._configured, *_from_file(self._path)]

    @property
    def needed(self) -> bool:
        """Whether a caller must have a key."""
        return bool(self._keys) or self._path is not None

    def on_change(self, forget: Callable[[], None]) -> None:
        """Have `forget` called when other keys hold: what was decided by the old ones means nothing any more."""
        self._listeners.append(forget)

    def authenticate(self, headers: Mapping[bytes, bytes], address: str = "") -> Principal:
        """The caller whose key the headers (names in lower case) carry; wrong ones are counted by address, if given.

        Raises:
            Unauthorized: they carry no known one. TooManyTries: too many such came from this address of late.
        """
        if not self.needed:
            return ANYBODY
        if not address:
            return self.look_up(headers)
        digest = digest_of(headers)
        self.tries.check(address, digest)
        try:
            principal = self.look_up(headers)
        except Unauthorized:
            if digest != _NO_KEY:  # who sends none guesses nothing
                self.tries.wrong(address)
            raise
        self.tries.right(address, digest)
        return principal

    def look_up(self, headers: Mapping[bytes, bytes]) -> Principal:
        """The same without counting."""
        if not self.needed:
            return ANYBODY
        digest = digest_of(headers)
        # every key is compared, in constant time: how long it takes tells nothing
        found = [principal for key, principal in self._keys if hmac.compare_digest(key, digest)]
        if not found:
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")
        return found[-1]

    async def watch(self) -> None:
        """Read the file again whenever it changes, until cancelled; a wrong one is logged and changes nothing."""
        while self._path is not None:
            await asyncio.sleep(POLL_S)
            self.refresh()

    def refresh(self) -> None:
        """Read the file again if it has changed."""
        if self._path is None or (stamp := _stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = [*self._configured, *_from_file(self._path)]
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)
            return
        self.tries.forget()
        for forget in self._listeners:
            forget()
        said = ", ".join(f"{principal.name} ({principal.role})" for _, principal in self._keys)
        log.info("keys that hold from now on: %s", said or "none")


def digest_of(headers: Mapping[bytes, bytes]) -> bytes:
    """The SHA-256 of the key that headers carry."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    given = headers.get(b"x-api-key") or (token.strip() if scheme.lower() == b"bearer" else b"")
    return hashlib.sha256(given).digest()


def _from_text(text: str) -> list[Entry]:
    """The keys of STEPCAST_API_KEYS; a message names an entry by its place, never by what stands there."""
    entries = []
    for number, entry in enumerate(filter(None, map(str.strip, text.split(",")))):
        role, namespace, key = (*entry.split(":", 2), "", "")[:3]
        if role not in ROLES or not _NAMESPACE.fullmatch(namespace) or len(key) < 8:
            raise ConfigError(
                f"STEPCAST_API_KEYS[{number}] is not ROLE:NAMESPACE:KEY with a role of {ROLES}, a namespace of "
                "letters, digits, - and _, and a key of at least 8 characters"
            )
        name = f"STEPCAST_API_KEYS[{number}]"
        entries.append((hashlib.sha256(key.encode()).digest(), Principal(namespace, role, name)))
    return entries


def _from_file(path: Path) -> list[Entry]:
    """The keys of a file; a message names a line by its number, never by what stands there."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"STEPCAST_API_KEYS_FILE {str(path)!r} cannot be read: {type(error).__name__}") from error
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, role, namespace, key = (*line.split(), "", "", "", "")[:4]
        hashed = _HASH.fullmatch(key)
        good = _NAME.fullmatch(name) and role in ROLES and _NAMESPACE.fullmatch(namespace) and len(line.split()) == 4
        if hashed is None or not good:
            raise ConfigError(
                f"{path}:{number} is not NAME ROLE NAMESPACE sha256:HEX with a role of {ROLES}. "
                "Make a line with: stepcast key NAME --role ROLE"
            )
        if name in (principal.name for _, principal in entries):
            raise ConfigError(f"{path}:{number}: the name of this key stands in a line before")
        entries.append((bytes.fromhex(hashed[1]), Principal(namespace, role, name)))
    return entries


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content; None while it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def new_key(name: str, role: str, namespace: str) -> tuple[str, str]:
    """A new key, and the line for the key file that knows it by its hash; ConfigError where a name is none."""
    if role not in ROLES or not _NAME.fullmatch(name) or not _NAMESPACE.fullmatch(namespace):
        raise ConfigError(
            f"got name {name!r}, role {role!r}, namespace {namespace!r}: a name is 1 to 64 of letters, digits and "
            f"_.@-, a role one of {ROLES}, a namespace of letters, digits, - and _"
        )
    key = f"sck_{secrets.token_urlsafe(32)}"
    return key, f"{name} {role} {namespace} sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def origins(text: str) -> frozenset[str]:
    """Origins of pages that may call: STEPCAST_CORS_ORIGINS; `*`: all."""
    return frozenset(part.strip() for part in text.split(",")) - {""}
