"""Wrong keys, counted by address: who tries many is refused for a while, before a key is looked at.

A key that was right from this address before stays right meanwhile: callers that share a proxy's address with one
who guesses go on. What is remembered is bounded; an address that was forgotten begins anew.
"""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from stepcast.errors import TooManyTries

PAUSE_S: Final = 60.0
"""In which time all tries of an address come back, one after the other."""
_MOST_ADDRESSES: Final = 4096
_MOST_PROVED: Final = 8192


class _Spent(NamedTuple):
    tries: float
    at: float


class Tries:
    """The wrong keys of each address.

    Args:
        limit: How many an address may send at once; later one each PAUSE_S / limit. 0: any number.
        clock: Monotonic seconds.

    Attributes:
        blocked: Addresses that have no tries left, or had none a while ago; nearly always empty.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._spent: OrderedDict[str, _Spent] = OrderedDict()
        self._proved: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self.blocked: set[str] = set()

    def check(self, address: str, digest: bytes) -> None:
        """Raises TooManyTries where an address has no tries left; keys that were right from there pass."""
        address = network(address)
        if address not in self.blocked or (address, digest) in self._proved:
            return
        left = self._limit - self._tries(address)
        if left >= 1:
            self.blocked.discard(address)
            return
        wait_s = math.ceil((1 - left) * PAUSE_S / self._limit)
        text = f"too many wrong API keys came from this address (limit {self._limit}). Retry after {wait_s} s."
        raise TooManyTries(text, limit=self._limit, retry_after_s=float(wait_s))

    def wrong(self, address: str) -> None:
        """A key was wrong."""
        if not self._limit:
            return
        address = network(address)
        tries = self._tries(address) + 1
        self._spent[address] = _Spent(tries, self._clock())
        self._spent.move_to_end(address)
        if tries > self._limit - 1:
            self.blocked.add(address)
        if len(self._spent) > _MOST_ADDRESSES:
            self.blocked.discard(self._spent.popitem(last=False)[0])

    def right(self, address: str, digest: bytes) -> None:
        """A key was right."""
        if not self._limit or not address:
            return
        proved = network(address), digest
        self._proved[proved] = None
        self._proved.move_to_end(proved)
        if len(self._proved) > _MOST_PROVED:
            self._proved.popitem(last=False)

    def forget(self) -> None:
        """Other keys hold: none is proved any more."""
        self._proved.clear()

    def _tries(self, address: str) -> float:
        spent = self._spent.get(address)
        return 0.0 if spent is None else max(0.0, spent.tries - (self._clock() - spent.at) * self._limit / PAUSE_S)


def network(address: str) -> str:
    """Whose address it is: an IPv6 site has 2^64 of them."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address
