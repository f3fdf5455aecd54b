"""Batches read ahead, in a thread, while the network works on the one before."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

Item = TypeVar("Item")
_END: Final = object()


def prefetched(items: Iterator[Item], ahead: int) -> Iterator[Item]:
    """The same items in the same order, up to `ahead` of them made before they are asked for.

    One thread makes them, one after another, so a source need not be safe for several. What it raises is raised
    here, at the item where it happened. If the caller stops early, the item in the making is finished and dropped.

    Args:
        items: Used by nobody else from now on.
        ahead: 0 makes each item when it is asked for, in the caller's thread.
    """
    if not ahead:
        yield from items
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        waiting = deque(thread.submit(next, items, _END) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, items, _END))
            yield item  # type: ignore[misc]
