"""Blocks for stores, as a batch of steps makes them, but of any records; and what a store says of them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from service.store import Store


class Block:
    """What a store sees of service.records.block.Block.

    Args:
        old: The records that are replaced; None: there are none, the sessions are new.
    """

    def __init__(
        self,
        keys: Sequence[str],
        old: Sequence[bytes] | None,
        new: Sequence[bytes],
        ttl_s: float | None = None,
        *,
        touch_sides: bool = False,
        stays: bool = False,
        place: object = None,
    ) -> None:
        self.keys, self.ttl_s, self.touch_sides, self.stays, self.place = keys, ttl_s, touch_sides, stays, place
        self.outbox, self.letters = None, ()
        self._old, self._new = old, new
        self.old = None if old is None else side_by_side(old)
        self.new = side_by_side(new)
        self.tokens = None if self.old is None else self.old[:, 8:24]

    def __len__(self) -> int:
        return len(self.keys)

    def records(self) -> list[bytes]:
        """The next records."""
        return list(self._new)

    def expected(self) -> list[bytes]:
        """Their tokens before."""
        return [b""] * len(self) if self._old is None else [record[8:24] for record in self._old]

    def following(self, new: Sequence[bytes]) -> "Block":
        """The next block of a roster, which lies where this one's records are."""
        block = Block(self.keys, self._new, new, self.ttl_s, stays=True, place=self.place)
        block.old, block.tokens = self.new, self.new[:, 8:24]
        return block


def side_by_side(records: Sequence[bytes]) -> Any:
    """Records as rows (B, W), in memory of their own."""
    return np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1).copy()


async def outcomes(store: Store, block: Block) -> list[bool | BaseException]:
    """What a store said of each row of a block; it said so exactly once."""
    told: list[Any] = [None] * len(block)
    done = asyncio.get_running_loop().create_future()

    def hear(rows: Sequence[int], outcome: list[bool] | BaseException) -> None:
        each = outcome if isinstance(outcome, list) else [outcome] * len(rows)
        for row, one in zip(rows, each, strict=True):
            assert told[row] is None, f"row {row} is told twice"
            told[row] = one
        if None not in told:
            done.set_result(None)

    store.replace(block, hear)  # type: ignore[arg-type]
    await done
    return told


async def replaced(store: Store, block: Block) -> list[bool]:
    """The same where nothing may fail."""
    told = await outcomes(store, block)
    for one in told:
        if isinstance(one, BaseException):
            raise one
    return told  # type: ignore[return-value]
