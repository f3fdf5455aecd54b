"""Results as text, JSON and a chart."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .rounds import Results
from .targets import RATIOS

RESULTS = Path(__file__).resolve().parent / "results"


def table(results: Results) -> str:
    """Everybody's rates, slowest rounds and latencies."""
    lines = [
        f"{'contender':<26}{'steps/s':>10}{'min':>10}{'max':>10}{'p50 ms':>9}{'p99 ms':>9}{'cpu us':>8}"
        f"{'redis us':>9}{'gen.':>6}"
    ]
    for contender in results.contenders:
        rounds = results.measures.get(contender.name)
        if not rounds:
            lines.append(f"{contender.name:<26}{'absent':>10}")
            continue
        rates = [m.steps_per_s for m in rounds]
        lines.append(
            f"{contender.name:<26}{results.median(contender.name):>10,.0f}{min(rates):>10,.0f}{max(rates):>10,.0f}"
            f"{results.median(contender.name, 'p50_ms'):>9.2f}{results.median(contender.name, 'p99_ms'):>9.2f}"
            f"{results.median(contender.name, 'cpu_us_per_step'):>8.1f}"
            f"{results.median(contender.name, 'redis_us_per_step'):>9.1f}"
            f"{results.median(contender.name, 'generator_busy'):>6.2f}"
        )
    return "\n".join(lines)


def ratios(results: Results) -> str:
    """The promised ratios: median, min and max over the rounds, and by processor time per step."""
    lines = [f"{'ratio':<54}{'median':>8}{'min':>8}{'max':>8}{'by cpu':>8}{'want':>8}"]
    for target in RATIOS:
        found = results.ratio(target)
        if found is None:
            continue
        verdict = "" if found[0] >= target.least else "  missed"
        numbers = (*found, results.cpu_ratio(target) or 0.0, target.least)
        lines.append(f"{target.what:<54}" + "".join(f"{number:>8.2f}" for number in numbers) + verdict)
    return "\n".join(lines)


def checks(found: Sequence[dict[str, Any]]) -> str:
    """The scenarios' promises."""
    lines = []
    for each in found:
        want = each.get("at_most", each.get("at_least"))
        sign = "<=" if "at_most" in each else ">="
        verdict = "" if each["holds"] else "  missed"
        lines.append(f"{each['what']:<74}{each['value']:>9.3g} {sign} {want:g}{verdict}")
    return "\n".join(lines)


def write(name: str, content: dict[str, Any]) -> Path:
    """benchmarks/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, default=float) + "\n")
    return path


def chart(content: dict[str, Any], path: Path) -> None:
    """Rates as bars, and latency against load where the open loop was run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = next((s["curve"] for s in content.get("scenarios", []) if s.get("curve")), None)
    figure, axes = pyplot.subplots(1, 2 if curve else 1, figsize=(13 if curve else 8, 7), squeeze=False)
    _bars(axes[0][0], content["contenders"])
    if curve:
        _curve(axes[0][1], curve)
    facts = content["facts"]
    figure.suptitle(f"{facts['machine']['processor']}, one core for the server; commit {facts['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


_COLOURS = {"limit": "#9aa5b1", "peer": "#d98e73", "stepcast": "#2f6f9f"}


def _bars(axes: Any, contenders: dict[str, Any]) -> None:
    single = {name: c for name, c in contenders.items() if not name.startswith(("batch-", "bare-64", "bare-256"))}
    names = sorted(single, key=lambda name: _median(single[name]))
    rates = [_median(single[name]) for name in names]
    axes.barh([single[n]["what"] for n in names], rates, color=[_COLOURS[single[n]["kind"]] for n in names])
    for i, rate in enumerate(rates):
        axes.text(rate, i, f" {rate:,.0f}", va="center", fontsize=7)
    axes.set_xlabel("steps per second, one step per request, 64 in flight")
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _median(contender: dict[str, Any]) -> float:
    rates = sorted(r["steps_per_s"] for r in contender["rounds"])
    return float(rates[len(rates) // 2])


def _curve(axes: Any, curve: list[dict[str, float]]) -> None:
    rates = [point["steps_per_s"] for point in curve]
    for key, label in (("p50_ms", "p50"), ("p99_ms", "p99")):
        axes.plot(rates, [point[key] for point in curve], marker="o", label=label)
    axes.set_xlabel("steps per second offered (open loop, HTTP JSON on Redis)")
    axes.set_ylabel("latency from the scheduled time, ms")
    axes.set_yscale("log")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
