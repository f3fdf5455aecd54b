"""Closed-loop rounds: every contender once per round, ratios within a round, medians over rounds."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .contenders import Bench, Contender, Measure, Run
from .load import LoadFailed
from .requests import WrongAnswer
from .servers import StartFailed
from .targets import RATIOS, Target

Say = Callable[[str], None]


@dataclass
class Results:
    """What the rounds gave."""

    contenders: list[Contender]
    measures: dict[str, list[Measure]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def median(self, name: str, of: str = "steps_per_s") -> float:
        """The median over the rounds."""
        return float(statistics.median(getattr(measure, of) for measure in self.measures[name]))

    def ratio(self, target: Target) -> tuple[float, float, float] | None:
        """Median, min, max over the rounds; None where one of the two is absent."""
        above, below = self.measures.get(target.above), self.measures.get(target.below)
        if not above or not below or len(above) != len(below):
            return None
        each = [a.steps_per_s / b.steps_per_s for a, b in zip(above, below, strict=True)]
        return statistics.median(each), min(each), max(each)

    def cpu_ratio(self, target: Target) -> float | None:
        """The same ratio by the servers' processor time per step, which other work on the machine disturbs less.

        Redis has a core of its own and does not count.
        """
        pairs = zip(self.measures.get(target.above, []), self.measures.get(target.below, []), strict=False)
        each = [below.cpu_us_per_step / above.cpu_us_per_step for above, below in pairs if above.cpu_us_per_step]
        return statistics.median(each) if each else None

    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "contenders": {
                c.name: {"what": c.what, "kind": c.kind, "rounds": [asdict(m) for m in self.measures[c.name]]}
                for c in self.contenders
                if c.name in self.measures
            },
            "absent": self.absent,
            "ratios": [_plain_ratio(t, self.ratio(t), self.cpu_ratio(t)) for t in RATIOS],
        }


def _plain_ratio(target: Target, found: tuple[float, float, float] | None, cpu: float | None) -> dict[str, Any]:
    said: dict[str, Any] = {"what": target.what, "least": target.least}
    if found is not None:
        said |= {"median": found[0], "min": found[1], "max": found[2], "holds": found[0] >= target.least, "by_cpu": cpu}
    return said


def run(bench: Bench, contenders: Sequence[Contender], rounds: int, seconds: float, say: Say) -> Results:
    """Start everybody, then go round; who is not measured stands still.

    A contender whose package is missing, or whose server does not start, is absent, with the reason.

    Raises:
        WrongAnswer, LoadFailed: a contender answered wrongly, or not at all.
    """
    results = Results(list(contenders))
    runs: dict[str, Run] = {}
    for contender in contenders:
        why = contender.missing()
        try:
            if why is None:
                runs[contender.name] = contender.prepare(bench)
                runs[contender.name](min(seconds, 0.5))  # warm-up, and whether it answers at all
        except (StartFailed, LoadFailed) as error:
            why = str(error)
            runs.pop(contender.name, None)
        if why is not None:
            results.absent[contender.name] = why
    for number in range(rounds):
        for contender in contenders:
            if contender.name in runs:
                _one(contender, runs[contender.name], seconds, results)
        say(f"round {number + 1} of {rounds} done")
    return results


def _one(contender: Contender, load: Run, seconds: float, results: Results) -> None:
    try:
        results.measures.setdefault(contender.name, []).append(load(seconds))
    except (WrongAnswer, LoadFailed) as error:
        raise type(error)(f"{contender.name}: {error}") from error
