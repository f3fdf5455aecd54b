"""How far a long stream is: a bar on stderr, or a caller's own function."""

import contextlib
from collections.abc import Callable, Iterator
from operator import length_hint
from typing import TypeAlias

Progress: TypeAlias = bool | Callable[[int, int | None], None]
"""True: a bar. A function: takes how many are answered, and of how many (None: not known)."""


@contextlib.contextmanager
def shown(progress: Progress, inputs: object) -> Iterator[Callable[[], None]]:
    """A function to be called at each answer."""
    total = length_hint(inputs) or None
    if progress is False:
        yield lambda: None
        return
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(bar("steps", total)) if progress is True else progress
        answered = 0

        def count() -> None:
            nonlocal answered
            answered += 1
            tell(answered, total)

        yield count


@contextlib.contextmanager
def bar(what: str, total: int | None) -> Iterator[Callable[[int, int | None], None]]:
    """A bar that is told how many are done, and of how many (None: not known)."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ImportError as error:
        raise ImportError('progress=True needs rich: pip install "stepcast[client]"') from error
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done, of: shown.update(task, completed=done, total=of)
