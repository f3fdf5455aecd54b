"""python -m benchmarks: starts everything itself, measures in interleaved rounds, checks every answer.

make bench                                   all, a quarter of an hour
make bench ARGS="--quick"                    all, short rounds
make bench ARGS="--only asgi-echo,http-json-redis"
make bench ARGS="--only growth,lone"         scenarios have names too
make bench ARGS="--only bare-256,score"       tables through `stepcast score`
make bench ARGS="--only silero"              voices per core in real time; Silero's graph is not in the repository
make bench ARGS="--only exports"             networks as torch's exporters write them, imported, beside our own export
make bench ARGS="--only cost,aof"            what dear steps cost beside plain ones; Redis without page dropping
make bench ARGS="--against ../before"        another checkout's servers take turns with this one's; both columns
make bench ARGS="--only cuda"                needs a GPU; python -m benchmarks.device --device cpu tries it without
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import contenders, costs, grpc_streams, machine, model, report, rounds, scenarios, tables, training
from .contenders import Contender
from .load import LoadFailed
from .requests import WrongAnswer
from .servers import Park, StartFailed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short rounds: a look, not a result")
    parser.add_argument("--only", default="", help="contenders and scenarios, by name or beginning, with commas")
    parser.add_argument("--against", type=_checkout, help="another checkout of Stepcast, measured in the same rounds")
    parser.add_argument("--rounds", type=int, help="rounds of all contenders (4; quick: 2); costs: twice as many")
    parser.add_argument("--seconds", type=float, help="seconds per contender and round (1; quick: 0.3); costs: half")
    parser.add_argument("--name", default="latest", help="results/<name>.json, .md and .svg")
    silero = "Silero's graph, for the scenario silero (../shared/models/onnx/silero_vad.onnx, where it is there)"
    parser.add_argument("--silero", type=Path, default=contenders.SILERO, help=silero)
    parser.add_argument("--list", action="store_true", help="print the names")
    return parser


def _checkout(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "service" / "__main__.py").is_file():
        raise argparse.ArgumentTypeError(f"{path} is no checkout of Stepcast: there is no service/__main__.py")
    return path


def _chosen(name: str, only: str) -> bool:
    return not only or any(name.startswith(part) for part in only.split(",") if part)


def _contenders(only: str) -> list[Contender]:
    """Those that are wanted, and the plain twins of costs that are."""
    everyone = [*contenders.everyone(), *grpc_streams.everyone(), *costs.everyone(), *tables.everyone()]
    names = costs.with_twins([c.name for c in everyone if _chosen(c.name, only)])
    return [c for c in everyone if c.name in names]


def _run_rounds(bench: contenders.Bench, chosen: Sequence[Contender], number: int, seconds: float) -> rounds.Results:
    """Costs in twice as many rounds of half the length: who is compared then stands closer together."""
    dear = {contender.name for contender in costs.everyone()}
    results = rounds.run(bench, [c for c in chosen if c.name not in dear], number, seconds, _say)
    return rounds.run(bench, [c for c in chosen if c.name in dear], 2 * number, seconds / 2, _say, results)


def _say(line: str) -> None:
    print(line, flush=True)


def _run_scenarios(bench: contenders.Bench, only: str, quick: bool) -> list[dict[str, Any]]:
    found = []
    for name in scenarios.SCENARIOS:
        if not _chosen(name, only):
            continue
        try:
            result = scenarios.run(name, bench, quick)
        except (StartFailed, LoadFailed) as error:
            print(f"absent: {name}: {error}", flush=True)
            found.append({"name": name, "absent": str(error), "checks": []})
            continue
        print(f"{name}: {scenarios.plain(result)}", flush=True)
        found.append({"name": name, **result})
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure; 1 where an answer was wrong."""
    arguments = _parser().parse_args(argv)
    if arguments.list:
        print("\n".join([c.name for c in _contenders("")] + [*scenarios.SCENARIOS, "training"]))
        return 0
    quick = arguments.quick
    number, seconds = arguments.rounds or (2 if quick else 4), arguments.seconds or (0.3 if quick else 1.0)
    facts, started = machine.facts(arguments.against), time.monotonic()
    model.ensure()
    park = Park(arguments.against)
    try:
        bench = contenders.Bench(park, silero=arguments.silero)
        results = _run_rounds(bench, _contenders(arguments.only), number, seconds)
        found = _run_scenarios(bench, arguments.only, quick)
    except WrongAnswer as error:
        print(f"wrong answer: {error}", file=sys.stderr)
        return 1
    finally:
        park.stop()
    content = {"facts": facts, **results.plain(), "scenarios": found}
    if _chosen("training", arguments.only):
        content["training"] = training.ratios(quick)
    facts["load_after"] = os.getloadavg()
    content["seconds"] = time.monotonic() - started
    _show(results, content)
    path = report.write(arguments.name, content)
    if any(contender.name in results.measures for contender in contenders.everyone()):
        report.chart(content, path.with_suffix(".svg"))
    print(f"{path} after {content['seconds']:.0f} s")
    return 0


def _show(results: rounds.Results, content: dict[str, Any]) -> None:
    if results.measures:
        print(report.table(results), end="\n\n")
    print(report.markdown(content))
    for name, why in results.absent.items():
        print(f"absent: {name}: {why.splitlines()[0][:160]}")
    for what, value in content.get("training", {}).items():
        print(f"training, {what}: {value}")


if __name__ == "__main__":
    raise SystemExit(main())
