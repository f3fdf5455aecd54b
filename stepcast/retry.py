"""How often, and after which pauses, something is asked again."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retry:
    """The retry policy of a client; what can be asked again without being applied twice is.

    Attributes:
        attempts: How often a call is sent at most; 1: never again.
        first_pause_s: The pause after the first attempt; it doubles with each one. A server that says how long to wait
            (Retry-After) is believed instead.
        longest_pause_s: No pause is longer, but for its jitter.
        jitter: Each pause is longer by a random part of itself, up to this, so that clients do not come back together.
        deadline_s: Longest time for one call with all its attempts; None: only `attempts` and the timeout of each.
            For a stream, how long there may be no connection (None: 60 s).
    """

    attempts: int = 8
    first_pause_s: float = 0.05
    longest_pause_s: float = 5.0
    jitter: float = 0.25
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}, want 1 or more")
        for name in ("first_pause_s", "longest_pause_s", "jitter"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, want 0 or more")
        if self.deadline_s is not None and self.deadline_s <= 0:
            raise ValueError(f"deadline_s is {self.deadline_s}, want more than 0")

    def pause_s(self, attempt: int, asked_s: float | None = None) -> float:
        """The pause after the attempt of this number, the first being 1; `asked_s`: what the server asked for."""
        pause = min(self.longest_pause_s, (asked_s or self.first_pause_s) * 2 ** min(attempt - 1, 62))
        return self.jittered(pause)

    def jittered(self, pause_s: float) -> float:
        """A pause, longer by a random part of it."""
        return pause_s * (1 + self.jitter * random.random())
