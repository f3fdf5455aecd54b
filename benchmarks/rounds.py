"""Closed-loop rounds: every contender once per round, ratios within a round, medians over rounds.

Where there is another checkout, its servers take turns with ours within each round, now first, now second.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .contenders import Bench, Contender, Measure, Run
from .load import LoadFailed
from .requests import WrongAnswer
from .servers import StartFailed
from .targets import COSTS, PLAIN_AOF, RATIOS, Cost, Target

Say = Callable[[str], None]
Spread = tuple[float, float, float]
"""Median, min, max over the rounds."""


def spread(values: Sequence[float]) -> Spread:
    """Median, min, max."""
    return statistics.median(values), min(values), max(values)


def ratios(above: Sequence[Measure], below: Sequence[Measure], of: str) -> Spread | None:
    """One over the other, round by round, but for rounds in which nothing came back; None without rounds of both."""
    if len(above) != len(below):
        return None
    pairs = [(getattr(a, of), getattr(b, of)) for a, b in zip(above, below, strict=True)]
    each = [a / b for a, b in pairs if a and b]
    return spread(each) if each else None


@dataclass
class Results:
    """What the rounds gave."""

    contenders: list[Contender]
    measures: dict[str, list[Measure]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    base: dict[str, list[Measure]] = field(default_factory=dict)
    """The same of the other checkout's servers."""

    def median(self, name: str, of: str = "steps_per_s") -> float:
        """The median over the rounds."""
        return float(statistics.median(getattr(measure, of) for measure in self.measures[name]))

    def of(self, name: str, base: bool = False) -> list[Measure]:
        """A contender's rounds; the base's where it has any and they are asked for."""
        return (self.base.get(name) if base else None) or self.measures.get(name, [])

    def ratio(self, target: Target, base: bool = False) -> Spread | None:
        """Steps per second of one over the other; None where one of the two is absent."""
        return ratios(self.of(target.above, base), self.of(target.below, base), "steps_per_s")

    def cpu_ratio(self, target: Target) -> float | None:
        """The same ratio by the servers' processor time per step, which other work on the machine disturbs less.

        Redis has a core of its own and does not count.
        """
        pairs = zip(self.measures.get(target.above, []), self.measures.get(target.below, []), strict=False)
        each = [below.cpu_us_per_step / above.cpu_us_per_step for above, below in pairs if above.cpu_us_per_step]
        return statistics.median(each) if each else None

    def cost(self, cost: Cost, base: bool = False) -> Spread | None:
        """Processor time per step over the plain twin's; None where one of the two is absent."""
        return ratios(self.of(cost.name, base), self.of(cost.twin, base), "cpu_us_per_step")

    def versus(self, name: str, of: str = "steps_per_s") -> Spread | None:
        """This checkout over the other one; None where only one of them was measured."""
        return ratios(self.measures.get(name, []), self.base.get(name, []), of)

    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "contenders": {c.name: self._contender(c) for c in self.contenders if c.name in self.measures},
            "absent": self.absent,
            "ratios": [self._ratio(target) for target in (*RATIOS, *PLAIN_AOF)],
            "costs": [self._cost(cost) for cost in COSTS],
        }

    def _contender(self, contender: Contender) -> dict[str, Any]:
        name = contender.name
        said: dict[str, Any] = {"what": contender.what, "kind": contender.kind}
        said["rounds"] = [asdict(measure) for measure in self.measures[name]]
        if name in self.base:
            said["base_rounds"] = [asdict(measure) for measure in self.base[name]]
            over = {of: self.versus(name, of) for of in ("steps_per_s", "cpu_us_per_step")}
            said["new_over_base"] = {of: _plain(found) for of, found in over.items() if found}
        return said

    def _ratio(self, target: Target) -> dict[str, Any]:
        said: dict[str, Any] = {"what": target.what, "least": target.least}
        found = self.ratio(target)
        if found is not None:
            said |= _plain(found) | {"holds": found[0] >= target.least, "by_cpu": self.cpu_ratio(target)}
            said |= self._beside(target.above, self.ratio(target, base=True), "steps_per_s")
        return said

    def _cost(self, cost: Cost) -> dict[str, Any]:
        said: dict[str, Any] = {"what": cost.what, "name": cost.name, "twin": cost.twin, "most": cost.most}
        found = self.cost(cost)
        if found is not None:
            said |= _plain(found) | {"holds": found[0] <= cost.most}
            said["us"] = self.median(cost.name, "cpu_us_per_step")
            said["twin_us"] = self.median(cost.twin, "cpu_us_per_step")
            said |= self._beside(cost.name, self.cost(cost, base=True), "cpu_us_per_step")
        return said

    def _beside(self, name: str, base: Spread | None, of: str) -> dict[str, Any]:
        versus = self.versus(name, of)
        if base is None or versus is None:
            return {}
        return {"base": _plain(base), "new_over_base": _plain(versus)}


def _plain(found: Spread) -> dict[str, float]:
    return dict(zip(("median", "min", "max"), found, strict=True))


def run(
    bench: Bench, contenders: Sequence[Contender], rounds: int, seconds: float, say: Say, results: Results | None = None
) -> Results:
    """Start everybody, then go round; who is not measured stands still. `results`: where they go, with what is there.

    A contender whose package is missing, or whose server does not start, is absent, with the reason.

    Raises:
        WrongAnswer, LoadFailed: a contender answered wrongly, or not at all.
    """
    results = results or Results([])
    results.contenders += contenders
    runs: dict[str, list[tuple[bool, Run]]] = {}
    for contender in contenders:
        why = contender.missing()
        if why is None:
            try:
                runs[contender.name] = _prepare(bench, contender, min(seconds, 0.5))
            except (StartFailed, LoadFailed) as error:
                why = str(error)
        if why is not None:
            results.absent[contender.name] = why
    for number in range(rounds):
        for contender in contenders:
            for base, load in runs.get(contender.name, [])[:: -1 if number % 2 else 1]:
                _one(contender, load, seconds, results.base if base else results.measures)
        say(f"round {number + 1} of {rounds} done")
    return results


def _prepare(bench: Bench, contender: Contender, seconds: float) -> list[tuple[bool, Run]]:
    """Its loads, ours first, each tried once: a warm-up, and whether it answers at all."""
    found = []
    for side in bench.sides() if contender.versus else (bench,):
        load = contender.prepare(side)
        _checked(contender, load, seconds)
        found.append((side.base, load))
    return found


def _one(contender: Contender, load: Run, seconds: float, measures: dict[str, list[Measure]]) -> None:
    measures.setdefault(contender.name, []).append(_checked(contender, load, seconds))


def _checked(contender: Contender, load: Run, seconds: float) -> Measure:
    try:
        return load(seconds)
    except (WrongAnswer, LoadFailed) as error:
        raise type(error)(f"{contender.name}: {error}") from error
