"""How many requests of the Open Inference Protocol each model version has answered, and how long their parts took."""

from time import perf_counter, time
from typing import Any

from ...sessions.core import Answers


class Counts:
    """Those of one model version. Times are in seconds, all together."""

    def __init__(self) -> None:
        self.inferences = 0  # examples times steps
        self.made = self.repeated = self.failed = 0  # requests
        self.made_s = self.repeated_s = self.failed_s = 0.0
        self.input_s = self.queue_s = self.infer_s = self.output_s = 0.0  # parts of `made_s`
        self.last = 0.0  # an answer, monotonic

    def answered(self, came: float, handed: float, answers: Answers, cells: int) -> None:
        """A request of so many examples times steps has its answer; it came and was handed on then (monotonic)."""
        now, began, ended = perf_counter(), answers.began, answers.ended
        self.last = now
        if not ended:  # a kept answer
            self.repeated += 1
            self.repeated_s += now - came
            return
        if began < handed:  # it ran in chunks
            began = handed
        self.made += 1
        self.inferences += cells
        self.made_s += now - came
        self.input_s += handed - came
        self.queue_s += began - handed
        self.infer_s += ended - began
        self.output_s += now - ended

    def refused(self, came: float) -> None:
        """A request that came then was refused."""
        self.failed += 1
        self.failed_s += perf_counter() - came

    def document(self, executions: int) -> dict[str, Any]:
        """What /stats says, of so many runs of the version."""
        made, parts = self.made, (self.queue_s, self.input_s, self.infer_s, self.output_s)
        names = "queue", "compute_input", "compute_infer", "compute_output"
        return {
            "last_inference": int(1000 * (time() - perf_counter() + self.last)) if self.last else 0,
            "inference_count": self.inferences,
            "execution_count": executions,
            "inference_stats": {
                "success": _total(made + self.repeated, self.made_s + self.repeated_s),
                "fail": _total(self.failed, self.failed_s),
                **{name: _total(made, seconds) for name, seconds in zip(names, parts, strict=True)},
                "cache_hit": _total(self.repeated, self.repeated_s),
                "cache_miss": _total(made, 0.0),
            },
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }


def _total(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * 1e9)}


class Statistics:
    """Those of all model versions of a process."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int], Counts] = {}

    def of(self, model: str, version: int) -> Counts:
        """The counts of one version."""
        found = self._counts.get((model, version))
        if found is None:
            found = self._counts[model, version] = Counts()
        return found
