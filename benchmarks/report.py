"""Results as text, JSON and a chart."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .rounds import Results

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


def markdown(content: dict[str, Any]) -> str:
    """All promises as tables, beside the other checkout's numbers where it was measured."""
    base = "base" in content["facts"]
    parts = [_promises(content, base), _costs(content["costs"], base)]
    if base:
        parts.append(_side_by_side(content["contenders"]))
    return "\n\n".join(part for part in parts if part)


def _promises(content: dict[str, Any], base: bool) -> str:
    rows = []
    for each in content["ratios"]:
        if "median" in each:
            theirs = _spread(each["base"]) if "base" in each else "-"
            rows.append((each["what"], _spread(each), theirs, each, f"{each['least']:g}"))
    for each in (check for scenario in content["scenarios"] for check in scenario["checks"]):
        aim = f"at most {each['at_most']:g}" if "at_most" in each else f"{each['at_least']:g}"
        rows.append((each["what"], f"{each['value']:.3g}", f"{each['base']:.3g}" if "base" in each else "-", each, aim))
    if base:
        lines = [
            f"| {what} | {ours} | {theirs} | {_over_base(each)} | {aim}{_verdict(each)} |"
            for what, ours, theirs, each, aim in rows
        ]
        return _table("| | now | base | now / base | aim |", lines)
    lines = [f"| {what} | {ours} | {aim}{_verdict(each)} |" for what, ours, _, each, aim in rows]
    return _table("| | median (min to max) | aim |", lines)


def _costs(costs: Sequence[dict[str, Any]], base: bool) -> str:
    """Microseconds of the server's processor per step, and over the plain twin's."""
    lines = []
    for each in (cost for cost in costs if "median" in cost):
        beside = f" {_spread(each['base'])} | {_over_base(each)} |" if base and "base" in each else " - | - |" * base
        numbers = f"{each['us']:.1f} | {each['twin_us']:.1f} | {_spread(each)} |"
        lines.append(f"| {each['what']} | {numbers}{beside} at most {each['most']:g}{_verdict(each)} |")
    columns = "| | µs | twin, µs | cost |" + " base: cost | µs, now / base |" * base + " aim |"
    return _table(columns, lines)


def _side_by_side(contenders: dict[str, Any]) -> str:
    """Every server of both checkouts."""
    lines = []
    for each in contenders.values():
        if "base_rounds" in each:
            rates = " | ".join(f"{_median(each, rounds):,.0f}" for rounds in ("rounds", "base_rounds"))
            over = (each["new_over_base"].get(of) for of in ("steps_per_s", "cpu_us_per_step"))
            lines.append(f"| {each['what']} | {rates} | {' | '.join(_spread(o) if o else '-' for o in over)} |")
    return _table("| | steps/s | base | now / base | µs per step, now / base |", lines)


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def _over_base(found: dict[str, Any]) -> str:
    return _spread(found["new_over_base"]) if "new_over_base" in found else "-"


def _verdict(found: dict[str, Any]) -> str:
    return "" if found["holds"] else ", missed"


def _table(columns: str, lines: Sequence[str]) -> str:
    return "\n".join([columns, "|---" * (columns.count("|") - 1) + "|", *lines]) if lines else ""


def write(name: str, content: dict[str, Any]) -> Path:
    """benchmarks/results/<name>.json, and the tables beside it as .md."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, default=float) + "\n")
    path.with_suffix(".md").write_text(markdown(content) + "\n")
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
    single = {
        name: c
        for name, c in contenders.items()
        if c["kind"] in _COLOURS and not name.startswith(("batch-", "bare-64", "bare-256", "aof-"))
    }
    names = sorted(single, key=lambda name: _median(single[name]))
    rates = [_median(single[name]) for name in names]
    axes.barh([single[n]["what"] for n in names], rates, color=[_COLOURS[single[n]["kind"]] for n in names])
    for i, rate in enumerate(rates):
        axes.text(rate, i, f" {rate:,.0f}", va="center", fontsize=7)
    axes.set_xlabel("steps per second, one step per request, 64 in flight")
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _median(contender: dict[str, Any], rounds: str = "rounds") -> float:
    rates = sorted(r["steps_per_s"] for r in contender[rounds])
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
